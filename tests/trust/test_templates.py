"""Chat templates that would fill the memory or never end are refused; honest ones say the same."""

import contextlib
import copy
import json
import os
import signal
import time

import jinja2
import pytest

from slimvlm.core.errors import ConfigError, SlimError
from slimvlm.data import templates
from slimvlm.data.chat import encode_samples, render
from slimvlm.data.read import load_samples
from slimvlm.models.load import load_config, load_processor
from tests import tiny_folder as folders
from tests.tables import tables
from tests.tiers import tiered

TABLES = tables(__file__)

MESSAGES = [{"role": "user", "content": "Hi"}]
HOSTILE = TABLES["hostile"]
ESCAPES = TABLES["escapes"]


def rendered(template, kind="text"):
    words = copy.copy(folders.processor(kind))
    words.chat_template = template
    return render(words, MESSAGES)


BY_DEFAULT = ("loops", "power", "doubling", "joined", "written", "compared", "class", "recursion")


@pytest.mark.parametrize("name", tiered([*HOSTILE, *ESCAPES], BY_DEFAULT.__contains__))
def test_what_goes_on_fills_the_memory_or_escapes_is_refused_in_one_line(name, monkeypatch):
    monkeypatch.setattr(templates, "MAX_SECONDS", 0.3)
    start = time.monotonic()
    error, words = (
        (ConfigError, "its chat template") if name in HOSTILE else (SlimError, "chat tem")
    )
    with pytest.raises(error, match=words) as caught:
        rendered({**HOSTILE, **ESCAPES}[name])
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 20


def test_a_text_beyond_what_was_said_is_refused():
    with pytest.raises(SlimError, match="makes 3,000,000 characters of it"):
        rendered("{{ 'a' * 3000000 }}")


@pytest.mark.parametrize("name", ["power", "repeated", "centred", "unclosed"])
def test_a_template_of_a_processor_is_parsed_in_the_child_alone(name, monkeypatch):
    """Jinja computes what is constant in it."""
    monkeypatch.setattr(templates, "MAX_SECONDS", 0.3)
    with pytest.raises(SlimError, match="chat template"):
        rendered({**HOSTILE, **ESCAPES}[name], "llava")
    monkeypatch.setattr(jinja2.Environment, "parse", None)  # of this process
    assert templates.rendered("{% set a = 1 %}{{ a + b }}", {"b": 2}) == "3"


def test_a_template_that_was_ended_does_not_end_the_next():
    with pytest.raises(ConfigError):
        rendered(HOSTILE["held"])
    assert rendered("{{ messages[0].content }}") == "Hi"


def test_a_reply_to_a_request_that_was_broken_off_is_none_to_the_next():
    handler = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    with pytest.raises(KeyboardInterrupt):
        rendered("{% for i in range(9000) %}{% for j in range(900) %}{% endfor %}{% endfor %}old")
    signal.signal(signal.SIGALRM, handler)
    assert rendered("new") == "new"


def test_a_fork_has_a_child_of_its_own():
    assert rendered("{{ messages[0].content }}") == "Hi"
    reader, writer = os.pipe()
    if (forked := os.fork()) == 0:
        with contextlib.suppress(Exception):
            os.write(writer, rendered("{{ 1 + 1 }}").encode())
        os._exit(0)
    os.waitpid(forked, 0)
    assert os.read(reader, 9) == b"2"
    assert rendered("{{ messages[0].content }}") == "Hi"


@pytest.mark.parametrize("kind", folders.KINDS)
def test_honest_templates_say_what_transformers_alone_has_them_say(kind):
    words = folders.processor(kind)
    parts = [{"type": "text", "text": "Hi <b> {x} %d"}]
    content = parts if kind != "text" else parts[0]["text"]
    said = [{"role": "user", "content": content}, {"role": "assistant", "content": content}]
    plain = words.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    assert render(words, said, generate=True) == plain


def test_filters_and_joins_work_as_ever():
    template = (
        "{{ 'a' ~ 1 ~ messages|length }} {{ messages|map(attribute='role')|join(', ') }} "
        "{{ '%s-%d' % ('x', 3) }} {{ '{}'.format(2) }} {{ messages|tojson }} {{ 2 ** 3 * 'ab' }}"
    )
    expected = 'a11 user x-3 2 [{"role": "user", "content": "Hi"}] abababababababab'
    assert rendered(template) == expected


# Tokenizers that end a process, fill the memory or rewrite texts are refused, too.
def many(pattern, content, times):
    each = {"type": "Replace", "pattern": {"String": pattern}, "content": content}
    return {"type": "Sequence", "normalizers": [each] * times}


TOKENIZERS = {
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


@pytest.mark.parametrize("why", tiered(TOKENIZERS, lambda why: why in ("empty pattern", "growing")))
def test_a_hostile_tokenizer_is_refused_in_one_line(why, tmp_path, capfd):
    folder = folders.copied("text", tmp_path / "m")
    values = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(values | TOKENIZERS[why]))
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
