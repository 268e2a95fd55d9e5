"""Samples that are longer than a model can read: found, refused or cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slimvlm.cli import main
from slimvlm.core.errors import DataError
from slimvlm.data.chat import encode_samples, length_of
from slimvlm.data.lengths import Limit, fitted
from slimvlm.data.read import load_samples
from slimvlm.data.samples import Sample
from slimvlm.models.load import load_config
from slimvlm.models.parts import context_of
from tests.tiny_folder import folder, picture, processor, turn

pytestmark = pytest.mark.usefixtures("unhurried")
KINDS = ["text", "llava", "qwen2_5_vl"]


def talk(*lengths: int, sees: bool = False) -> Sample:
    """Exchanges whose answers have so many words."""
    turns = []
    for number, length in enumerate(lengths):
        shown = [None] if sees else []
        turns.append(turn("user", *shown, f"Which colour is part {number}?"))
        turns.append(turn("assistant", " ".join(["red"] * length)))
    return Sample("s", tuple(turns), tuple(picture(i) for i in range(len(lengths) * sees)))


@pytest.mark.parametrize("kind", KINDS)
def test_turns_go_from_the_end_with_their_pictures(kind: str) -> None:
    words = processor(kind)
    sample = talk(3, 4, 5, sees=kind != "text")
    two = Sample("s", sample.messages[:4], sample.images[:2])
    limit = Limit(length_of(words, sample) - 1, cuts=True)
    assert fitted(words, sample, limit) == two
    assert fitted(words, sample, Limit(length_of(words, sample), cuts=True)) is sample


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 5, 17])
def test_the_end_of_the_only_answer_goes(kind: str, tokens: int) -> None:
    words = processor(kind)
    sample = talk(60, sees=kind != "text")
    limit = Limit(length_of(words, sample) - tokens, cuts=True)
    found = fitted(words, sample, limit)
    said, whole = (s.messages[-1]["content"][0]["text"] for s in (found, sample))
    assert whole.startswith(said)
    assert limit.tokens - 3 < length_of(words, found) <= limit.tokens
    assert found.messages[:-1] == sample.messages[:-1]
    assert (encode_samples(words, [found])["labels"] != -100).any()


def test_too_long_is_named_with_its_cure() -> None:
    words, sample = processor("text"), talk(60)
    with pytest.raises(DataError, match=r"'s' has \d+ tokens, --max-length is 20 .*--too-long cut"):
        fitted(words, sample, Limit(20))
    with pytest.raises(DataError, match=r"the model reads 20"):
        fitted(words, sample, Limit(20, is_asked=False))
    with pytest.raises(DataError, match="nothing of its answer"):
        fitted(words, sample, Limit(5, cuts=True))


def test_the_lower_limit_counts() -> None:
    assert Limit.of(None, None, cuts=False) is None
    assert Limit.of(10, 20, cuts=False) == Limit(10, is_asked=True)
    assert Limit.of(30, 20, cuts=True) == Limit(20, is_asked=False, cuts=True)


def test_what_cannot_be_too_long_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[Any] = []
    monkeypatch.setattr("slimvlm.data.lengths.length_of", lambda *a: counted.append(a) or 0)
    words, short = processor("llava"), talk(3, sees=True)
    assert fitted(words, short, Limit(4096, is_asked=False)) is short
    assert not counted
    fitted(words, short, Limit(256, is_asked=False))
    assert len(counted) == 1


def write(path: Path, *samples: Sample) -> Path:
    rows = []
    for number, sample in enumerate(samples):
        turns = [{"role": m["role"], "content": m["content"][0]["text"]} for m in sample.messages]
        rows.append(json.dumps({"id": str(number), "messages": turns}) + "\n")
    path.write_text("".join(rows))
    return path


def test_a_file_s_long_rows_are_counted_and_said(tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", talk(3), talk(200), talk(300), talk(4))
    words, context = processor("text"), context_of(load_config(folder("text")))
    assert context == 256
    said: list[str] = []
    found = load_samples(data, warn=said.append, processor=words, context=context, too_long="cut")
    assert [length_of(words, sample) <= 256 for sample in found] == [True] * 4
    assert found[0] == load_samples(data)[0]
    assert said == [f"data {str(data)!r}: 2 samples were cut to 256 tokens"]
    with pytest.raises(DataError, match=r"'1' has .* the model reads 256"):
        load_samples(data, warn=said.append, processor=words, context=context)


def test_the_command_line_finds_them_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "data.jsonl", *[talk(3 + k) for k in range(9)], talk(300))
    words = ["evaluate", str(folder("text")), "--data", str(data)]
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert "the model reads 256" in capsys.readouterr().err
    main([*words, "--too-long", "cut"])
    assert "1 samples were cut" in capsys.readouterr().err
