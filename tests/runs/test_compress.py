"""The whole way in one folder: what it leaves, how it goes on, what it refuses."""

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from slimvlm import cli
from slimvlm.cli import parsed
from slimvlm.core.errors import ConfigError
from slimvlm.core.options import CompressConfig, RecoverConfig
from slimvlm.core.progress import silent
from slimvlm.data.read import load_samples
from slimvlm.evaluation.on_data import DataResult, evaluate_data
from slimvlm.evaluation.results import Result
from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.load import load
from slimvlm.planning.plan import Plan
from slimvlm.runs import compress as compression
from slimvlm.runs import stages
from slimvlm.runs.compress import (
    STAGES,
    TIMES_FILE,
    Compressed,
    compress,
    compress_command,
    option_values,
    read_config,
    read_held_out,
    read_times,
    results_of,
)
from slimvlm.runs.recipe import decide
from slimvlm.runs.report import read_record, report_html
from slimvlm.scoring.unit_scores import Scores
from tests import tiny_folder as folders
from tests.contract.test_docs import first_cells
from tests.handmade import Stopped, contents, stops
from tests.tables import tables
from tests.tiers import tiered

TABLES = tables(__file__)

pytestmark = pytest.mark.usefixtures("unhurried")

RECOVER = RecoverConfig(
    **{"train": "lora", "max_steps": 3, "batch_size": 2, "learning_rate": 5e-3},
    **{"lora_rank": 4, "bf16": False, "trainer": {"save_steps": 2}, "lora": {"lora_alpha": 8}},
)


