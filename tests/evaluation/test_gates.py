"""Requirements accept a model or not; wrong ones are refused before a model is read."""

import json
from contextlib import redirect_stderr
from io import StringIO

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from slimvlm import cli
from slimvlm.core.errors import ConfigError, RegressionError
from slimvlm.core.progress import silent
from slimvlm.data.samples import Task
from slimvlm.evaluation.gates import in_percent, judge, parse
from slimvlm.evaluation.on_data import DataResult, OnSample
from slimvlm.evaluation.results import Result, TaskResult
from slimvlm.models.load import load
from tests import tiny_folder as folders
from tests.handmade import changed_copy, refused
from tests.tables import tables

TABLES = tables(__file__)

pytestmark = pytest.mark.usefixtures("unhurried")
MODEL = str(folders.folder("llava"))
TASKS = {
    "pets": Task("pets", "exact_match", 0.0, lambda limit: []),
    "passages": Task("passages", "perplexity", 0.0, lambda limit: [], in_average=False),
    "mme_perception": Task("mme_perception", "exact_match", 0.0, lambda limit: []),
}
KNOWN = in_percent(TASKS, has_data=True)


@pytest.mark.parametrize(("text", "meant"), TABLES["bounds"])
def test_bounds_are_shares_percentages_numbers_or_multiples(text, meant):
    assert parse([text], KNOWN) == [tuple(meant)]


WRONG = TABLES["wrong"]


@pytest.mark.parametrize("text", WRONG)
def test_wrong_requirements_are_named(text):
    with pytest.raises(ConfigError) as refusal:
        parse(["loss <= 2", text], KNOWN)
    assert str(refusal.value).startswith(f"require {text!r}")
    assert WRONG[text] in str(refusal.value)


def test_multiples_and_comparisons_need_a_baseline():
    for text in ("loss <= 1.1x", "agreement >= 95%", "retention >= 0.9", "kl <= 1"):
        with pytest.raises(ConfigError, match="needs a baseline"):
            parse([text], KNOWN, has_baseline=False)
    assert parse(["loss <= 2", "avg >= 90%"], KNOWN, has_baseline=False)


def on_data(loss, same=10):
    """Ten samples of ten tokens; the baseline has a loss of 1."""
    samples = tuple(OnSample(str(i), 10, loss, 1.0, same, 0.5) for i in range(10))
    alone = tuple(OnSample(str(i), 10, 1.0) for i in range(10))
    return {"baseline": DataResult("a", alone), "model": DataResult("b", samples, "a")}


def on_tasks(*rights):
    """Results on a hundred questions, of which so many tenths are right."""
    found = {}
    for model, right in zip(("baseline", "model"), rights, strict=True):
        scores, ids = ((1.0,) * right + (0.0,) * (10 - right)) * 10, tuple(map(str, range(100)))
        task = TaskResult("exact_match", 10.0 * right, 0.0, True, ids, ("",) * 100, scores)
        found[model] = Result(model, 20, 10, {"pets": task}, prefill_ms=1.0, decode_ms=1.0)
    return found


def is_met(text, tasks, data):
    try:
        judge([text], tasks, data, silent)
    except RegressionError:
        return False
    return True


@given(st.integers(1, 9), st.integers(1, 9), st.integers(5, 30), st.sampled_from([">=", "<="]))
def test_the_figure_decides(right, before, bound, sign):
    def meets(value, limit):
        return value >= limit if sign == ">=" else value <= limit

    tasks = on_tasks(before, right)
    for name in ("pets", "avg"):
        assert is_met(f"{name} {sign} {bound}%", tasks, {}) == meets(10 * right, bound)
        told = is_met(f"{name} {sign} {bound / 10}x", tasks, {})
        assert told == meets(10 * right, bound / 10 * (10 * before))
    kept = 100 * right / before
    assert is_met(f"retention {sign} {kept + bound}%", tasks, {}) == (sign == "<=")
    data = on_data(right, same=right)
    assert is_met(f"loss {sign} {bound / 10}x", {}, data) == meets(right, bound / 10)
    assert is_met(f"increase {sign} {bound}", {}, data) == meets(right - 1, bound)
    assert is_met(f"agreement {sign} 0.5", {}, data) == meets(right, 5)
    assert is_met(f"kl {sign} 0.4", {}, data) == (sign == ">=")


