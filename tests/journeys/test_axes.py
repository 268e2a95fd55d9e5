"""An open axis: each is tried on the data, and held-out answers choose."""

from dataclasses import replace

import pytest
import torch

import slimvlm as sv
from slimvlm.core.errors import ConfigError, ImpossiblePlanError
from slimvlm.core.options import CompressConfig, MemoryOptions, PruneConfig, RecoverConfig
from slimvlm.core.progress import silent
from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.cost import prefill_flops
from slimvlm.planning.plan import Plan
from slimvlm.runs import stages
from slimvlm.runs.compress import compress
from slimvlm.runs.recipes import rules
from slimvlm.runs.request import Request, dry_plan, ratio_of, requests_by_axis, resolved
from slimvlm.runs.stages import Calibration, settled
from slimvlm.runs.verbs import prune
from slimvlm.scoring.batches import answer_loss
from tests import tiny_folder as folders
from tests.handmade import Stopped, assert_untouched, snapshot, stops
from tests.tables import tables
from tests.tiers import tiered

TABLES = tables(__file__)

AXES = ["depth", "width", "both"]
PROMPT = rules().constants.text_tokens + rules().constants.image_tokens
RATIO = 0.19
"""About one of the four layers."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return folders.write_llava_data(tmp_path_factory.mktemp("data"))


def opened(data, **changes):
    whole = PruneConfig(ratio=RATIO, axis="auto", vocab_size="all", data=str(data))
    recover = changes.pop("recover", None)
    prune = replace(whole, **{"samples": 8, "local_steps": 2, **changes})
    request = resolved(Request(model=str(folders.folder("llava")), prune=prune, recover=recover))
    model, processor = stages.load_original(request)
    samples = stages.read_split(request, silent).calibration
    return request, model, Calibration(processor, samples, request.hold_out)


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
    samples = stages.read_split(request, silent).training
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
        request, model, _ = opened(data, ratio=ratio)
        assert list(requests_by_axis(request, read_anatomy(model))) == axes
    too_much = replace(request, prune=replace(request.prune, ratio=0.95))
    with pytest.raises(ImpossiblePlanError, match=r"ratio 0\.95"):
        requests_by_axis(too_much, read_anatomy(model))
    config = PruneConfig(ratio=0.3, axis="auto", data=str(data), samples=4)
    memory = MemoryOptions(low_memory=True)
    with pytest.raises(ConfigError, match="axis 'auto'"):
        prune(str(folders.folder("llava")), config, tmp_path / "out", memory=memory)


@pytest.mark.parametrize("share", tiered([0.75, 0.5], lambda share: share == 0.75))
def test_at_one_latency_every_axis_has_a_ratio_of_its_own(share):
    shape = sv.anatomy("demo")
    asked = Request(model="demo", prune=PruneConfig(axis="auto", data="demo"), latency=share)
    found = requests_by_axis(resolved(asked, shape=shape), shape)
    assert list(found) == AXES
    layer = shape.layers[0].params / shape.backbone_params
    for axis, request in found.items():
        least = replace(request.prune, ratio=ratio_of(request.prune) - max(layer, 0.02))
        reads = [dry_plan(prune, shape).after for prune in (least, request.prune)]
        more, left = (prefill_flops(each, PROMPT) / prefill_flops(shape, PROMPT) for each in reads)
        assert left <= share < more, axis
    assert len({request.prune.ratio for request in found.values()}) == 3


@pytest.mark.parametrize(
    "asked",
    tiered([{"axis": "chart"}, {"vocab_size": "auto"}], lambda asked: "vocab_size" in asked),
)
def test_a_latency_s_ratio_is_of_the_axis_and_the_tokens_that_are_taken(asked, data):
    model = str(folders.folder("llava"))
    config, shape = PruneConfig(data=str(data), samples=4, **asked), sv.anatomy(model)
    request = Request(model=model, prune=config, recover=RecoverConfig(), latency=0.75)
    found, _, _ = settled(request, None, silent)
    named = replace(request, tokens=found.tokens, prune=replace(config, axis=found.prune.axis))
    assert found.prune.ratio == resolved(named, shape=shape).prune.ratio


@pytest.mark.slow
def test_a_run_meets_its_latency(data, tmp_path, unhurried):
    model, said = str(folders.folder("llava")), []
    shown = {"data": str(data), "samples": 8, "local_steps": 0, "axis": "auto"}
    compress(model, CompressConfig(target_latency=0.7, **shown), tmp_path / "run", say=said.append)
    plan = Plan.load(tmp_path / "run" / "plan.json")
    left = prefill_flops(plan.after, PROMPT) / prefill_flops(plan.before, PROMPT)
    assert 0.5 < left < 0.71  # groups and neurons share anew once they are tried
    assert "target_latency 0.7: measured 1.00 [1.00, 1.00]" in said  # times are made up
    with pytest.raises(ConfigError, match=r"target_latency 0\.7 conflicts with ratio 0\.3"):
        CompressConfig(target_latency=0.7, ratio=0.3)
    with pytest.raises(ImpossiblePlanError, match=r"target_latency 0\.01"):
        compress(model, CompressConfig(target_latency=0.01, **shown), tmp_path / "no", say=silent)


@pytest.mark.parametrize(("losses", "axis"), TABLES["losses"])
def test_the_axis_that_lost_least_is_taken_and_width_of_two_that_are_even(losses, axis, data):
    request, model, _ = opened(data)
    found, note = stages.best_axis(request, losses, read_anatomy(model))
    assert found.prune.axis == axis
    assert note.startswith(f"axis {axis}: validation loss {losses[axis]:.4f} (")


@pytest.mark.slow
def test_a_stopped_run_does_not_try_again(data, tmp_path, monkeypatch):
    shown = {"data": str(data), "samples": 8, "local_steps": 1}
    config = CompressConfig(ratio=0.3, axis="auto", vocab_size="all", **shown)
    model, out = str(folders.folder("llava")), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(stages, "best_axis", stops)
        with pytest.raises(Stopped):
            compress(model, config, out, say=silent)
    monkeypatch.setattr(stages, "try_axes", stops)
    said = []
    compress(model, config, out, say=said.append)
    told, axis = "\n".join(said), Plan.load(out / "plan.json").axis
    assert "short trials of depth" in told
    assert f"axis {axis}: validation loss" in told
