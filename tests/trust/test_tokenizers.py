"""Tokenizers of others that end a process, fill the memory or rewrite texts are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slimvlm.core.errors import SlimError
from slimvlm.data.chat import encode_samples
from slimvlm.data.read import load_samples
from slimvlm.models.load import load_config, load_processor
from tests import tiny_folder as folders


def many(pattern: str, content: str, times: int) -> dict[str, Any]:
    each = {"type": "Replace", "pattern": {"String": pattern}, "content": content}
    return {"type": "Sequence", "normalizers": [each] * times}


HOSTILE: dict[str, dict[str, Any]] = {
    "empty pattern": {"normalizer": many("", "b", 1)["normalizers"][0]},
    "charsmap": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////wAAAAD/////"}},
    "growing": {"normalizer": many("a", "a" * 100, 5)},
    "prepended": {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": "x" * 2**20}] * 60,
        }
    },
    "fixed length": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "slow pattern": {
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": r"((\w|\s)+)+\d{99}"},
            "behavior": "Isolated",
            "invert": False,
        }
    },
}


def use(folder: Path) -> None:
    words = load_processor(str(folder), load_config(folder))
    encode_samples(words, load_samples("demo", limit=2, processor=words))


@pytest.mark.parametrize("why", HOSTILE)
def test_a_hostile_tokenizer_is_refused_in_one_line(
    why: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = folders.copied("text", tmp_path / "m")
    values = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(values | HOSTILE[why]))
    capfd.readouterr()
    with pytest.raises(SlimError) as caught:
        use(folder)
    assert "\n" not in str(caught.value)
    assert not capfd.readouterr().err
