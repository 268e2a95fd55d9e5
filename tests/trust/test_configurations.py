"""A configuration file sets values; nothing in it becomes an option or runs code."""

import ast
import inspect
import json
from pathlib import Path

import pytest
import torch

import slimvlm
from slimvlm.cli import main
from slimvlm.core.errors import SlimError
from slimvlm.models.load import load
from tests import tiny_folder as folders
from tests.handmade import refused
from tests.tables import tables
from tests.tiers import tiered
from tests.trust.spoiled import edit_weights

TABLES = tables(__file__)

SOURCES = sorted(Path(inspect.getfile(slimvlm)).parent.rglob("*.py"))
EVIL = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
(Path(__file__).parent / "ran").touch()
class C(LlamaConfig): pass
class M(LlamaForCausalLM): pass
"""


@pytest.mark.parametrize(
    "option",
    ["criterion: [magnitude, --force]", "force: true", "trust_remote_code: true", "seed: --force"],
)
@pytest.mark.parametrize("verb", ["compress", "recover"])
def test_a_file_gives_no_option(verb, option, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("stdin was read"))
    model = folders.copied("text", tmp_path / "m")
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text('{"model": "", "seed": 0, "made_from": []}')
    (out / "precious").write_text("x")
    code = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    folders.edit_json(model / "config.json", lambda values: values.update(auto_map=code))
    (model / "evil.py").write_text(EVIL)
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {model}\nratio: 0.3\n{option}\n")
    words = (model,) if verb == "recover" else ()
    refused(verb, *words, "--config", file, "--out", out)
    assert (out / "precious").read_text() == "x"
    assert not (model / "ran").exists()


def test_every_from_pretrained_says_whether_code_may_run():
    calls = [
        (path.name, node.lineno, {word.arg for word in node.keywords})
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "from_pretrained"
    ]
    assert len(calls) > 5
    assert not [call for call in calls if "trust_remote_code" not in call[2]]


CARDS = {
    "bytes": b"---\nlicense: \xe9\n---\n",
    "a list": b"---\n- a\n---\n",
    "a scalar": b"---\n5\n---\n",
    "a tab": b"---\n\tlicense: x\n---\n",
    "braces": b"---\n{{{[\n---\n",
    "no date": b"---\nlicense: 2020-13-99\n---\n",
    "results": b"---\neval_results: 5\n---\n",
    "key": b"---\nignore_metadata_errors: 1\n---\n",
    "deep": b"---\na: " + b"[" * 3000 + b"\n---\n",
    "nul": b"---\nlicense: a\x00b\n---\n",
    "aliases": b"---\na: &a [x,x]\nb: &b [*a,*a]\nbase_model: *b\n---\n",
    "long": b"---\nlicense: " + b"x" * 5000 + b"\n---\n",
}


@pytest.mark.parametrize("why", tiered(CARDS, lambda why: why == "deep"))
def test_an_odd_card_costs_no_work(why, tmp_path):
    model = folders.copied("text", tmp_path / "m")
    (model / "README.md").write_bytes(CARDS[why])
    words = ["prune", str(model), "--ratio", "0.3", "--criterion", "magnitude"]
    main([*words, "--out", str(tmp_path / "out")])
    head = (tmp_path / "out" / "README.md").read_text().split("---")[1]
    assert "xxxxx" not in head
    assert load(tmp_path / "out")


SPOILT = {
    "unexpected": lambda weights: weights.update({"\x1b[2J\n\u202e": torch.zeros(2)}),
    "another shape": lambda weights: weights.update(
        {name: w[:, 1:] for name, w in weights.items() if "1.mlp.down_proj" in name}
    ),
    "missing": lambda weights: weights.pop("model.layers.1.mlp.down_proj.weight"),
}


@pytest.mark.parametrize("what", SPOILT)
def test_names_in_weights_are_said_in_one_line_without_control_characters(what, tmp_path, capsys):
    model, name = folders.copied("text", tmp_path / "m"), "model.layers.1.mlp.down_proj.weight"
    edit_weights(model, SPOILT[what])
    if what == "unexpected":
        load(model)
        said = capsys.readouterr().err
        assert "1 tensors are not read" in said
    else:
        with pytest.raises(SlimError) as caught:
            load(model)
        said = str(caught.value) + "\n"
        assert name in said
        assert what in said
    assert said.count("\n") == 1
    assert "\x1b" not in said


@pytest.mark.parametrize("values", TABLES["generation"])
def test_settings_of_generation_change_no_code(values, tmp_path, capsys):
    model = folders.copied("text", tmp_path / "m")
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, **values}))
    main(["chat", str(model), "Which?", "--max-new-tokens", "2"])
    assert not capsys.readouterr().err


@pytest.mark.parametrize("low_memory", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_settings_of_generation_without_effect_are_kept(low_memory, tmp_path):
    """As LLaVA-1.5 and Vicuna were published, and tokens that the model cannot pad with."""
    model, out = folders.copied("text", tmp_path / "m"), tmp_path / "out"
    published = {"eos_token_id": 1, "pad_token_id": -1, "temperature": 0.9, "top_p": 0.6}
    (model / "generation_config.json").write_text(json.dumps(published))
    words = ["prune", str(model), "--ratio", "0.3", "--criterion", "magnitude", "--out", str(out)]
    main(words + ["--low-memory"] * low_memory)
    assert published.items() <= json.loads((out / "generation_config.json").read_text()).items()


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """The folder of a compress run that ended after its checkpoint was written, and its command."""
    monkeypatch.setattr("slimvlm.runs.compress.finish", lambda *_: pytest.fail("stopped"))
    data = folders.write_llava_data(tmp_path / "data", pictures=False)
    words = ["compress", str(folders.folder("text")), "--data", str(data), "--ratio", "0.3"]
    words += ["--out", str(tmp_path / "run"), "--criterion", "magnitude", "--axis", "width"]
    words += ["--train", "none", "--samples", "4"]
    with pytest.raises(pytest.fail.Exception):
        main(words)
    monkeypatch.undo()
    return tmp_path / "run", words


@pytest.mark.parametrize(
    "name",
    tiered(
        ["chat_template.jinja", "model.safetensors", "../checkpoint.sha256"],
        lambda name: "sha256" in name,
    ),
)
def test_a_run_goes_on_only_with_what_it_wrote(name, stopped):
    run, words = stopped
    file = run / "checkpoint" / name
    before = file.read_bytes()
    file.write_bytes(before[:-1] + b"\xff")
    assert "changed after it was written" in refused(*words)
    file.write_bytes(before)
    main(words)
    assert (run / "summary.md").exists()
    assert not list(run.glob("*.sha256"))


def test_a_model_is_read_in_silence(capfd):
    load(folders.folder("llava"))
    assert "[transformers]" not in capfd.readouterr().err