MODEL = str(folders.folder("llava"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return folders.write_llava_data(tmp_path_factory.mktemp("data"))


def request_for(data, **changes):
    values = {
        **{"ratio": 0.3, "axis": "both", "criterion": ("block_influence", "taylor")},
        **{"data": None if data is None else str(data), "allocation": "uniform", "samples": 4},
        **{"recover": RECOVER, "tasks": "presence"},
        "limit": None if changes.get("tasks", "") is None else 2,
    }
    model = changes.pop("model", str(folders.folder("llava")))
    return model, CompressConfig(**{**values, **changes})


def pruning(data=None, **changes):
    """The shortest request: nothing is trained or asked."""
    shortest = {"criterion": (), "axis": None, "recover": None, "tasks": None, "limit": None}
    return request_for(data, **{**shortest, **changes})


def answers_in(folder):
    """What the models said and scored; times differ from run to run."""
    files = [f for f in sorted((folder / "results").iterdir()) if f.name != TIMES_FILE]
    on_data = {f.name: DataResult.load(f).samples for f in files if f.name.startswith("data-")}
    return on_data | {f.name: Result.load(f).tasks for f in files if f.name not in on_data}


@pytest.fixture(scope="module")
def finished(data, unhurried, tmp_path_factory):
    """A run that nobody interrupted. Tests must not change it."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    said = []
    assert list(compress(*request_for(data), out, say=said.append).results) == list(STAGES)
    assert any("layers" in line for line in said)
    return out


@pytest.fixture(scope="module")
def short(unhurried, tmp_path_factory):
    """The shortest run: the demo calibrates, nothing is trained. Tests must not change it."""
    out, said = tmp_path_factory.mktemp("runs") / "run", []
    compress(*pruning(), out, say=said.append)
    assert "no --data: calibrating on the demo's samples" in said
    assert any(re.match("axis width: .*arXiv", line) for line in said)
    assert not (out / "history.json").exists()
    assert Plan.load(out / "plan.json").axis == "width"
    return out


def stopped(asked, out, name="prune_", force=False):
    """Begin a run that goes down before a stage."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages if hasattr(stages, name) else compression, name, stops)
        with pytest.raises(Stopped):
            compress(*asked, out, force, say=silent)
    return out


def test_a_run_that_python_began_goes_on_by_its_file(data, tmp_path):
    out = stopped(request_for(data, seed=3), tmp_path / "run")
    stopped(read_config(out / "run.yaml"), out)  # not refused


@pytest.mark.slow
def test_the_summary_says_how_the_model_is_loaded(short, unhurried, tmp_path):
    compress(*pruning(axis="width", protect=(1, 0)), tmp_path / "run", say=silent)
    said = [(run / "summary.md").read_text() for run in (short, tmp_path / "run")]
    assert ["loads it with `trust_remote_code=True`." in text for text in said] == [False, True]


def test_a_run_leaves_what_repeats_it_and_the_planned_model(finished, data):
    found = {path.name for path in finished.iterdir()}
    kept = ("run.yaml", "plan.json", "scores", "results", "history.json", "checkpoint")
    assert found >= {*kept, "summary.md"}
    assert not found & {"pruned", "training"}
    assert found <= {name.rstrip("/") for name in first_cells("The folder of a run")}
    stored = yaml.safe_load((finished / "run.yaml").read_text())
    assert (stored["ratio"], stored["data"]) == (0.3, str(data))
    assert stored["recover"]["lora_rank"] == 4
    files = [f"{stage}.json" for stage in STAGES]
    assert set(answers_in(finished)) == {*files, *(f"data-{name}" for name in files)}
    for name in ("block_influence", "taylor"):
        assert Scores.load(finished / "scores" / name).criterion == name
    summary = (finished / "summary.md").read_text()
    assert Plan.load(finished / "plan.json").summary() in summary
    assert "AVG" in summary
    plan = Plan.load(finished / "plan.json")
    assert plan.ratio == pytest.approx(0.3, abs=0.01)
    model, processor = load(finished / "checkpoint")
    assert read_anatomy(model) == read_anatomy(load(finished)[0]) == plan.after
    assert processor is not None
    recovered = Result.load(finished / "results" / "recovered.json")
    assert recovered.backbone_params == plan.after.backbone_params
    history = json.loads((finished / "history.json").read_text())
    drawn, test = [sample.id for sample in load_samples(data)], read_held_out(finished)["recovered"]
    assert history["sample_ids"] == drawn[4:10]
    assert [each.id for each in test.samples] == drawn[10:]


def test_a_run_says_how_fast_and_how_good_its_model_is_beside_the_original(finished, data):
    times = read_times(finished)
    assert times is not None
    for file in ("summary.md", "checkpoint/README.md"):
        assert str(times) in (finished / file).read_text()
    for stage in STAGES:
        result = Result.load(finished / "results" / f"{stage}.json")
        timed = times.original if stage == "original" else times.pruned
        assert {name: getattr(result, name) for name in vars(timed)} == vars(timed)
    found, unseen = read_held_out(finished), load_samples(data)[-2:]
    assert list(found) == list(STAGES)
    for result in found.values():
        assert [each.id for each in result.samples] == [each.id for each in unseen]
    original, recovered = load(folders.folder("llava")), load(finished)
    again = found["recovered"].figures
    expected = evaluate_data(*recovered, unseen, original[0]).figures
    assert again.agreement == expected.agreement
    assert again.divergence.value == pytest.approx(expected.divergence.value, abs=1e-5)
    loss = evaluate_data(*original, unseen).figures.loss.value
    assert found["original"].figures.loss.value == pytest.approx(loss, abs=1e-5)
    assert not (finished / "said.safetensors").exists()
    page = report_html(read_record(finished))
    assert "Same next token" in page
    files = [finished / "summary.md", finished / "checkpoint" / "README.md"]
    for text in (page, *(file.read_text() for file in files)):
        assert f"{again.loss:.3f}" in text
        assert "KL divergence from the original" in text
    assert str(data.parent) not in text, "a card may be published"


def fails(error):
    def fail(*_):
        raise error

    return fail


@pytest.mark.parametrize(
    ("name", "replaced", "told"),
    tiered(
        [
            ("free_memory", lambda _: 1000, r"not measured: .* exceed the 0\.0 MiB of free memory"),
            ("paired_times", fails(ConfigError("no template")), "not measured: no template"),
            (
                "paired_times",
                fails(RuntimeError("no kernel")),
                r"measured: RuntimeError\('no kernel",
            ),
            (
                *("paired_times", fails(torch.OutOfMemoryError("2 GiB more"))),
                r"both models do not fit on cpu together \(2 GiB",
            ),
        ],
        lambda *case: "no kernel" in case[-1],
    ),
)
def test_a_run_goes_on_without_times_and_says_why(
    name, replaced, told, data, tmp_path, monkeypatch
):
    asked, said = request_for(data, recover=None, axis="depth", tasks=None), list[str]()
    monkeypatch.setattr(compression, name, replaced)
    compress(*asked, tmp_path / "run", say=said.append)
    assert any(re.search(told, line) for line in said)
    assert read_times(tmp_path / "run") is None


def test_a_stopped_run_repeats_no_finished_stage(data, tmp_path, monkeypatch):
    out = stopped(request_for(data), tmp_path / "run", "recover_")
    for name in ("walk", "prune_"):
        monkeypatch.setattr(stages, name, stops)
    path = out / "results" / "pruned.json"
    replace(Result.load(path), prefill_ms=123.0).save(path)
    results = compress(*request_for(data), out, say=silent).results
    # training changes no shape
    assert [results[stage].prefill_ms for stage in results] == [2.25, 123.0, 123.0]


def test_a_finished_run_is_refused_and_its_results_are_those_of_the_same_request(
    finished, data, tmp_path
):
    before = contents(finished)
    with pytest.raises(ConfigError, match=r"finished' exists.*--force"):
        compress(*request_for(data), finished, say=silent)
    assert contents(finished) == before
    assert list(results_of(*request_for(data), finished)) == list(STAGES)
    assert results_of(*request_for(data, ratio=0.2), finished) is None
    out = stopped(request_for(data, tasks=None), tmp_path / "stopped")
    assert results_of(*request_for(data, tasks=None), out) is None
    assert results_of(*request_for(data), tmp_path / "nothing") is None


def test_another_request_or_other_data_do_not_go_on_from_it(data, tmp_path):
    own = Path(shutil.copytree(data.parent, tmp_path / "data")) / data.name
    out = stopped(request_for(own, tasks=None), tmp_path / "run")
    before = contents(out)
    with pytest.raises(ConfigError, match="exists"):
        compress(*request_for(own, tasks=None, ratio=0.2), out, say=silent)
    own.write_text(json.dumps(json.loads(own.read_text())[::-1]))
    with pytest.raises(ConfigError, match="exists"):
        compress(*request_for(own, tasks=None), out, say=silent)
    assert contents(out) == before
    rows, task, words = (tmp_path / name for name in ("q.jsonl", "mine.yaml", "words.txt"))
    row = {"name": "mine", "data": rows.name, "prompt": "{q}", "answer": "a"}
    task.write_text(json.dumps(row))
    for number, file in enumerate((rows, words)):
        rows.write_text('{"q": "Which?", "a": "red"}')
        words.write_text("one text")
        asked = pruning(own, tasks=str(task), vocab_size="auto", vocab_text=str(words))
        out = stopped(asked, tmp_path / str(number))
        file.write_text(file.read_text().replace("red", "blue").replace("one", "another"))
        with pytest.raises(ConfigError, match="exists: it was begun"):
            compress(*asked, out, say=silent)


@pytest.mark.slow
def test_a_run_that_was_killed_while_it_cleaned_up_leaves_nothing(data, tmp_path, monkeypatch):
    out, honest = tmp_path / "run", shutil.rmtree

    def removed(folder, *args, **kwargs):
        if Path(folder).name == "training":
            raise Stopped
        honest(folder, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(compression.shutil, "rmtree", removed)
        with pytest.raises(Stopped):
            compress(*request_for(data), out, say=silent)
    compress(*request_for(data), out, say=silent)
    assert not {"pruned", "training", "walk"} & {path.name for path in out.iterdir()}


@pytest.mark.parametrize("text", ["{", "[]", "ratio: 0.3"])
def test_a_folder_that_is_no_run_is_refused(text, data, tmp_path):
    out = tmp_path / "mine"
    out.mkdir()
    (out / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"mine' exists"):
        compress(*request_for(data), out, say=silent)
    assert contents(out) == {"run.yaml": text.encode()}


@pytest.mark.slow
def test_what_force_replaces_stays_until_the_new_run_is_whole(short, data, tmp_path, monkeypatch):
    out = Path(shutil.copytree(short, tmp_path / "run"))
    (out / "mine").write_text("")
    before = contents(out)
    request = request_for(data, ratio=0.2, tasks=None)
    for stage in ("prune_", "finish"):
        stopped(request, out, stage, force=True)
        assert contents(out) == before
    other = stopped(pruning(data), tmp_path / "other", force=True)
    assert {path.name for path in tmp_path.iterdir()} == {"run", ".run.partial", ".other.partial"}
    compress(*pruning(data), other, say=silent)  # what the stopped one left goes, too
    said = []
    monkeypatch.setattr(stages, "prune_", stops)  # done already
    compress(*request, out, force=True, say=said.append)
    assert any(line.startswith("resuming") for line in said)
    assert read_config(out / "run.yaml")[1].ratio == 0.2
    assert Plan.load(out / "plan.json").ratio == pytest.approx(0.2, abs=0.01)
    assert not (out / "mine").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"run", "other"}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "learns"), [("llava", "projector"), ("text", "lora")])
