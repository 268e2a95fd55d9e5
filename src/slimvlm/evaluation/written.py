"""Conversations whose answers a model has written itself, as data to learn from."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from PIL.Image import Image
from transformers import PreTrainedModel

from slimvlm.core.documents import read_object
from slimvlm.core.errors import DataError, shortened
from slimvlm.core.files import new_file, write_text
from slimvlm.core.progress import progress
from slimvlm.core.requests import note_request, noted_request, require_same_request
from slimvlm.data import chat
from slimvlm.data.images import open_image
from slimvlm.data.read import IMAGE_WORD, estimated_length
from slimvlm.data.samples import Message, Sample
from slimvlm.evaluation.ask import reply_to
from slimvlm.models.hidden import evaluating
from slimvlm.models.load import digest_of_weights
from slimvlm.training.offline import digest_of_sample

DATA_FILE = "data.jsonl"
INDEX_FILE = "answers.json"
_PARTS, _IMAGES = "parts", "images"


@dataclass(frozen=True)
class _Asked:
    """What a folder of answers is made of."""

    teacher: str
    contents: tuple[str, ...]
    max_new_tokens: int


def is_written(folder: str | Path) -> bool:
    """Whether a folder holds a model's answers, all or some of them."""
    return (Path(folder) / INDEX_FILE).is_file()


def write_answers(
    model: PreTrainedModel,
    processor: Any,
    samples: Sequence[Sample],
    out: str | Path,
    max_new_tokens: int = 256,
    batch_size: int = 8,
) -> Path:
    """Let a model answer the prompts of some data, and write its conversations down.

    Each assistant turn is answered greedily after the user's turns and the model's own answers
    before it. A student that learns from them imitates what the teacher says, where the data may
    say something else.

    If the folder holds a part of the same answers, only the rest is done.

    Args:
        model: The teacher.
        processor: Its processor or tokenizer.
        samples: The conversations.
        out: The folder: ``data.jsonl``, which ``--data`` takes, and pictures that had no file.
        max_new_tokens: Tokens of an answer at most.
        batch_size: Conversations that are answered at once.

    Returns:
        The data file.

    Raises:
        ConfigError: If the folder holds something else.
        DataError: If the model says nothing to all prompts.
    """
    folder = Path(out)
    contents = tuple(map(digest_of_sample, samples))
    asked = asdict(_Asked(digest_of_weights(model), contents, max_new_tokens))
    if is_written(folder):
        cure = "Use --force to replace it, or another folder"
        noted = noted_request(folder / INDEX_FILE)
        require_same_request(noted, asked, f"output {str(folder)!r} has answers", cure)
    (folder / _PARTS).mkdir(parents=True, exist_ok=True)
    note_request(folder / INDEX_FILE, asked)
    order = sorted(range(len(samples)), key=lambda i: _likeness(samples[i]))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    with evaluating(model):
        for number, batch in enumerate(progress(batches, "answers")):
            part = folder / _PARTS / f"{number}.json"
            if not part.exists():
                chosen = [samples[i] for i in batch]
                said = _answered(model, processor, chosen, max_new_tokens)
                said_by = {i: list(each.messages) for i, each in zip(batch, said, strict=True)}
                write_text(part, json.dumps(said_by))
    written: dict[int, list[Message]] = {}
    for number in range(len(batches)):
        rows = read_object(folder / _PARTS / f"{number}.json", "answers")
        written |= {int(index): messages for index, messages in rows.items()}
    kept = [index for index in sorted(written) if _says_something(written[index])]
    if not kept:
        raise DataError("the teacher says nothing to any of the prompts")
    with new_file(folder / DATA_FILE) as partial:
        lines = (_line(samples[i], written[i], i, folder / _IMAGES) for i in kept)
        partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return folder / DATA_FILE


def _likeness(sample: Sample) -> tuple[int, int, int]:
    """Conversations with as many turns and pictures and a similar length are answered together."""
    return len(sample.messages), len(sample.images), estimated_length(sample, 0)


def _answered(
    model: PreTrainedModel, processor: Any, samples: Sequence[Sample], max_new_tokens: int
) -> list[Sample]:
    """Conversations with the model's own answers."""
    said: list[list[Message]] = [[] for _ in samples]
    for place in range(max(len(sample.messages) for sample in samples)):
        waiting = []
        for number, sample in enumerate(samples):
            if place >= len(sample.messages):
                continue
            if sample.messages[place]["role"] == "assistant":
                waiting.append(number)
            else:
                said[number].append(sample.messages[place])
        if waiting:
            asked = [chat.begun(samples[number], said[number]) for number in waiting]
            encoded = chat.encode_prompts(processor, asked)
            names = ", ".join(each.id for each in asked[:3])
            what = f"sample {shortened(names)}"
            replies = reply_to(model, processor, encoded, max_new_tokens, what)
            for number, reply in zip(waiting, replies, strict=True):
                content = [{"type": "text", "text": reply}]
                said[number].append({"role": "assistant", "content": content})
    return [replace(s, messages=tuple(each)) for s, each in zip(samples, said, strict=True)]


def _says_something(messages: Sequence[Message]) -> bool:
    """Whether all answers have text, and none the word that stands for a picture in data."""
    answers = [m["content"][0]["text"] for m in messages if m["role"] == "assistant"]
    return all(answer and IMAGE_WORD not in answer for answer in answers)


def _line(sample: Sample, messages: Sequence[Message], index: int, folder: Path) -> str:
    images = [_file_of(image, f"{index}-{n}", folder) for n, image in enumerate(sample.images)]
    return json.dumps({"id": sample.id, "messages": messages, "images": images})


def _file_of(image: Image | Path, name: str, folder: Path) -> str:
    """A picture below the data file's folder: a link to its file, a copy of it, or a new file."""
    folder.mkdir(exist_ok=True)
    if not (path := folder / name).exists():
        with new_file(path) as partial:
            if not isinstance(image, Path):
                open_image(image).save(partial, "PNG")
            elif not _linked(image, partial):
                shutil.copyfile(image, partial)
    return f"{folder.name}/{path.name}"


def _linked(file: Path, name: Path) -> bool:
    """Give a file a second name, where the file system can."""
    try:
        os.link(file.resolve(), name)
    except OSError:
        return False
    return True
