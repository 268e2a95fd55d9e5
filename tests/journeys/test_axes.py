"""An open axis: each is tried on the data, and held-out answers choose."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import slimvlm as sv
from slimvlm.cli.steps import prune
from slimvlm.core.errors import ConfigError, ImpossiblePlanError
from slimvlm.core.options import CompressConfig, MemoryOptions, PruneConfig, RecoverConfig
from slimvlm.core.progress import silent
from slimvlm.models.cost import Picture, question_flops
from slimvlm.planning.plan import Plan
from slimvlm.runs import stages
from slimvlm.runs.compress import compress
from slimvlm.runs.recipe import decide, dry_plan, read_split, resolve
from slimvlm.runs.stages import Calibration
from slimvlm.scoring.batches import answer_loss
from tests import tiny
from tests import tiny_folder as folders
from tests.handmade import Stopped, assert_untouched, snapshot, stops
from tests.tables import tables
from tests.tiers import tiered

TABLES = tables(__file__)

AXES = ["depth", "width", "both"]
SHOWN = Picture(17, 17, 16, 16)  # an image is 4 x 4 patches, and a class token
RATIO = 0.19
"""About one of the four layers."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return folders.write_llava_data(tmp_path_factory.mktemp("data"))


def opened(data, **changes):
    given = {"ratio": RATIO, "axis": "auto", "vocab_size": "all", "data": str(data)}
    given |= {"samples": 8, "local_steps": 2, "recover": None, "test_samples": 0, **changes}
    name = str(folders.folder("llava"))
    recipe = decide(name, CompressConfig(**given), sv.anatomy(name))
    model, processor = stages.load_original(recipe)
    return recipe, model, Calibration(processor, read_split(recipe).calibration, recipe.hold_out)


@pytest.mark.slow
def test_the_axis_whose_smaller_model_answers_best_is_chosen(data):
    request, model, calibration = opened(data)
    before = snapshot(model)
    scores = list(stages.calibrate(request, model, calibration).values())
    losses = stages.try_axes(request, model, calibration, scores)
    assert_untouched(model, before)
    expected = {}
    for axis in AXES:
        student, _ = stages.load_original(request)
        held_out = calibration.held_out
        sv.walk_(student, calibration.fitted, RATIO, axis, scores=scores, held_out=held_out)
        expected[axis] = answer_loss(student, calibration.held_out)
    assert losses == pytest.approx(expected)
    walked = stages.prune_(request, model, calibration, scores)
    best = min(expected.values())
    assert expected[walked.plan.axis] <= best * (1 + stages.EVEN)  # of two that are even, width
    assert f"axis {walked.plan.axis}: validation loss" in walked.report.notes[0]
    assert all(layer.distilled for layer in walked.report.layers)  # the trial alone is brief


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_where_training_follows_each_axis_is_trained_a_little(dtype, data):
    """The original keeps its data type and flags, also where training computes in float32."""
    how = {"learning_rate": 1e-3, "batch_size": 2, "epochs": 6, "bf16": False}
    recover = RecoverConfig(train="full", loss="sft+kl", **how)
    request, model, calibration = opened(data, recover=recover, dtype=dtype)
    scores = list(stages.calibrate(request, model, calibration).values())
    before = snapshot(model)
    untrained = stages.try_axes(request, model, calibration, scores)
    samples = read_split(request).training
    trained = stages.try_axes(request, model, calibration, scores, samples)
    assert_untouched(model, before)
    held = {(parameter.dtype, parameter.requires_grad) for parameter in model.parameters()}
    assert held == {(getattr(torch, dtype), True)}
    assert all(trained[axis] != untrained[axis] for axis in trained)


def test_a_trial_trains_on_a_share_of_what_training_reads_and_on_no_judge(data, monkeypatch):
    how = {"batch_size": 1, "fraction": 0.5, "epochs": 12}
    recover = RecoverConfig(train="lora", loss="sft", **how)
    request, model, calibration = opened(data, recover=recover)
    seen = []
    monkeypatch.setattr(
        stages, "train", lambda _, __, samples, few, *___, **____: seen.append((samples, few))
    )
    scores = list(stages.calibrate(request, model, calibration).values())
    stages.try_axes(request, model, calibration, scores, calibration.samples)
    own = [sample for sample in calibration.samples if not sample.is_general]
    judges = own[3::4]
    for samples, few in seen:
        assert len(samples) == len(calibration.samples) - len(judges)
        assert not {*map(id, samples)} & {*map(id, judges)}
        assert few.max_steps == max(round(12 * round(len(samples) / 2) / 6), 2)


def test_only_axes_that_remove_as_much_are_tried_and_none_with_low_memory(data, tmp_path):
    """Of four layers no twentieth can go, and every layer keeps a group and some neurons."""
    for ratio, axes in ((RATIO, AXES), (0.05, ["width", "both"]), (0.7, ["both"])):
        assert [trial.axis for trial in opened(data, ratio=ratio)[0].trials] == axes
    with pytest.raises(ImpossiblePlanError, match=r"ratio 0\.95"):
        opened(data, ratio=0.95)
    config = PruneConfig(ratio=0.3, axis="auto", data=str(data), samples=4)
    memory = MemoryOptions(low_memory=True)
    with pytest.raises(ConfigError, match="axis 'auto'"):
        prune(str(folders.folder("llava")), tmp_path / "out", None, config, memory)