def test_what_learns_by_default_is_there(kind, learns, tmp_path):
    """The chart trains the projector at small ratios: text models have none, texts reach none."""
    data = folders.write_llava_data(tmp_path / "data", count=24, pictures=False)
    model, given = str(folders.folder(kind)), {"ratio": 0.15, "data": str(data), "samples": 8}
    config = CompressConfig(**given)
    chosen = decide(model, config, read_anatomy(load(model)[0])).recover
    assert chosen.train == learns
    for recover in (chosen, replace(chosen, train="projector")):
        asked = replace(config, recover=replace(recover, max_steps=1))
        if recover.train == "lora":
            compress(model, asked, tmp_path / "run", say=silent)
        else:
            with pytest.raises(ConfigError, match=r"has no projector|needs images"):
                compress(model, asked, tmp_path / "no", say=silent)
            assert not (tmp_path / "no").exists()


def test_a_small_learning_rate_survives_the_run_s_own_file(tmp_path):
    config = CompressConfig(ratio=0.3, data="d.json", recover={"learning_rate": 5e-5})  # 5e-05
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(option_values("m", config)))
    assert read_config(path)[1].recover.learning_rate == 5e-5


def test_a_baseline_saves_asking_again(finished, data, tmp_path, monkeypatch):
    asked = []
    honest = compression.evaluate_all

    def counts(*args, **kwargs):
        asked.append(args[3])
        return honest(*args, **kwargs)

    monkeypatch.setattr(compression, "evaluate_all", counts)
    baseline = finished / "results" / "original.json"
    config = request_for(data, recover=None, baseline=str(baseline))
    run = compress(*config, tmp_path / "run", say=silent)
    assert asked == ["pruned"]
    assert run["original"] == Result.load(baseline)


