"""A study does each piece of work once, resumes after a stop, and names what failed."""

import json
import os
import shutil
from dataclasses import replace
from io import StringIO
from itertools import count
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from slimvlm.cli.printing import print_study
from slimvlm.core import documents
from slimvlm.core.errors import ConfigError, NumericalError
from slimvlm.data.read import identity_of_data
from slimvlm.evaluation import bench
from slimvlm.runs.study import forecast, prepared, results_table, run_study, schedule
from slimvlm.runs.study.config import Reference, ReferenceRow
from slimvlm.runs.study.schedule import Cache
from tests import tiny_folder as folders
from tests.handmade import in_python
from tests.runs.study.study_files import stable, study, watch_work

pytestmark = pytest.mark.usefixtures("unhurried")
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return folders.write_llava_data(tmp_path_factory.mktemp("data"), pictures=False)


@pytest.fixture(scope="module")
def finished(data, unhurried, tmp_path_factory):
    """The folder of an undisturbed study. Only copies (`again`) may be changed."""
    out = tmp_path_factory.mktemp("studies") / "finished"
    calls = count(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "timed_runs", lambda *_: [[(float(next(calls)), 1.0)]])
        run_study(study(data), out, console=QUIET)
    return out


@pytest.fixture
def again(finished, tmp_path):
    """A copy of the finished study."""
    return Path(shutil.copytree(finished, tmp_path / "again"))


def files_named(out, name):
    return sorted((out / "cache").rglob(name))


def test_the_table_has_a_row_for_each_cell_with_published_numbers(finished, data):
    table = pd.read_parquet(finished / "results.parquet")
    assert list(zip(table["axis"], table["recovery"], strict=True)) == [
        ("original", "original"),
        *(("depth", "none"), ("depth", "sft+hidden")),
        *(("width", "none"), ("width", "sft+hidden")),
    ]
    assert set(table["status"]) == {"done"}
    assert {*table["original"][1:]} == {table["result"][0]}
    assert list(table["achieved_ratio"][3:]) == pytest.approx([0.4, 0.4], abs=0.01)
    assert list(table["steps"][1:]) == [0, 2, 0, 2]
    assert table["perplexity"].nunique() == 5  # random models answer nothing, but differ in this
    assert table["backbone_params"][1:].max() < table["backbone_params"][0]
    assert table["prefill_ms"].nunique() == 3  # of five measurements, each another number
    assert table.groupby("backbone_params")["prefill_ms"].nunique().max() == 1
    assert (finished / "results.csv").read_text().count("\n") == 1 + len(table)
    assert "not measured" in (finished / "claims.md").read_text()
    row = ReferenceRow(axis="width", ratio=0.4, recovery="none", retention=79.9)
    config = replace(study(data), reference=Reference(source="the paper", rows=(row,)))
    _, schedule = prepared(config, print)
    table = results_table(config, schedule, Cache(finished))
    given = table[table["reference"].notna()]
    assert list(given["axis"]) == ["width"]
    assert list(given["reference"]) == [79.9]
    assert list(given["reference_source"]) == ["the paper"]


@pytest.mark.slow
def test_models_go_and_results_stay(finished, data, tmp_path):
    assert files_named(finished, "model.safetensors") == []
    assert len(files_named(finished, "result.json")) == 5
    assert len(files_named(finished, "history.json")) == 2
    assert list((finished / "work").iterdir()) == []
    config = study(data, {"axis": "depth"}, keep_checkpoints=True)
    run_study(config, tmp_path / "out", console=QUIET)
    assert len(files_named(tmp_path / "out", "model.safetensors")) == 2


def test_a_finished_study_does_nothing_but_tidy_up(again, data, monkeypatch):
    before, text = pd.read_parquet(again / "results.parquet"), (again / "results.csv").read_text()
    outcome = files_named(again, "result.json")[0].parent
    left = again / "work" / f"{outcome.parent.name}-{outcome.name}"  # of a kill before tidying up
    left.mkdir()
    done = watch_work(monkeypatch)
    table = run_study(study(data), again, console=QUIET)
    assert not done
    pd.testing.assert_frame_equal(table, before, check_dtype=False)
    assert list(left.parent.iterdir()) == []
    (again / "study.yaml").write_text((again / "study.json").read_text())
    run_study(again / "study.yaml", again, console=QUIET)  # from the file in its own folder
    assert (again / "results.csv").read_text() == text