@pytest.mark.parametrize("share", tiered([0.75, 0.5], lambda share: share == 0.75))
def test_at_one_latency_every_axis_has_a_ratio_of_its_own(share):
    shape = sv.anatomy("demo")
    asked = CompressConfig(axis="auto", data="demo", target_latency=share)
    found = [each for each in decide("demo", asked, shape).trials if not each.tower_ratio]
    assert [trial.axis for trial in found] == AXES
    layer = shape.layers[0].params / shape.backbone_params
    for trial in found:
        least = replace(trial, ratio=trial.size - max(layer, 0.02))
        reads = [dry_plan(each, shape).after for each in (least, trial)]
        more, left = (sum(question_flops(each, SHOWN)) for each in reads)
        whole = sum(question_flops(shape, SHOWN))
        assert left <= share * whole < more, trial.axis
    assert len({trial.ratio for trial in found}) == 3


@pytest.mark.parametrize(
    "asked",
    tiered([{"axis": "chart"}, {"vocab_size": "auto"}], lambda asked: "vocab_size" in asked),
)
def test_a_latency_s_ratio_is_of_the_axis_and_the_tokens_that_are_taken(asked, data):
    model = str(folders.folder("llava"))
    asked = {"data": str(data), "samples": 4, "target_latency": 0.75, **asked}
    found, _, _ = resolve(model, CompressConfig(**asked))
    named = CompressConfig(**asked | {"axis": found.axis})
    assert found.ratio == decide(model, named, sv.anatomy(model), tokens=found.tokens).ratio


def test_at_a_latency_shares_of_the_tower_are_tried_by_name(tmp_path):
    shape = sv.anatomy("demo")
    asked = CompressConfig(axis="width", data="demo", target_latency=0.7)
    first, *others = decide("demo", asked, shape).trials
    assert first.tower_ratio == 0
    assert others
    for before, trial in pairwise([first, *others]):
        assert trial.tower_ratio > before.tower_ratio
        assert f"tower {trial.tower_ratio:g}" in trial.name
        assert trial.axis == "width"
    for name in ("qwen2_vl", "llama"):  # a tower that stays whole, and none
        tiny.CONFIGS[name]().save_pretrained(tmp_path / name)
        easy, path = replace(asked, target_latency=0.99), str(tmp_path / name)
        assert not any(t.tower_ratio for t in decide(path, easy, sv.anatomy(path)).trials)


def test_the_more_of_a_tower_goes_the_less_of_the_decoder_has_to():
    asked, model = CompressConfig(axis="width", data="demo", target_latency=0.6), "llava"
    trials = decide(model := str(folders.folder(model)), asked, sv.anatomy(model)).trials
    assert len(trials) > 2
    assert all(after.ratio < before.ratio for before, after in pairwise(trials))


@pytest.mark.slow
def test_a_run_meets_its_latency(data, tmp_path, unhurried):
    model, said = str(folders.folder("llava")), []
    shown = {"data": str(data), "samples": 8, "local_steps": 0, "axis": "auto"}
    compress(model, CompressConfig(target_latency=0.7, **shown), tmp_path / "run", say=said.append)
    plan = Plan.load(tmp_path / "run" / "plan.json")
    after, before = (sum(question_flops(each, SHOWN)) for each in (plan.after, plan.before))
    assert 0.5 < after / before < 0.71  # groups and neurons share anew once they are tried
    assert "target_latency 0.7: measured 1.00 [1.00, 1.00]" in said  # times are made up
    with pytest.raises(ConfigError, match=r"target_latency 0\.7 conflicts with ratio 0\.3"):
        CompressConfig(target_latency=0.7, ratio=0.3)
    with pytest.raises(ImpossiblePlanError, match=r"target_latency 0\.01"):
        compress(model, CompressConfig(target_latency=0.01, **shown), tmp_path / "no", say=silent)


@pytest.mark.parametrize(("losses", "axis"), TABLES["losses"])
def test_the_axis_that_lost_least_is_taken_and_width_of_two_that_are_even(losses, axis, data):
    found, note = stages.best_trial(opened(data)[0], losses)
    assert found.axis == axis
    assert note.startswith(f"axis {axis}: validation loss {losses[axis]:.4f} (")


@pytest.mark.slow
def test_a_stopped_run_does_not_try_again(data, tmp_path, monkeypatch):
    shown = {"data": str(data), "samples": 8, "local_steps": 1}
    config = CompressConfig(ratio=0.3, axis="auto", vocab_size="all", **shown)
    model, out = str(folders.folder("llava")), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(stages, "best_trial", stops)
        with pytest.raises(Stopped):
            compress(model, config, out, say=silent)
    monkeypatch.setattr(stages, "try_axes", stops)
    said = []
    compress(model, config, out, say=said.append)
    told, axis = "\n".join(said), Plan.load(out / "plan.json").axis
    assert "short trials of depth" in told
    assert f"axis {axis}: validation loss" in told


def test_the_chart_decides_without_data_and_the_data_before_training(data):
    for axis in (None, "chart", "auto"):
        assert decide("demo", PruneConfig(ratio=0.3, axis=axis)).axis == "width"
    config = CompressConfig(ratio=0.3, data=str(data), recover=RecoverConfig())
    assert decide("demo", config).axis == "auto"
    for axis, found in (("chart", "depth"), ("depth", "depth"), ("both", "both")):
        assert decide("demo", replace(config, axis=axis)).axis == found
    assert decide("demo", replace(config, recover=None)).axis == "width"