def test_figure_interval_and_bound_are_in_one_line():
    said = []
    judge(["pets >= 0.9x", "avg >= 10%"], on_tasks(5, 5), {}, said.append)
    assert said[0].startswith("accepted: pets in percent is 50.0000 [")
    assert said[0].endswith("], at least 45.0000 (0.9 times the baseline's 50.0000)")
    assert len(said) == 2
    judge([], on_tasks(5, 5), on_data(2.0), pytest.fail)
    with pytest.raises(RegressionError) as told:
        judge(["loss <= 1.5x", "loss <= 3", "agreement >= 1"], {}, on_data(2.0, 9), said.append)
    assert str(told.value) == (
        "regression: loss is 2.0000 [2.0000, 2.0000], "
        "not at most 1.5000 (1.5 times the baseline's 1.0000); "
        "agreement in percent is 90.0000 [81.2361, 94.0052], not at least 100.0000"
    )
    assert said[2].startswith("accepted: loss is 2.0000")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with data and a model that differs from `MODEL`."""
    folder = tmp_path_factory.mktemp("gates")
    folders.write_llava_data(folder / "data", count=20)
    model, processor = load(MODEL)
    worse = changed_copy(model, size=1.0)
    worse.save_pretrained(folder / "worse")
    processor.save_pretrained(folder / "worse")
    return folder


def ended(*words):
    """The exit code of a command, and what it says on stderr."""
    with redirect_stderr(StringIO()) as said:
        try:
            cli.main([str(word) for word in words])
        except SystemExit as end:
            return end.code, said.getvalue()
    return 0, said.getvalue()


def test_evaluate_ends_with_three_for_a_regression(home, capsys):
    data = ["--data", home / "data" / "data.json", "--limit", "6", "--json"]
    asked = ["--require", "agreement >= 99.9%", "loss <= 1.05x"]
    code, said = ended("evaluate", MODEL, *data, "--baseline", MODEL, *asked)
    assert (code, said.count("accepted: ")) == (0, 2), said
    capsys.readouterr()
    code, said = ended("evaluate", home / "worse", *data, "--baseline", MODEL, *asked)
    assert code == 3
    assert said.splitlines()[-1].startswith("slimvlm: regression: agreement in percent is ")
    assert set(json.loads(capsys.readouterr().out)) == {"baseline", "model"}

    tasks = ["--tasks", "presence", "--limit", "4"]
    code, said = ended("evaluate", MODEL, *tasks, "--require", "presence >= 0", "avg <= 100%")
    assert (code, said.count("accepted: ")) == (0, 2), said


def test_mistakes_are_found_before_a_model_is_read(home, monkeypatch):
    read = classmethod(lambda *_, **__: pytest.fail("it was read"))
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", read)
    data = home / "data" / "data.json"
    told = refused("evaluate", MODEL, "--data", data, "--require", "agreement >= 95%")
    assert told == "slimvlm: require 'agreement >= 95%' needs a baseline"
    told = refused("evaluate", MODEL, "--tasks", "presence", "--require", "loss <= 2")
    assert "figure 'loss' must be one of: presence, avg, retention" in told
    assert "'absence'" in refused("compare", MODEL, "demo", "--require", "absence >= 0.5")
    assert "--config" in refused("compress", MODEL, "--out", home / "no", "--require", "loss <= 1x")
    values = {"model": MODEL, "ratio": 0.3, "data": str(data), "recover": "none"}
    unseen = "figure 'presence' must be one of: loss, perplexity, increase, agreement"
    few = str(folders.write_llava_data(home / "few", count=8))  # of which none stays unseen
    for changes, more, expected in (
        ({"require": ["presence >= 0.5"]}, [], unseen),
        ({"require": ["presence >= 0.5"]}, ["--dry-run"], unseen),
        ({"require": "loss <= 1x"}, ["--test-samples", "0"], "with test samples"),
        ({"require": "loss <= 1x", "data": few}, [], "with test samples"),
        ({"require": "loss <= 1x", "data": few}, ["--dry-run"], "with test samples"),
    ):
        (home / "run.yaml").write_text(yaml.safe_dump(values | changes))
        run = ("--config", home / "run.yaml", "--out", home / "no", *more)
        assert expected in refused("compress", *run)


@pytest.mark.slow
def test_a_run_that_misses_what_its_file_requires_is_whole_and_ends_with_three(home, capsys):
    values = {"model": MODEL, "ratio": 0.3, "axis": "width", "samples": 6, "local_steps": 0}
    values |= {"data": str(home / "data" / "data.json"), "recover": "none"}
    for name, bound, expected in (("met", "1000x", 0), ("missed", "0.001x", 3)):
        (home / "run.yaml").write_text(yaml.safe_dump({**values, "require": f"loss <= {bound}"}))
        code, said = ended("compress", "--config", home / "run.yaml", "--out", home / name)
        assert code == expected, said
        assert (home / name / "summary.md").exists()
        assert f"- loss <= {bound}" in (home / name / "run.yaml").read_text()
    assert "regression: loss is" in said
    capsys.readouterr()