LORA = RecoverConfig(train="lora", fraction=0.05, trainer={"weight_decay": 0.1})
FULL = CompressConfig(
    **{"ratio": 0.25, "axis": "both", "criterion": ("block_influence", "taylor"), "limit": 3},
    **{"data": "my data.json", "protect": (2, 1), "tasks": "name", "recover": LORA},
)


# As Python is typed.


def test_a_run_of_options_alone_gives_the_model_the_processor_and_itself(
    data, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    model = str(folders.folder("llava"))
    given = {"ratio": 0.3, "axis": "depth", "data": data, "samples": 4, "recover": "none"}
    with monkeypatch.context() as patch:
        patch.setattr(Compressed, "load", stops)  # the model is read only on demand
        run = compress(model, out="run", say=silent, **given)
    assert read_config("run/run.yaml")[1] == run.config
    found, processor, same = run
    assert same is run
    assert read_anatomy(found) == run.plan.after
    assert processor.tokenizer.get_vocab() == load(model)[1].tokenizer.get_vocab()
    assert (run.folder, run.results) == (Path("run"), {})
    assert (run.held_out, run.times) == (read_held_out(run.folder), read_times(run.folder))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"ratio": 0.3}, "needs out"), ({"out": "run", "ratoi": 0.3}, "'ratoi' is unknown")),
        ({"out": "run", "ratio": 0.3, "config": FULL}, "either config or options"),
        ({"out": "run", "ratio": 0.3, "data": "d", "recover": "half"}, "recover: train 'half'"),
        ({"out": "run", "ratio": 0.3, "recover": "lora"}, "train 'lora' needs --data"),
        (
            {"out": "run", "ratio": 0.3, "data": "d", "recover": True},
            "recover: True must be options",
        ),
        ({"out": "run", "ratio": "much"}, "ratio 'much' must be a number"),
    ],
)
def test_a_call_that_cannot_be_meant_is_refused_in_one_line(
    options, message, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message) as failure:
        compress("demo", say=silent, **options)
    assert "\n" not in str(failure.value)
    assert list(tmp_path.iterdir()) == []


