"""The whole way in one folder: what it leaves, how it goes on, what it refuses."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jaxtyping
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from slimvlm import cli
from slimvlm.cli import parsed
from slimvlm.core.errors import ConfigError, SlimError
from slimvlm.core.options import CompressConfig, PruneConfig, RecoverConfig
from slimvlm.evaluation.on_data import DataResult
from slimvlm.evaluation.results import Result
from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.load import load
from slimvlm.planning.plan import Plan
from slimvlm.runs import compress as compression
from slimvlm.runs import request as requests
from slimvlm.runs import stages
from slimvlm.runs.compress import (
    TIMES_FILE,
    compress,
    compress_command,
    config_text,
    read_config,
    read_times,
    results_of,
)
from slimvlm.scoring.unit_scores import Scores
from tests import tiny_folder as folders

pytestmark = pytest.mark.usefixtures("unhurried")

RECOVER = RecoverConfig(
    train="lora",
    max_steps=3,
    batch_size=2,
    learning_rate=5e-3,
    lora_rank=4,
    bf16=False,
    trainer={"save_steps": 2},
    lora={"lora_alpha": 8},
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.write_llava_data(tmp_path_factory.mktemp("data"))


class Asked(NamedTuple):
    """What `compress` is asked."""

    model: str
    config: CompressConfig


def request_for(data: Path | None, **changes: Any) -> Asked:
    values: dict[str, Any] = {
        "ratio": 0.3,
        "axis": "both",
        "criterion": ("block_influence", "taylor"),
        "data": None if data is None else str(data),
        "allocation": "uniform",
        "samples": 4,
        "recover": RECOVER,
        "tasks": "presence",
        "limit": 2,
    }
    model = changes.pop("model", str(folders.folder("llava")))
    return Asked(model, CompressConfig(**{**values, **changes}))


def silent(line: str) -> None:
    """Nobody listens."""


def weights_in(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "checkpoint" / "model.safetensors")


def answers_in(folder: Path) -> dict[str, Any]:
    """What the models said and scored; times differ from run to run."""
    files = [f for f in sorted((folder / "results").iterdir()) if f.name != TIMES_FILE]
    on_data = {f.name: DataResult.load(f).samples for f in files if f.name.startswith("data-")}
    return on_data | {f.name: Result.load(f).tasks for f in files if f.name not in on_data}


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def finished(data: Path, unhurried: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody interrupted. Tests must not change it."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    said: list[str] = []
    results = compress(*request_for(data), out, say=said.append)
    assert list(results) == ["original", "pruned", "recovered"]
    assert any("layers" in line for line in said)
    return out


def test_a_run_leaves_what_repeats_and_explains_it(finished: Path, data: Path) -> None:
    found = {path.name for path in finished.iterdir()}
    assert found >= {
        *("config.json", "plan.json", "scores", "results", "history.json"),
        *("checkpoint", "summary.md"),
    }
    assert not found & {"pruned", "training"}
    stored = json.loads((finished / "config.json").read_text())
    assert stored["ratio"] == 0.3
    assert stored["data"] == str(data)
    assert stored["recover"]["lora_rank"] == 4
    files = [f"{stage}.json" for stage in ("original", "pruned", "recovered")]
    assert set(answers_in(finished)) == {*files, *(f"data-{name}" for name in files)}
    for name in ("block_influence", "taylor"):
        assert Scores.load(finished / "scores" / name).criterion == name
    summary = (finished / "summary.md").read_text()
    assert Plan.load(finished / "plan.json").summary() in summary
    assert "AVG" in summary


def test_the_checkpoint_is_the_planned_model(finished: Path) -> None:
    plan = Plan.load(finished / "plan.json")
    assert plan.ratio == pytest.approx(0.3, abs=0.01)
    model, processor = load(finished / "checkpoint")
    assert read_anatomy(model) == plan.after
    assert processor is not None
    assert Result.load(finished / "results" / "recovered.json").backbone_params == (
        plan.after.backbone_params
    )


def test_the_run_folder_can_be_loaded_as_a_model(finished: Path) -> None:
    model, _ = load(finished)
    assert read_anatomy(model) == Plan.load(finished / "plan.json").after


def test_recovery_learns_from_other_samples_than_calibration(finished: Path) -> None:
    history = json.loads((finished / "history.json").read_text())
    assert history["sample_ids"] == [f"s{i}" for i in range(4, 10)]
    report = DataResult.load(finished / "results" / "data-recovered.json")
    assert [each.id for each in report.samples] == ["s10", "s11"]


class Stopped(Exception):
    """The machine goes down."""


def stops(*args: Any, **kwargs: Any) -> Any:
    raise Stopped


@pytest.mark.parametrize(
    ("stage", "after"),
    [
        ("walk", True),
        ("prune_", True),
        ("save", True),
        ("recover_", True),
        ("finish", False),
        ("finish", True),
    ],
)
def test_a_stopped_run_goes_on_to_the_same_end(
    stage: str,
    after: bool,
    finished: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    home = stages if hasattr(stages, stage) else compression
    honest = getattr(home, stage)

    def stops(*args: Any, **kwargs: Any) -> Any:
        if after:
            honest(*args, **kwargs)
        raise Stopped

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(home, stage, stops)
        with pytest.raises(Stopped):
            compress(*request_for(data), out, say=silent)
    if stage == "finish" and after:
        with pytest.raises(ConfigError, match="exists"):
            compress(*request_for(data), out, say=silent)
        return
    assert not (out / "summary.md").exists()
    compress(*request_for(data), out, say=silent)
    assert {path.name for path in out.iterdir()} == {path.name for path in finished.iterdir()}
    assert Plan.load(out / "plan.json") == Plan.load(finished / "plan.json")
    found, expected = weights_in(out), weights_in(finished)
    assert list(found) == list(expected)
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    assert answers_in(out) == answers_in(finished)


def test_a_run_says_how_fast_its_model_is_beside_the_original(finished: Path) -> None:
    times = read_times(finished)
    assert times is not None
    assert str(times) in (finished / "summary.md").read_text()
    assert str(times) in (finished / "checkpoint" / "README.md").read_text()
    for stage in ("original", "pruned", "recovered"):
        result = Result.load(finished / "results" / f"{stage}.json")
        timed = times.original if stage == "original" else times.pruned
        assert {name: getattr(result, name) for name in vars(timed)} == vars(timed)


def test_times_are_not_paired_where_the_original_does_not_fit_as_well(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    asked = request_for(data, recover=None, axis="depth", criterion=("block_influence",))
    with monkeypatch.context() as patch:
        patch.setattr(compression, "free_memory", lambda _: 1000)
        compress(*asked, tmp_path / "small", say=said.append)
    assert any(re.search(r"not paired: .* exceed 0\.0 MiB of memory", line) for line in said)
    assert read_times(tmp_path / "small") is None


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ConfigError("no template"), "times are not paired: no template"),
        (RuntimeError("no kernel"), "times are not paired: RuntimeError('no kernel')"),
        (torch.OutOfMemoryError("2 GiB more"), "both models do not fit on cpu together (2 GiB"),
    ],
)
def test_a_run_goes_on_without_times_and_says_why(
    error: Exception, told: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise error

    asked, said = request_for(data, recover=None, axis="depth", tasks=None), list[str]()
    monkeypatch.setattr(compression, "paired_times", fails)
    compress(*asked, tmp_path / "run", say=said.append)
    assert any(told in line for line in said)
    assert read_times(tmp_path / "run") is None


def test_a_stopped_run_repeats_no_finished_stage(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(stages, "recover_", stops)
        with pytest.raises(Stopped):
            compress(*request_for(data), tmp_path / "run", say=silent)
    monkeypatch.setattr(stages, "walk", stops)
    monkeypatch.setattr(stages, "prune_", stops)
    path = tmp_path / "run" / "results" / "pruned.json"
    pruned = replace(Result.load(path), prefill_ms=123.0)
    pruned.save(path)
    results = compress(*request_for(data), tmp_path / "run", say=silent)
    # training changes no shape
    assert [results[stage].prefill_ms for stage in results] == [2.25, 123.0, 123.0]


def test_a_finished_run_is_refused(finished: Path, data: Path) -> None:
    before = contents(finished)
    with pytest.raises(ConfigError, match=r"finished' exists.*--force"):
        compress(*request_for(data), finished, say=silent)
    assert contents(finished) == before


def test_results_of_a_run_are_those_of_the_same_request_at_its_end(
    finished: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = results_of(*request_for(data), finished)
    assert found is not None
    assert list(found) == ["original", "pruned", "recovered"]
    assert results_of(*request_for(data, ratio=0.2), finished) is None
    stopped = unfinished(data, tmp_path / "stopped", monkeypatch)
    assert results_of(*request_for(data, tasks=None), stopped) is None
    assert results_of(*request_for(data), tmp_path / "nothing") is None


def unfinished(data: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with monkeypatch.context() as patch:
        patch.setattr(stages, "prune_", stops)
        with pytest.raises(Stopped):
            compress(*request_for(data, tasks=None), out, say=silent)
    return out


def test_another_request_does_not_go_on_from_it(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = unfinished(data, tmp_path / "run", monkeypatch)
    before = contents(out)
    with pytest.raises(ConfigError, match="exists"):
        compress(*request_for(data, tasks=None, ratio=0.2), out, say=silent)
    assert contents(out) == before


@pytest.mark.parametrize("text", ["{", "[]", '{"ratio": 0.3}'])
def test_a_folder_that_is_no_run_is_refused(text: str, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"mine' exists"):
        compress(*request_for(data), out, say=silent)
    assert contents(out) == {"config.json": text.encode()}


def pruning(data: Path | None = None, **changes: Any) -> Asked:
    """The shortest request: nothing is trained or asked."""
    return request_for(
        data, **{"criterion": (), "axis": None, "recover": None, "tasks": None, **changes}
    )


def test_changed_data_are_another_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    own = Path(shutil.copytree(data.parent, tmp_path / "data")) / data.name
    out = unfinished(own, tmp_path / "run", monkeypatch)
    rows = json.loads(own.read_text())
    own.write_text(json.dumps(rows[::-1]))
    with pytest.raises(ConfigError, match="exists"):
        compress(*request_for(own, tasks=None), out, say=silent)


def test_what_a_stopped_force_left_goes_with_a_run_without_it(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(stages, "prune_", stops)
        with pytest.raises(Stopped):
            compress(*pruning(), tmp_path / "run", force=True, say=silent)
    assert [path.name for path in tmp_path.iterdir()] == [".run.partial"]
    compress(*pruning(), tmp_path / "run", say=silent)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(("recover", "axis"), [(None, "width"), (RecoverConfig(), "depth")])
def test_the_axis_depends_on_whether_anything_is_trained(
    recover: RecoverConfig | None, axis: str
) -> None:
    prune = PruneConfig(ratio=0.15, data="demo")
    request = requests.Request(model="demo", prune=prune, recover=recover)
    assert requests.axis_of(request) == axis


def test_force_replaces_a_run(finished: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    compress(*pruning(), out, say=silent)
    (out / "mine").write_text("")
    compress(*pruning(ratio=0.2), out, force=True, say=silent)
    assert Plan.load(out / "plan.json").ratio == pytest.approx(0.2, abs=0.01)
    assert not (out / "mine").exists()
    assert json.loads((out / "config.json").read_text())["ratio"] == 0.2


def test_what_force_replaces_stays_until_the_new_run_is_whole(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    compress(*pruning(), out, say=silent)
    before = contents(out)
    request = request_for(data, ratio=0.2, tasks=None)
    for home, stage in (
        (stages, "prune_"),
        (stages, "recover_"),
        (compression, "finish"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(home, stage, stops)
            with pytest.raises(Stopped):
                compress(*request, out, force=True, say=silent)
        assert contents(out) == before
    said: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(stages, "prune_", stops)  # done already
        compress(*request, out, force=True, say=said.append)
    assert any(line.startswith("going on") for line in said)
    assert json.loads((out / "config.json").read_text())["ratio"] == 0.2
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    "changes",
    [
        {"ratio": 1.2},
        {"model": "/nowhere"},
        {"data": "/nowhere.json"},
        {"criterion": ("tailor",)},
        {"tasks": "presense"},
        {"tasks": "presence", "baseline": "/nowhere.json"},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_a_bad_request_leaves_what_force_would_replace(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    compress(*pruning(), out, say=silent)
    before = contents(out)
    with pytest.raises(SlimError):
        compress(*pruning(**changes), out, force=True, say=silent)
    assert contents(out) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"ratio": 1.2},
        {"ratio": 0.97},
        {"ratio": float("nan")},
        {"model": "/nowhere"},
        {"data": "/nowhere.json"},
        {"criterion": ("tailor",)},
        {"criterion": ("taylor",), "data": None},
        {"criterion": ("wanda",), "axis": "depth"},
        {"round_to": 0},
        {"dtype": "int3"},
        {"tasks": "presense"},
        {"tasks": "presence", "baseline": "/nowhere.json"},
        {"samples": 0},
        {"limit": 0, "tasks": "presence"},
    ],
    ids=lambda changes: ",".join(map(str, changes.values())),
)
def test_a_bad_request_writes_nothing(
    changes: dict[str, Any], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as for a user
    with pytest.raises(SlimError):
        compress(*pruning(**{"data": data, **changes}), tmp_path / "out", say=silent)
    assert list(tmp_path.iterdir()) == []


def test_without_data_the_demo_calibrates_and_nothing_is_trained(tmp_path: Path) -> None:
    said: list[str] = []
    compress(*pruning(recover=RECOVER), tmp_path / "run", say=said.append)
    assert "no --data: calibrating on the demo's conversations" in said
    assert any(re.match("axis width: .*arXiv", line) for line in said)
    assert not (tmp_path / "run" / "history.json").exists()
    assert Plan.load(tmp_path / "run" / "plan.json").axis == "width"


def test_a_text_model_goes_the_same_way(tmp_path: Path) -> None:
    data = folders.write_llava_data(tmp_path / "data", pictures=False)
    config = request_for(data, model=str(folders.folder("text")), tasks="text_sum")
    results = compress(*config, tmp_path / "run", say=silent)
    assert set(results) == {"original", "pruned", "recovered"}
    assert load(tmp_path / "run" / "checkpoint")[1] is not None


def test_few_samples_serve_calibration_and_training(tmp_path: Path) -> None:
    data = folders.write_llava_data(tmp_path / "data", count=3)
    compress(*request_for(data, tasks=None), tmp_path / "run", say=silent)
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert history["sample_ids"] == ["s0", "s1", "s2"]


def test_a_baseline_saves_asking_again(
    finished: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    honest = stages.evaluate

    def counts(*args: Any, **kwargs: Any) -> Result:
        asked.append(args[3])
        return honest(*args, **kwargs)

    monkeypatch.setattr(stages, "evaluate", counts)
    baseline = finished / "results" / "original.json"
    config = request_for(data, recover=None, baseline=str(baseline))
    results = compress(*config, tmp_path / "run", say=silent)
    assert asked == ["pruned"]
    assert results["original"] == Result.load(baseline)


# A configuration as a command and as a file: both give it back.

LORA = RecoverConfig(train="lora", fraction=0.05, trainer={"weight_decay": 0.1})
FULL = CompressConfig(
    ratio=0.25,
    axis="both",
    criterion=("block_influence", "taylor"),
    **{"data": "my data.json", "protect": (2, 1), "tasks": "name", "limit": 3},
    recover=LORA,
)
CONFIGS = [
    FULL,
    replace(FULL, recover=None),
    CompressConfig(ratio=0.3, axis="width", criterion=("activation",)),
    CompressConfig(ratio=0.5, axis="depth", data="demo", units=("neuron",)),
    CompressConfig(
        **{"ratio": 0.5, "axis": "depth", "data": "demo", "seed": 3, "allocation": "balanced"},
        **{"tasks": "name,pope", "task_folder": "mine", "batch_size": 4, "floors": True},
        recover=RecoverConfig(train="full", loss="sft", batch_size=2, seed=3),
    ),
]


@pytest.fixture
def compressed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `compress` was called with last."""
    seen: list[Any] = []

    def record(model: str, config: CompressConfig, out: Path, *rest: Any) -> dict[str, Any]:
        seen[:] = model, config, out
        return {}

    monkeypatch.setattr("slimvlm.runs.compress.compress", record)
    return seen