@pytest.mark.slow
def test_one_more_ratio_or_recovery_does_only_what_is_new(again, data, monkeypatch, capsys):
    """A log has a line where a stage begins and one where it ends, and none of what is inside."""
    done, log = watch_work(monkeypatch), StringIO()
    grid = {"axis": "depth", "ratio": [0.4, 0.2]}
    table = run_study(study(data, grid), again, console=Console(file=log))
    assert done == {"prune": 1, "recover": 1, "evaluate": 2}
    assert len(table) == 1 + 4
    ends = [line for line in log.getvalue().splitlines() if line.endswith(" left")]
    begins = [line for line in log.getvalue().splitlines() if line not in ends]
    assert len(ends) == len(begins) == 4
    assert all(end.startswith(f"{begin}: ") for begin, end in zip(begins, ends, strict=True))
    assert " of " not in capsys.readouterr().err
    done.clear()  # one more recovery prunes again but scores nothing
    grid = {"axis": "depth", "recovery": ["none", "sft+hidden", "sft"]}
    run_study(study(data, grid), again, console=QUIET)
    assert done == {"prune": 1, "recover": 1, "evaluate": 1}


def test_a_dry_run_counts_and_leaves_nothing(again, data, tmp_path):
    kinds = ("calibrate", "prune", "recover", "evaluate")

    def counted(*counts):
        return dict(zip(kinds, counts, strict=True))

    fresh = forecast(study(data), tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    assert dict(fresh.stages) == counted((1, 0), (2, 0), (2, 0), (5, 0))
    assert set(fresh.basis.values()) == {"rough"}
    more = forecast(study(data, {"ratio": [0.4, 0.2]}), again)
    assert dict(more.stages) == counted((0, 1), (2, 2), (2, 2), (4, 5))
    assert dict(more.basis) == dict.fromkeys(kinds[1:], "measured")
    nothing = forecast(study(data), again)
    assert nothing.seconds == 0
    assert not any(nothing.cells.values())


def test_other_samples_or_other_files_are_other_work(data, tmp_path):
    def names(config):
        return {stage.name for stage in prepared(config, print)[1].stages()}

    model = folders.copied("text", tmp_path / "model")
    first = names(study(data, {"model": str(model)}))
    assert names(study(data, {"model": str(model)})) == first
    assert len(names(study(data, {"model": str(model), "seed": 1})) & first) == 1  # the original
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert not names(study(data, {"model": str(model)})) & first
    found, words = [], tmp_path / "words.txt"
    for text in ("one", "one", "two"):
        words.write_text(text)
        prune = {"samples": 4, "vocab_size": "auto", "vocab_text": str(words)}
        found.append(names(study(data, prune=prune)))
    assert found[0] == found[1]
    assert len(found[0] & found[2]) == 1  # the original


def test_a_change_anywhere_in_a_folder_is_noticed(tmp_path):
    """One byte of a large file in its middle, with the time of the file set back."""
    file, found = tmp_path / "data" / "train" / "rows.arrow", []
    file.parent.mkdir(parents=True)
    with file.open("wb") as handle:
        handle.truncate(100 * 2**20)
    for place in (None, 2**26 + 2**19, 50 * 2**20 + 7):
        if place is not None:
            with file.open("r+b") as handle:
                handle.seek(place)
                handle.write(b"x")
        os.utime(file, (0, 0))
        found += [documents.identity_of_files("data", str(tmp_path / "data")) for _ in range(2)]
    assert found[::2] == found[1::2]
    assert len(set(found)) == 3


@pytest.mark.slow
def test_mended_code_is_other_work(data, tmp_path, monkeypatch):
    """The version and the source itself name every stage; comments of other files do not."""
    copy = Path(shutil.copytree(Path(documents.__file__).parents[1], tmp_path / "slimvlm"))
    shutil.rmtree(copy / "demo" / "assets")
    code = "from slimvlm.core.documents import identity_of_code; print(identity_of_code())"
    found = []
    for text in ("", "", "# mended\n"):
        with (copy / "scoring" / "obs.py").open("a") as file:
            file.write(text)
        found.append(in_python(code, env={**os.environ, "PYTHONPATH": str(tmp_path)}))
    assert found[0] == found[1] != found[2]
    names = []
    for version in ("slimvlm 1", "slimvlm 2"):
        monkeypatch.setattr(documents, "identity_of_code", lambda version=version: version)
        names.append({stage.name for stage in prepared(study(data), print)[1].stages()})
    assert not names[0] & names[1]


def test_answers_and_general_text_are_part_of_what_is_asked(data, tmp_path, monkeypatch):
    task = {"name": "mine", "data": "q.jsonl", "prompt": "{q}", "answer": "a"}
    (tmp_path / "mine.yaml").write_text(json.dumps(task))
    config, names = study(data, tasks=str(tmp_path / "mine.yaml")), []
    for text, answer in (("a", "red"), ("b", "red"), ("b", "no")):
        (tmp_path / "q.jsonl").write_text(json.dumps({"q": "Which?", "a": answer}))
        monkeypatch.setattr(schedule, "identity_of_general_text", lambda text=text: text)
        names.append({s.kind: s.name for s in prepared(config, print)[1].stages()})
    first, other_text, other_answer = names
    assert first["prune"] != other_text["prune"]
    assert other_text["prune"] == other_answer["prune"]
    assert other_text["evaluate"] != other_answer["evaluate"]


def test_cells_that_come_to_the_same_are_one_and_others_are_told_apart(data, tmp_path, capsys):
    """Axis depth removes no widths; a ratio of 12.4 % is not 12 %; a data type has own times."""
    grid = {"axis": "depth", "recovery": "none", "allocation": ["uniform", "balanced"]}
    (cell,) = prepared(study(data, grid), print)[1].cells
    assert cell.cell.values()["allocation"] == "uniform"
    grid = {"axis": "width", "recovery": "none", "ratio": [0.4, 0.404]}
    grid["allocation"] = ["uniform", "balanced"]
    assert len(forecast(study(data, grid), tmp_path / "out").cells) == 4
    capsys.readouterr()
    prepared(study(None, {"axis": "width", "recovery": "none"}), print)
    assert "no --data: calibrating on the demo's samples" in capsys.readouterr().out


@pytest.mark.slow
def test_the_table_grows_while_the_study_runs(data, tmp_path, monkeypatch):
    measured = []

    def looks(stage):
        if (tmp_path / "results.csv").exists():
            table = pd.read_csv(tmp_path / "results.csv")
            measured.append(int((table["status"] == "done").sum()))

    watch_work(monkeypatch, looks)
    run_study(study(data, {"recovery": "none"}), tmp_path, console=QUIET)
    assert set(measured) == {1, 2}


def test_a_study_needs_a_folder(data, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match=r"file' is a file, and a study needs a folder"):
        run_study(study(data, {"recovery": "none"}), tmp_path / "file", console=QUIET)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_named_demo_is_not_the_demo_s_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = {name: identity_of_data(name) for name in ("demo", "mine")}
    for name in before:
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.jsonl").write_text("{}")
    assert identity_of_data("demo") == before["demo"]
    assert identity_of_data("mine") != before["mine"]


def test_what_fails_is_said_and_stops_nothing_else(data, tmp_path, monkeypatch):
    def fails(stage):
        if stage.kind == "prune" and "depth" in stage.label:
            raise NumericalError("weights are NaN\nin layer 1")

    config = study(data, {"recovery": "none"})
    with monkeypatch.context() as patch:
        watch_work(patch, fails)
        table = run_study(config, tmp_path / "out", console=QUIET)
    assert list(table["status"]) == ["done", "failed", "done"]
    assert table["failed"][1] == "prune: NumericalError: weights are NaN in layer 1"
    done = watch_work(monkeypatch)
    table = run_study(config, tmp_path / "out", console=QUIET)
    assert set(table["status"]) == {"done"}
    assert table["failed"].isna().all()
    assert done == {"prune": 1, "evaluate": 1}


def test_a_study_of_which_nothing_could_be_measured_is_reported(
    data, tmp_path, capsys, monkeypatch
):
    """As with one question, which has no other one to take pictures from for its floor."""

    def fails(stage):
        if stage.kind == "evaluate":
            raise ConfigError("floors: question 'a' finds no other images")

    watch_work(monkeypatch, fails)
    config = study(data, {"recovery": "none", "axis": "depth"}, limit=1)
    table = run_study(config, tmp_path / "out", console=QUIET)
    assert set(table["status"]) == {"failed"}
    assert "other images" in str(table["failed"][0])
    for as_json in (False, True):
        print_study(table, as_json)
        assert "failed" in capsys.readouterr().out


@pytest.mark.slow
def test_a_stopped_study_goes_on_to_the_same_table(finished, data, tmp_path, monkeypatch):
    def stops(stage):
        if stage.kind == "recover":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        watch_work(patch, after=stops)
        with pytest.raises(KeyboardInterrupt):
            run_study(study(data), tmp_path / "out", console=QUIET)
    statuses = sorted(pd.read_parquet(tmp_path / "out" / "results.parquet")["status"])
    assert statuses == ["done", "done", "open", "open", "open"]
    table = run_study(study(data), tmp_path / "out", console=QUIET)
    expected = pd.read_parquet(finished / "results.parquet")
    pd.testing.assert_frame_equal(stable(table), stable(expected), check_dtype=False)
