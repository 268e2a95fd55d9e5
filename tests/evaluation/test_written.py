"""A teacher writes the answers of a data file itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slimvlm.core.errors import ConfigError
from slimvlm.core.options import TrainingData
from slimvlm.data.read import load_samples
from slimvlm.data.samples import Question, Sample
from slimvlm.evaluation import written
from slimvlm.evaluation.ask import answer
from slimvlm.evaluation.written import DATA_FILE, write_answers
from slimvlm.models.load import load
from slimvlm.runs.recover import cache_teacher
from tests import tiny_folder as folders


@pytest.fixture(scope="module")
def teacher() -> tuple[Any, Any]:
    return load(folders.folder("llava"), "float32")


def asked(count: int = 5) -> list[Sample]:
    """Single questions on pictures."""
    return folders.short_samples(count)


def test_each_answer_is_what_the_teacher_says(teacher: tuple[Any, Any], tmp_path: Path) -> None:
    file = write_answers(*teacher, asked(), tmp_path / "out", max_new_tokens=6, batch_size=2)
    found = {sample.id: sample for sample in load_samples(file)}
    for sample in asked():
        prompt = sample.messages[0]["content"][-1]["text"]
        (reply,) = answer(*teacher, [Question("q", prompt, (), sample.images)], 6)
        if not reply:
            assert sample.id not in found
            continue
        learnt = found.pop(sample.id)
        assert learnt.messages[0] == sample.messages[0]
        assert learnt.messages[1]["content"] == [{"type": "text", "text": reply}]
        assert len(learnt.images) == 1
    assert not found


def test_later_turns_follow_the_teacher_s_own_answers(
    teacher: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = [
        folders.turn("user", None, "What is shown?"),
        folders.turn("assistant", "A cat."),
        folders.turn("user", "And now?", None),
        folders.turn("assistant", "A dog."),
    ]
    seen: list[Sample] = []
    encode = written.chat.encode_prompts

    def noted(processor: Any, samples: list[Sample]) -> Any:
        seen.extend(samples)
        return encode(processor, samples)

    monkeypatch.setattr(written.chat, "encode_prompts", noted)
    monkeypatch.setattr(written, "reply_to", lambda *args: ["Mine."] * len(args[2]["input_ids"]))
    given = folders.sample("two", *turns, images=2)
    file = write_answers(*teacher, [given], tmp_path / "out")
    assert [len(each.images) for each in seen] == [1, 2]
    assert "A cat." not in str(seen[1].messages)
    (learnt,) = load_samples(file)
    assert [m["content"][-1].get("text") for m in learnt.messages if m["role"] == "assistant"] == [
        "Mine.",
        "Mine.",
    ]


def test_a_stopped_run_goes_on(
    teacher: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = write_answers(*teacher, asked(), tmp_path / "whole", 4, 2)
    honest, calls = written.reply_to, []

    def stops(*args: Any) -> list[str]:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return honest(*args)

    with monkeypatch.context() as patch:
        patch.setattr(written, "reply_to", stops)
        with pytest.raises(KeyboardInterrupt):
            write_answers(*teacher, asked(), tmp_path / "out", 4, 2)
    again = write_answers(*teacher, asked(), tmp_path / "out", 4, 2)
    assert again.read_text() == whole.read_text()
    with pytest.raises(ConfigError, match="max_new_tokens"):
        write_answers(*teacher, asked(), tmp_path / "out", 5, 2)


def test_an_answer_that_would_be_read_as_a_picture_is_left_out(
    teacher: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = iter(["See <image>.", "", "Fine."])
    monkeypatch.setattr(written, "reply_to", lambda *args: [next(said)])
    alike = [replace(sample, messages=asked(1)[0].messages) for sample in asked(3)]
    file = write_answers(*teacher, alike, tmp_path / "out", batch_size=1)
    assert [json.loads(line)["id"] for line in file.read_text().splitlines()] == ["s2"]


def test_the_verb_writes_data_that_recover_takes(tmp_path: Path) -> None:
    data = folders.write_llava_data(tmp_path / "data")
    source = TrainingData(data=str(data), samples=4)
    out, said = tmp_path / "out", list[str]()
    cache_teacher(
        str(folders.folder("llava")),
        source,
        out,
        what="answers",
        max_new_tokens=8,
        say=said.append,
    )
    assert str(out / DATA_FILE) in said[-1]
    again = replace(source, samples=3)
    cache_teacher(str(folders.folder("llava")), again, out, what="answers", force=True)
    moved = out.rename(tmp_path / "moved")  # its pictures go with it
    assert load_samples(moved / DATA_FILE)
    with pytest.raises(ConfigError, match="max_new_tokens 0"):
        cache_teacher(str(folders.folder("llava")), source, out, what="answers", max_new_tokens=0)