# A configuration as a command and as a file: both give it back.

CONFIGS = [
    FULL,
    replace(FULL, recover=None),
    CompressConfig(ratio=0.3, axis="width", criterion=("activation",)),
    CompressConfig(ratio=0.5, axis="depth", data="demo", units=("neuron",)),
    CompressConfig(
        **{"ratio": 0.5, "axis": "depth", "data": "demo", "seed": 3, "allocation": "balanced"},
        **{"tasks": "name,pope", "task_folder": "mine", "batch_size": 4, "floors": True},
        recover=RecoverConfig(train="full", loss="sft", batch_size=2),
    ),
]


@pytest.fixture
def compressed(monkeypatch):
    """What `compress` was called with last."""
    seen = []

    def record(model, config, out, *rest):
        seen[:] = model, config, out
        return SimpleNamespace(results={}, held_out={}, times=None)

    monkeypatch.setattr("slimvlm.runs.compress.compress", record)
    return seen


@pytest.mark.parametrize("config", CONFIGS)
def test_a_command_and_a_file_give_the_configuration_back(
    config, tmp_path, compressed, monkeypatch
):
    """An option without a flag makes the command read the run's own file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out folder").mkdir()
    path = tmp_path / "out folder" / "run.yaml"
    path.write_text(yaml.safe_dump(option_values("my model", config)))
    command = shlex.split(compress_command("my model", config, "out folder"))
    has_no_flag = config.floors or bool(config.recover.trainer)
    assert command[:3] == ["slimvlm", "compress", "--config" if has_no_flag else "my model"]
    cli.main(command[1:])
    assert compressed == ["my model", config, Path("out folder")]
    assert read_config(path) == ("my model", config)
    cli.main(["compress", "--config", str(path), "--out", "out"])
    assert compressed == ["my model", config, Path("out")]


def test_the_command_line_comes_on_top_of_a_file(tmp_path, compressed):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(option_values("my model", FULL)))
    cli.main(["compress", "other", f"--config={path}", "--ratio", "0.4", "--out", "out"])
    assert compressed[:2] == ["other", replace(FULL, ratio=0.4)]
    path.write_text(yaml.safe_dump({"model": MODEL, "ratio": 0.1, "data": "d.json"}))
    cli.main(["compress", "--config", str(path), "--out", "out"])
    assert compressed[1].recover.train is None  # the chart decides


@pytest.mark.parametrize(("text", "message"), TABLES["wrong_files"])
def test_a_wrong_file_is_named(text, message, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as failure:
        parsed("compress", ["--config", str(path)])
    assert "run.yaml" in str(failure.value)
