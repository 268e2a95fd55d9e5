"""Tokenizers of others that end a process, fill the memory or rewrite texts are refused."""

import json

import pytest

from slimvlm.core.errors import SlimError
from slimvlm.data.chat import encode_samples
from slimvlm.data.read import load_samples
from slimvlm.models.load import load_config, load_processor
from tests import tiny_folder as folders
from tests.tiers import tiered


def many(pattern, content, times):
    each = {"type": "Replace", "pattern": {"String": pattern}, "content": content}
    return {"type": "Sequence", "normalizers": [each] * times}


HOSTILE = {
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


def use(folder):
    words = load_processor(str(folder), load_config(folder))
    encode_samples(words, load_samples("demo", limit=2, processor=words))


@pytest.mark.parametrize("why", tiered(HOSTILE, lambda why: why in ("empty pattern", "growing")))
def test_a_hostile_tokenizer_is_refused_in_one_line(why, tmp_path, capfd):
    folder = folders.copied("text", tmp_path / "m")
    values = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(values | HOSTILE[why]))
    capfd.readouterr()
    with pytest.raises(SlimError) as caught:
        use(folder)
    assert "\n" not in str(caught.value)
    assert not capfd.readouterr().err


def test_a_word_of_the_template_alone_sets_a_tokenizer_off(tmp_path, capfd):
    folder = folders.copied("text", tmp_path / "m")
    values = json.loads((folder / "tokenizer.json").read_text())
    chain = [("\u1234", "\u1235"), ("\u1235", "\u1236"), ("\u1236", "\u1237")]
    steps = [many(old, new * 1000, 1)["normalizers"][0] for old, new in chain]
    values["normalizer"] = {"type": "Sequence", "normalizers": steps}
    (folder / "tokenizer.json").write_text(json.dumps(values))
    template = "\u1234{% for m in messages %}{{ m.content }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    words = load_processor(str(folder), load_config(folder))
    with pytest.raises(SlimError, match="tokenizer needs more than"):
        encode_samples(words, folders.short_samples(2, sees=False))
    assert not capfd.readouterr().err