@pytest.mark.parametrize("config", CONFIGS)
def test_a_command_and_a_file_give_the_configuration_back(
    config: CompressConfig,
    tmp_path: Path,
    compressed: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An option without a flag makes the command read the run's own file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out folder").mkdir()
    (tmp_path / "out folder" / "run.yaml").write_text(config_text("my model", config))
    command = shlex.split(compress_command("my model", config, "out folder"))
    has_no_flag = config.floors or (config.recover is not None and bool(config.recover.trainer))
    assert command[:3] == ["slimvlm", "compress", "--config" if has_no_flag else "my model"]
    cli.main(command[1:])
    assert compressed == ["my model", config, Path("out folder")]
    path = tmp_path / "run.yaml"
    path.write_text(config_text("my model", config))
    assert read_config(path)[:2] == ("my model", config)
    cli.main(["compress", "--config", str(path), "--out", "out"])
    assert compressed == ["my model", config, Path("out")]


def test_the_command_line_comes_on_top(tmp_path: Path, compressed: list[Any]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(config_text("my model", FULL))
    cli.main(["compress", "other", f"--config={path}", "--ratio", "0.4", "--out", "out"])
    assert compressed[:2] == ["other", replace(FULL, ratio=0.4)]


def test_a_file_that_is_silent_on_training_leaves_it_to_the_chart(
    tmp_path: Path, compressed: list[Any]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"model": "m", "ratio": 0.1, "data": "d.json"}))
    cli.main(["compress", "--config", str(path), "--out", "out"])
    assert compressed[1].recover.train == "projector"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ratio: 0.3", "must name a model"),
        ("- 1", "must name a model"),
        ("model: m\nratoi: 0.3", "ratoi"),
        ("model: m\nratio: much", "ratio"),
        ("model: m\nrecover: {train: half}", "train"),
        ("model: [", "cannot be read"),
    ],
)
def test_a_wrong_file_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as failure:
        parsed("compress", ["--config", str(path)])
    assert "run.yaml" in str(failure.value)


def test_a_run_can_be_given_back(tmp_path: Path, compressed: list[Any]) -> None:
    words = ["my model", "--ratio", "0.3", "--axis", "width", "--data", "data.json"]
    cli.main(["compress", *words, "--samples", "6", "--train", "none", "--out", "first"])
    model, config, _ = compressed
    path = tmp_path / "run.yaml"
    path.write_text(config_text(model, config))
    cli.main(["compress", "--config", str(path), "--out", "second"])
    assert compressed == [model, config, Path("second")]
