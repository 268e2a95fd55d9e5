"""A checkpoint read layer by layer is scored and pruned like a model in memory."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import slimvlm as sv
from slimvlm.cli import main
from slimvlm.core.errors import ConfigError, DataError, InUseError, NumericalError
from slimvlm.core.files import held
from slimvlm.models.classes import auto_class
from slimvlm.models.load import load
from slimvlm.planning.make import make_plan
from slimvlm.planning.plan import Plan
from slimvlm.pruning.cut import prune_
from slimvlm.pruning.save import PLAN_FILE, prune_checkpoint, save
from slimvlm.scoring.layerwise.checkpoint import open_checkpoint
from slimvlm.scoring.layerwise.runner import LayerwiseModel
from slimvlm.scoring.score_model import score, score_checkpoint
from slimvlm.scoring.unit_scores import Scores
from tests import tiny, tiny_folder
from tests.handmade import logits, random_scores
from tests.tiers import tiered

MODELS = ("llama", "phi", "llava-phi3", "qwen2_5_vl", "internvl-qwen2", "smolvlm")
ODD = ("gemma2", "qwen3_vl", "gemma3")  # capped logits, deepstack features, two kinds of masks
CASES: dict[str, dict[str, Any]] = {
    "block_influence": {"criterion": "block_influence", "last_layer": "postnorm"},
    "angular": {"criterion": "angular"},
    "obs": {"criterion": "obs"},
    "flap": {"criterion": "flap"},
    "activation": {"criterion": "activation", "token_weights": {"prompt": 0.3}},
    "magnitude": {"criterion": "magnitude", "p": 2},
    "random": {"criterion": "random"},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Checkpoint folders of tiny models, in several small files."""
    root = tmp_path_factory.mktemp("checkpoints")
    made = {}
    for name in (*MODELS, *ODD, "llava-llama", "internvl-phi3"):
        tiny.build(name).save_pretrained(root / name, max_shard_size="100KB")
        made[name] = root / name
    yield made
    shutil.rmtree(root)


def batches(model: PreTrainedModel) -> list[dict[str, Tensor]]:
    return [tiny.batch(model, 12, 0), tiny.batch(model, 15, 1)]


def flat(scores: Scores) -> dict[str, Tensor]:
    found = {} if scores.layer is None else {"layer": scores.layer}
    if scores.layer_runs is not None:
        found["layer_runs"] = scores.layer_runs.nan_to_num(posinf=0.0)
    for unit in ("kv_group", "neuron"):
        found |= {f"{unit}.{i}": values for i, values in enumerate(scores.of(unit) or ())}
    return found


def assert_same(actual: Scores, expected: Scores) -> None:
    ours, theirs = flat(actual), flat(expected)
    assert ours.keys() == theirs.keys() != set()
    assert (actual.criterion, actual.options) == (expected.criterion, expected.options)
    for name, values in theirs.items():
        assert (ours[name] - values).abs().max() <= 1e-5 * values.abs().max(), name


@pytest.mark.parametrize("name", tiered(MODELS))
@pytest.mark.parametrize("case", CASES)
def test_scores_are_those_of_the_model_in_memory(
    name: str, case: str, folders: dict[str, Path]
) -> None:
    model = tiny.build(name)
    expected = score(model, batches(model), **CASES[case])
    assert_same(score_checkpoint(folders[name], batches(model), **CASES[case]), expected)


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("case", ["block_influence", "activation"])
def test_inputs_added_between_layers_are_not_lost(
    name: str, case: str, folders: dict[str, Path]
) -> None:
    model = tiny.build(name)
    expected = score(model, batches(model), **CASES[case])
    assert_same(score_checkpoint(folders[name], batches(model), **CASES[case]), expected)


def test_half_precision_weights_have_float32_statistics(tmp_path: Path) -> None:
    tiny.build("llama").to(torch.bfloat16).save_pretrained(tmp_path / "half")
    model, _ = load(tmp_path / "half")
    for case in ("flap", "activation"):
        expected = score(model, batches(model), **CASES[case])
        found = score_checkpoint(tmp_path / "half", batches(model), **CASES[case])
        assert_same(found, expected)
        assert all(values.dtype == torch.float32 for values in flat(found).values())


