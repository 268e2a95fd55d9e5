"""What somebody else's files and folders name is neither read nor run, and nothing is removed."""

import json
import subprocess
import sys

import pytest
import yaml
from transformers import PreTrainedModel

from slimvlm.cli import main
from slimvlm.models.load import anatomy, load
from tests import tiny_folder as folders
from tests.handmade import contents, refused
from tests.runs.test_report import write_run
from tests.tables import tables
from tests.tiers import tiered
from tests.trust.test_configurations import EVIL

TABLES = tables(__file__)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """An own working folder, in which questions are answered with yes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize("edit", TABLES["edits"], ids=str)
def test_no_file_names_another_model_class_or_file(edit, place):
    file, values, *why = edit
    model = folders.copied("llava", place / "m")
    evil = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C"}}
    (model / "sub").mkdir()
    (model / "sub" / "config.json").write_text(json.dumps(evil))
    (model / "sub" / "evil.py").write_text(EVIL)
    path = model / file
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))
    assert (why or [file])[0] in refused("chat", "m", "Hi")
    assert not (model / "sub" / "ran").exists()


@pytest.mark.parametrize("kernel", ["evil/kernel", "flash_attention_2", {"": "evil/kernel"}])
@pytest.mark.parametrize(
    "part", tiered([None, "text_config", "vision_config"], lambda part: part == "text_config")
)
def test_no_configuration_chooses_a_kernel(part, kernel, place):
    model = folders.copied("llava", place / "m")
    folders.edit_json(
        model / "config.json", lambda v: (v[part] if part else v).update(attn_implementation=kernel)
    )
    assert anatomy("m") == anatomy(folders.folder("llava"))
    assert load("m")[0].config._attn_implementation == "sdpa"


@pytest.mark.parametrize("is_link", [True, False])
@pytest.mark.parametrize("name", ["sh/slimvlm-scratch", ".o.scratch", ".o.training"])
def test_only_marked_folders_of_work_are_emptied(name, is_link, place):
    victim, data = place / "victim", folders.write_llava_data(place / "data", count=8)
    (victim / "checkpoint-9").mkdir(parents=True)
    (victim / "checkpoint-9" / "precious").write_text("x")
    (place / name).parent.mkdir(exist_ok=True)
    if is_link:
        (place / name).symlink_to(victim)
    elif name == ".o.scratch":
        (place / name).mkdir()
        victim.rename(place / name / "slimvlm-scratch")
    else:
        victim.rename(place / name)
    before = contents(place)
    model = folders.folder("llava")
    words = ["prune", model, "--data", data, "--ratio", "0.3", "--samples", "4", "--low-memory"]
    words += ["--scratch", "sh"] * (name[0] == "s")
    if name == ".o.training":
        words = ["recover", model, "--teacher", model, "--data", data, "--max-steps", "1"]
    told = refused(*words, "--out", "o")
    assert "link" in told if is_link else "is in the way" in told
    assert contents(place) == before


@pytest.mark.parametrize("metric", ["exact_match", "evilmetric:score"])
def test_a_report_reads_nothing_that_the_run_names(metric, place):
    write_run(place / "run", anatomy(folders.folder("text")))
    for path in (place / "run" / "results").iterdir():
        folders.edit_json(
            path, lambda v: v["tasks"].update(own={**v["tasks"]["name"], "metric": metric})
        )
    rows = [{"id": str(number), "q": "SECRET", "a": "cat"} for number in range(10)]
    (place / "secret.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (place / "evilmetric.py").write_text("open('ran', 'w')\ndef score(*_): return 1.0\n")
    task = {"name": "own", "data": str(place / "secret.jsonl"), "prompt": "{q}", "answer": "a"}
    (place / "run" / "t.yaml").write_text(yaml.safe_dump({**task, "metric": metric}))
    folders.edit_json(place / "run" / "run.yaml", lambda v: v.update(tasks="run/t.yaml"))
    main(["report", "run"])
    assert "SECRET" not in (place / "run" / "report.html").read_text()
    assert not (place / "ran").exists()
    if metric == "exact_match":  # the user's word
        main(["report", "run", "--tasks", "run/t.yaml"])
        assert "SECRET" in (place / "run" / "report.html").read_text()


@pytest.mark.parametrize("verb", ["prune", "export"])
def test_a_template_of_forty_thousand_tokens_costs_no_work(verb, place):
    model = folders.copied("llava", place / "m")
    (model / "chat_template.jinja").write_text("{{ strftime_now('%Y' * 9999) }}")
    words = ["prune", "m", "--ratio", "0.3", "--criterion", "magnitude"]
    main([*(words if verb == "prune" else ["export", "m", "--text-only"]), "--out", "o"])
    assert (place / "o" / "config.json").exists()


def test_lora_is_tried_before_weights_are_read(place, monkeypatch):
    read = classmethod(lambda *_, **__: pytest.fail("weights were read"))
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", read)
    data, model = folders.write_llava_data(place / "data", count=4), folders.folder("llava")
    (place / "r.yaml").write_text(
        "model: x\nratio: 0.3\nrecover: {loss: sft, lora: {target_modules: [dense]}}\n"
    )
    told = refused("recover", model, "--data", data, "--config", "r.yaml", "--out", "o")
    assert "dense" in told


def test_a_second_interrupt_tears_nothing(place):
    code = (
        "import atexit, os, signal, slimvlm.cli as c\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job has none
        "stop = lambda *_: os.kill(os.getpid(), signal.SIGINT)\n"
        "def run() -> None:\n    try:\n        stop()\n"
        "    finally:\n        stop(); print('tidy')\n"
        "c.VERBS['demo'] = run; atexit.register(stop); c.main(['demo'])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 130
    assert "tidy" in ran.stdout
    assert "Traceback" not in ran.stderr
