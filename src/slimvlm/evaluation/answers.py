"""Replies on disk as they come, so that a stopped evaluation goes on and none is asked twice."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from slimvlm.core.files import explained
from slimvlm.core.requests import digest
from slimvlm.data.images import identifying_bytes
from slimvlm.data.samples import Question, Task


def digest_of_questions(weights: str, task: Task, questions: Sequence[Question], **how: Any) -> str:
    """A hash of everything that a task's replies depend on: model, questions, pictures, options.

    Args:
        weights: From `slimvlm.models.load.digest_of_weights`.
        task: The task.
        questions: Those that are asked.
        how: Options of asking.
    """

    def parts() -> Iterator[Any]:
        yield weights.encode()
        yield [task.name, task.max_new_tokens, how]
        for question in questions:
            yield [question.id, question.prompt, question.answers]
            yield from map(identifying_bytes, question.images)

    return digest(parts())[:24]


class AnswerLog:
    """One JSON line for each question, appended batch by batch.

    Args:
        folder: Where logs lie; None keeps nothing.
        task: Name of the task.
        key: From `digest_of_questions`; another key is another file.
    """

    def __init__(self, folder: Path | None, task: str, key: str) -> None:
        self._path = folder / f"{task}-{key}.jsonl" if folder is not None else None
        self._cut_short = False
        self.replies: dict[str, str] = {}
        if self._path is not None and self._path.is_file():
            text = self._path.read_text()
            self._cut_short = bool(text) and not text.endswith("\n")
            for line in text.splitlines():
                row = _parsed(line)
                if row is not None:
                    self.replies[row["id"]] = row["reply"]

    def add(self, questions: Sequence[Question], replies: Sequence[str]) -> None:
        """Append a batch."""
        for question, reply in zip(questions, replies, strict=True):
            self.replies[question.id] = reply
        if self._path is None:
            return
        rows = [
            {"id": q.id, "prompt": q.prompt, "answers": q.answers, "reply": reply}
            for q, reply in zip(questions, replies, strict=True)
        ]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with explained(self._path), self._path.open("a") as log:
            if self._cut_short:
                log.write("\n")
                self._cut_short = False
            log.write("".join(json.dumps(row) + "\n" for row in rows))


def _parsed(line: str) -> dict[str, str] | None:
    """A row, or None for a line that a kill cut short."""
    try:
        row: dict[str, str] = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row