def in_memory(module: nn.Module) -> int:
    """How many of its numbers are there."""
    return sum(p.numel() for p in module.parameters() if not p.is_meta)


@pytest.mark.parametrize("case", ["flap", "block_influence"])
def test_one_layer_is_in_memory_at_a_time(
    case: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.build("llama")
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    seen: list[int] = []
    layers = LayerwiseModel.layer

    @contextmanager
    def watched(self: LayerwiseModel, index: int) -> Iterator[Any]:
        with layers(self, index) as view:
            (loaded,) = view.layers
            for module in (self.model, loaded):
                loaded.register_forward_pre_hook(lambda *_, m=module: seen.append(in_memory(m)))
            yield view

    monkeypatch.setattr(LayerwiseModel, "layer", watched)
    score_checkpoint(folders["llama"], batches(model), **CASES[case])
    assert set(seen) == {layer}


@pytest.mark.parametrize("case", ["activation", "block_influence"])
def test_a_stopped_run_goes_on_after_the_last_whole_layer(
    case: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.build("llama")
    layers = LayerwiseModel.layer
    loads: list[int] = []

    def killed(self: LayerwiseModel, index: int) -> Any:
        loads.append(index)
        if len(loads) == stop_at:
            raise KeyboardInterrupt
        return layers(self, index)

    monkeypatch.setattr(LayerwiseModel, "layer", killed)
    stop_at = -1
    asked = {**CASES[case], "scratch": tmp_path / "work"}
    expected = score_checkpoint(folders["llama"], batches(model), **asked)
    count = len(loads)
    assert count == 4
    for stop_at in range(2, count + 1):
        loads.clear()
        with pytest.raises(KeyboardInterrupt):
            score_checkpoint(folders["llama"], batches(model), **asked)
        loads.clear()
        done, stop_at = stop_at - 1, -1
        assert_same(score_checkpoint(folders["llama"], batches(model), **asked), expected)
        assert len(loads) == count - done
    assert not (tmp_path / "work").exists()


@contextmanager
def stopped_at(owner: type, name: str, index: int | None = None) -> Iterator[None]:
    """Inside, a run is stopped when it calls a method, with this argument if one is given."""
    honest = getattr(owner, name)

    def stops(self: Any, *args: Any) -> Any:
        if index in (None, *args):
            raise KeyboardInterrupt
        return honest(self, *args)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(owner, name, stops)
        with pytest.raises(KeyboardInterrupt):
            yield


def test_other_data_do_not_reuse_old_work(folders: dict[str, Path], tmp_path: Path) -> None:
    model = tiny.build("llama")
    with stopped_at(Scores, "load"):
        score_checkpoint(folders["llama"], batches(model), "flap", scratch=tmp_path)
    others = [tiny.batch(model, 9, 5)]
    found = score_checkpoint(folders["llama"], others, "flap", scratch=tmp_path)
    assert_same(found, score(model, others, "flap"))


@pytest.mark.parametrize("place", [(LayerwiseModel, "layer"), (Scores, "load")])
def test_another_model_does_not_reuse_old_work(
    place: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    """The embeddings are another model's, too."""
    model = tiny.build("llama")
    with stopped_at(*place):
        score_checkpoint(folders["llama"], batches(model), "flap", scratch=tmp_path / "work")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    model.save_pretrained(tmp_path / "other")
    found = score_checkpoint(tmp_path / "other", batches(model), "flap", scratch=tmp_path / "work")
    assert_same(found, score(model, batches(model), "flap"))


@pytest.mark.parametrize("case", ["flap", "activation"])
def test_a_criterion_without_data_reuses_no_work_of_others(
    case: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    model = tiny.build("llama")
    with stopped_at(LayerwiseModel, "layer", 2):
        score_checkpoint(folders["llama"], batches(model), scratch=tmp_path, **CASES[case])
    found = score_checkpoint(folders["llama"], (), "magnitude", scratch=tmp_path)
    assert found.criterion == "magnitude"
    assert_same(found, score(model, (), "magnitude"))


def test_a_place_that_cannot_be_removed_costs_no_scores(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the current folder cannot be named for removal
    model = tiny.build("llama")
    found = score_checkpoint(folders["llama"], batches(model), scratch=".")
    assert_same(found, score(model, batches(model)))


def test_two_runs_do_not_share_a_scratch_folder(folders: dict[str, Path], tmp_path: Path) -> None:
    model = tiny.build("llama")
    with ThreadPoolExecutor(1) as elsewhere, held(tmp_path / "slimvlm-scratch"):
        second = elsewhere.submit(
            score_checkpoint, folders["llama"], batches(model), scratch=tmp_path
        )
        with pytest.raises(InUseError, match="slimvlm-scratch' is in use by another run"):
            second.result()
    score_checkpoint(folders["llama"], batches(model), scratch=tmp_path)


def test_the_scratch_folder_is_announced_and_other_files_in_it_stay(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    model = tiny.build("llama")
    (tmp_path / "mine.txt").write_text("mine")
    said: list[str] = []
    score_checkpoint(folders["llama"], batches(model), scratch=tmp_path, say=said.append)
    (line,) = said
    assert line.startswith("scratch: 0.00 GiB in ")
    assert str(tmp_path) in line
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_full_disk_is_found_before_layers_run(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.build("llama")
    usage = namedtuple("usage", "total used free")(10, 10, 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(LayerwiseModel, "layer", None)
    with pytest.raises(ConfigError, match=r"scratch .* GiB needed, .* 0.0 GiB free"):
        score_checkpoint(folders["llama"], batches(model), scratch=tmp_path)


@pytest.mark.parametrize("criterion", ["block_influence", "obs"])
def test_no_data_is_refused(criterion: str, folders: dict[str, Path]) -> None:
    with pytest.raises(DataError, match="no calibration batch"):
        score_checkpoint(folders["llama"], [], criterion)


def test_nan_stops_with_the_layers_number(tmp_path: Path) -> None:
    model = tiny.build("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    for case in ("activation", "block_influence"):
        with pytest.raises(NumericalError, match="layer 2"):
            score_checkpoint(tmp_path / "nan", batches(model), **CASES[case])


def test_nan_stops_with_the_samples_number(folders: dict[str, Path]) -> None:
    model = tiny.build("llama")
    given = [dict(batch) for batch in batches(model)]
    first = sum(len(batch["input_ids"]) for batch in given[:-1])
    token = int(given[-1]["input_ids"][-1, 0])
    for batch in given[:-1]:
        batch["input_ids"][batch["input_ids"] == token] = token - 1
    given[-1]["input_ids"][:-1][given[-1]["input_ids"][:-1] == token] = token - 1
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = float("inf")
    shutil.rmtree(folders["llama"].parent / "spoilt", ignore_errors=True)
    model.save_pretrained(folders["llama"].parent / "spoilt")
    told = f"calibration sample {first + len(given[-1]['input_ids'])}"
    for case in ("activation", "block_influence"):
        with pytest.raises(NumericalError, match=told):
            score_checkpoint(folders["llama"].parent / "spoilt", given, **CASES[case])


def test_missing_and_misshapen_weights_are_named(folders: dict[str, Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folders["llama"], broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "intermediate_size": 80}))
    with pytest.raises(ConfigError, match=r"gate_proj.weight' has shape \[96, 64\]"):
        open_checkpoint(broken)
    (broken / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    with pytest.raises(ConfigError, match=r"weights lack 'model.layers.4"):
        open_checkpoint(broken)


# Pruning


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize(
    "name", tiered([*MODELS, "gemma2", "qwen3_vl", "llava-llama", "internvl-phi3"])
)
@pytest.mark.parametrize(
    ("axis", "allocation", "ratio"), [("both", "uniform", 0.3), ("width", "protect", 0.15)]
)
def test_the_pruned_checkpoint_is_the_one_that_save_writes(
    name: str,
    axis: str,
    allocation: str,
    ratio: float,
    folders: dict[str, Path],
    tmp_path: Path,
) -> None:
    anatomy = sv.anatomy(folders[name])
    scores = random_scores(anatomy)
    plan = make_plan(anatomy, scores, ratio, axis, allocation=allocation, round_to=1)
    assert plan.after.is_uniform == (allocation == "uniform")
    prune_checkpoint(folders[name], plan, tmp_path / "ours", allow_uneven=True)
    model, processor = load(folders[name])
    prune_(model, plan, allow_uneven=True)
    save(model, processor, tmp_path / "theirs", plan)
    ours, theirs = tensors_of(tmp_path / "ours"), tensors_of(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    for file in ("config.json", PLAN_FILE):
        written = [json.loads((tmp_path / side / file).read_text()) for side in ("ours", "theirs")]
        assert written[0] == written[1], file
    names = [{p.name for p in (tmp_path / side).iterdir()} for side in ("ours", "theirs")]
    assert names[0] == names[1]


def test_a_plan_that_needs_a_retype_loads_in_plain_transformers(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    anatomy = sv.anatomy(folders["llava-llama"])
    everything = Plan.everything(anatomy)
    plan = replace(everything, kv_groups=((0, 1, 3),) * anatomy.num_layers)
    assert plan.needs_retype
    prune_checkpoint(folders["llava-llama"], plan, tmp_path / "out")
    config = AutoConfig.from_pretrained(tmp_path / "out")
    again = auto_class(config).from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    model = tiny.build("llava-llama")
    prune_(model, plan)
    batch = tiny.batch(model)
    assert torch.equal(logits(again, batch), logits(model, batch))


def test_large_checkpoints_are_written_in_several_files(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slimvlm.pruning.save.SHARD_BYTES", 60_000)
    plan = Plan.everything(sv.anatomy(folders["llama"]))
    prune_checkpoint(folders["llama"], plan, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    model = tiny.build("llama")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    batch = tiny.batch(model)
    assert torch.equal(logits(again, batch), logits(model, batch))


def test_a_plan_for_another_model_leaves_nothing(folders: dict[str, Path], tmp_path: Path) -> None:
    plan = Plan.everything(sv.anatomy(folders["phi"]))
    with pytest.raises(ConfigError, match="plan: made for phi"):
        prune_checkpoint(folders["llama"], plan, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# The command line


@pytest.mark.parametrize(
    ("criterion", "axis"),
    tiered([("activation", "width"), ("angular", "depth")], lambda _, axis: axis == "width"),
)
def test_the_verbs_score_and_prune_alike(criterion: str, axis: str, tmp_path: Path) -> None:
    data = tiny_folder.write_llava_data(tmp_path / "data", 3)
    model = str(tiny_folder.folder("llava"))
    shown = ["--data", str(data), "--images", str(data.parent)]
    for name, flags in (("memory", []), ("disk", ["--low-memory"])):
        out = tmp_path / name
        main(["score", model, "--criterion", criterion, "--out", str(out), *shown, *flags])
        asked = ["--ratio", "0.3", "--criterion", criterion, "--axis", axis]
        asked += ["--allocation", "uniform", "--repair", "none"]
        main(["prune", model, "--out", f"{out}-pruned", *asked, *shown, *flags])
    assert_same(Scores.load(tmp_path / "disk"), Scores.load(tmp_path / "memory"))
    ours, theirs = tensors_of(tmp_path / "disk-pruned"), tensors_of(tmp_path / "memory-pruned")
    assert all(torch.equal(ours[key], theirs[key]) for key in {*ours, *theirs})
    assert not list(tmp_path.glob(".*.scratch"))


def test_what_low_memory_cannot_do_is_said_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(tiny_folder.folder("llava"))
    asked = ["--out", str(tmp_path / "out"), "--data", "none", "--low-memory"]
    taylor = "'taylor' needs the whole model in memory; with low memory use block_influence"
    for verb, flags, message in [
        ("prune", ["--ratio", "0.3", "--axis", "auto"], "axis 'auto'"),
        ("prune", ["--ratio", "0.3", "--criterion", "taylor"], taylor),
        ("score", ["--criterion", "taylor"], taylor),
        ("score", ["--criterion", "gate"], "low memory use activation, wanda, flap, obs\n"),
    ]:
        with pytest.raises(SystemExit) as stopped:
            main([verb, model, *asked, *flags])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
    with pytest.raises(ConfigError, match="needs the whole model in memory"):
        score_checkpoint(model, [], "taylor_mix")
