"""The walk of a vision tower: from files as in memory, over patches alone, choices made by hand."""

import copy
import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn import functional as F

import slimvlm as sv
from slimvlm import cli
from slimvlm.core.errors import ConfigError, DataError, ImpossiblePlanError
from slimvlm.core.options import CompressConfig
from slimvlm.pruning.cut import tower_of
from slimvlm.pruning.walk.engine import LayerWalk
from slimvlm.runs.compress import compress
from slimvlm.runs.recipe import resolve
from tests import tiny
from tests import tiny_folder as folders
from tests.handmade import Stopped, assert_equal, logits, plan_by_hand, random_scores
from tests.tiers import tiered
from tests.tolerances import FORWARD, LOSS, assert_close

kinds = pytest.mark.parametrize("kind", tiered(folders.SEEING, ("llava", "internvl").__contains__))
SHARE = {"llava": 0.45, "qwen2_5_vl": 0.2, "idefics3": 0.2, "internvl": 0.2}
"""Of the tower; a third of LLaVA's is a layer that nobody reads."""
CUT_ALONE = {"repair": "width", "local_steps": 0}


def loaded(kind, count=7, sees=True):
    """A tiny model of a folder, and batches of its own processor."""
    model, processor = sv.load(str(folders.folder(kind)))
    samples = folders.short_samples(count, sees)
    return model, [*sv.calibration_batches(processor, samples)]


def vision(model):
    """The weights of the tower, with whatever lies inside it."""
    at = sv.anatomy(model.config).family.vision
    return {name: v for name, v in model.state_dict().items() if name.startswith(f"{at}.")}


@kinds
def test_from_files_is_in_memory(kind, tmp_path):
    model, data = loaded(kind)
    options = {"tower_ratio": SHARE[kind], "local_steps": 2, "held_out": data[:2]}
    expected = sv.walk_(model, data[2:], 0.25, **options)
    found = sv.walk_checkpoint(folders.folder(kind), data[2:], tmp_path / "out", 0.25, **options)
    assert found.plan == expected.plan
    for ours, theirs in (
        (found.tower.report, expected.tower.report),
        (found.report, expected.report),
    ):
        assert ours.refits == theirs.refits
        assert (ours.loss, ours.loss_sliced) == (theirs.loss, theirs.loss_sliced)
        for row, other in zip(ours.layers, theirs.layers, strict=True):
            assert row.distilled == pytest.approx(other.distilled, rel=1e-5)
    sv.save(model, None, tmp_path / "live", expected.plan)
    assert_equal(tmp_path / "out", tmp_path / "live")
    (width,) = {len(units) for units in expected.plan.tower.neurons if units}
    assert width < 48


@pytest.mark.slow
@pytest.mark.parametrize("most", [1, 3, 4])
def test_a_walk_that_goes_down_goes_on(most, tmp_path, monkeypatch):
    """The machine goes down after some entries of the scratch folder were written."""
    _, data = loaded("llava")
    options = {"tower_ratio": 0.45, "local_steps": 2, "held_out": data[:2]}
    folder, scratch = folders.folder("llava"), tmp_path / "scratch"
    expected = sv.walk_checkpoint(folder, data[2:], tmp_path / "whole", 0.25, **options)
    again = partial(sv.walk_checkpoint, folder, data[2:], tmp_path / "out", 0.25, scratch=scratch)
    honest, left = LayerWalk.go, [most]

    def go(self):
        left[0] -= 1
        if left[0] < 0:
            raise Stopped
        return honest(self)

    with monkeypatch.context() as patch:
        patch.setattr(LayerWalk, "go", go)
        with pytest.raises(Stopped):
            again(**options)
    assert not (tmp_path / "out").exists()
    found = again(**options)
    assert found.plan == expected.plan
    assert_equal(tmp_path / "out", tmp_path / "whole")


@kinds
def test_the_decoder_is_walked_behind_the_new_tower(kind):
    """Both at once are the tower first and then the decoder of what is left."""
    (together, data), (apart, _) = loaded(kind), loaded(kind)
    options = {"held_out": data[:2], "local_steps": 2}
    both = sv.walk_(together, data[2:], 0.25, tower_ratio=SHARE[kind], **options)
    tower = sv.walk_(apart, data[2:], 0.0, tower_ratio=SHARE[kind], **options)
    assert tower.plan.ratio == 0
    decoder = sv.walk_(apart, data[2:], 0.25, **options)
    assert both.plan.tower == tower.plan.tower
    for unit in ("layers", "kv_groups", "neurons"):
        assert getattr(both.plan, unit) == getattr(decoder.plan, unit)
    assert_equal(together.state_dict(), apart.state_dict())


@kinds
def test_text_alone_says_nothing_about_a_tower(kind):
    walked = []
    for with_text in (False, True):
        model, data = loaded(kind)
        texts = loaded(kind, 5, sees=False)[1]
        fitted, held_out = data[2:], data[:2]
        if with_text:
            fitted = [texts[0], fitted[0], texts[1], texts[2], *fitted[1:], texts[3]]
        options = {"tower_ratio": SHARE[kind], "local_steps": 2, "held_out": held_out}
        plan = sv.walk_(model, fitted, 0.0, **options).plan
        walked.append((plan.tower, vision(model)))
    (plan, weights), (same_plan, same_weights) = walked
    assert plan == same_plan
    assert_equal(same_weights, weights)


def test_without_any_picture_a_tower_is_not_walked(tmp_path):
    model, texts = loaded("llava", sees=False)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(DataError) as refusal:
        sv.walk_(model, texts, 0.0, tower_ratio=0.45)
    assert "image" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert_equal(model.state_dict(), before)
    with pytest.raises(DataError, match="image"):
        sv.walk_checkpoint(folders.folder("llava"), texts, tmp_path / "out", 0.25, tower_ratio=0.45)
    assert not (tmp_path / "out").exists()


# Padded patches.


def half_empty(name, seed, in_padding):
    """A sequence whose picture (or second picture) ends early; something lies in its padding."""
    model = tiny.build(name)
    found = tiny.batch(model, 12, seed)
    noise = torch.Generator().manual_seed(100 + seed)
    if name == "lfm2_vl":  # 4 x 4 patches, and 2 x 4: four tokens and two
        picture = torch.full((1, 6), tiny.IMAGE_TOKEN)
        ids = torch.cat([found["input_ids"][:, :2], picture, found["input_ids"][:, 2:]], 1)
        pixels = torch.randn(2, 16, 192, generator=noise)
        pixels[1, 8:] *= in_padding
        valid = torch.ones(2, 16, dtype=torch.long)
        valid[1, 8:] = 0
        found = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
        found |= {"spatial_shapes": torch.tensor([[4, 4], [2, 4]])}
    else:
        pixels = torch.randn(1, 1, 3, 32, 32, generator=noise)
        pixels[..., 16:, :] *= in_padding
        valid = torch.ones(1, 1, 32, 32, dtype=torch.long)
        valid[..., 16:, :] = 0
    return {**found, "pixel_values": pixels, "pixel_attention_mask": valid}


@pytest.mark.parametrize("name", ["idefics3", "smolvlm", "idefics2", "lfm2_vl"])
def test_what_lies_in_padding_changes_nothing(name):
    def walked(in_padding, first=0):
        model = tiny.build(name)
        data = [half_empty(name, seed, in_padding) for seed in range(first, first + 4)]
        plan = sv.walk_(model, data, 0.0, tower_ratio=0.2, **CUT_ALONE).plan
        return plan.tower, vision(model)

    plan, weights = walked(0.0)
    for in_padding in (1.0, 30.0):
        same_plan, same_weights = walked(in_padding)
        assert same_plan == plan
        for path, value in weights.items():
            torch.testing.assert_close(same_weights[path], value, atol=1e-5, rtol=1e-4)
    other_plan, other_weights = walked(0.0, first=9)  # what is no padding does change it
    apart = [n for n in weights if not torch.allclose(other_weights[n], weights[n], atol=1e-3)]
    assert apart or other_plan != plan


# Choices that are known beforehand: of 48 neurons, 40 to 47 say nothing, 32 to 39 repeat 0 to 7.

GATED = (("gate_proj", "up_proj"), "down_proj")
PLAIN = (("fc1",), "fc2")
MLPS = {
    "llava-llama": ("vision_tower.encoder.layers", "mlp", *PLAIN),
    "internvl-qwen2": ("vision_tower.encoder.layer", "mlp", *PLAIN),
    "idefics3": ("vision_model.encoder.layers", "mlp", *PLAIN),
    "gemma3": ("vision_tower.encoder.layers", "mlp", *PLAIN),
    "mistral3": ("vision_tower.transformer.layers", "feed_forward", *GATED),
    "qwen2_5_vl": ("visual.blocks", "mlp", *GATED),
    "qwen3_vl": ("visual.blocks", "mlp", ("linear_fc1",), "linear_fc2"),
}
SCALED = "internvl-qwen2"


def mlps(model):
    layers, inside, *names = MLPS[model.name]
    found = []
    for layer in model.model.get_submodule(layers):
        mlp = layer.get_submodule(inside)
        found.append((layer, [getattr(mlp, name) for name in names[0]], getattr(mlp, names[1])))
    return found


@torch.no_grad()
def with_known_choices(name, silent_by="weights"):
    model = tiny.build(name)
    model.name = name
    for layer, firsts, last in mlps(model):
        for first in firsts:
            first.weight *= 30  # else all are nearly linear, and most repeat others
            first.weight[32:40] = first.weight[:8]
            if first.bias is not None:
                first.bias[32:40] = first.bias[:8]
        if silent_by == "weights":
            last.weight[:, 40:] = 0
        else:  # they write, loudly, to what is not read
            layer.lambda_2[:16] = 0
            last.weight[16:, 40:] = 0
            last.weight[:16, 40:] *= 10
    return model


@torch.no_grad()
def features(model, batch):
    taken = []
    at = sv.anatomy(model.config).family.projector[0]
    hook = model.get_submodule(at).register_forward_hook(lambda *found: taken.append(found[2]))
    logits(model, batch)
    hook.remove()
    return taken[0]


@pytest.mark.parametrize(
    ("name", "silent_by"), [*((name, "weights") for name in MLPS), (SCALED, "scale")]
)
def test_known_choices(name, silent_by):
    model = with_known_choices(name, silent_by)
    data = []
    for seed in range(10):
        batch, generator = tiny.batch(model, 12, seed), torch.Generator().manual_seed(seed)
        pixels = torch.randn(batch["pixel_values"].shape, generator=generator)
        data.append({**batch, "pixel_values": pixels})
    anatomy, before = sv.anatomy(model.config), [features(model, batch) for batch in data]
    layers = range(anatomy.tower.num_layers - anatomy.tower.unread)
    share = plan_by_hand(anatomy.tower, layers, neurons=range(32)).ratio
    plan = sv.walk_(model, data, 0.0, tower_ratio=share, **CUT_ALONE).plan.tower
    for index in layers:
        kept = set(plan.neurons[index])
        assert len(kept) == 32
        assert not kept & {*range(40, 48)}
        copies = [(unit in kept) + (unit + 32 in kept) for unit in range(8)]
        # some may happen to be off for all patches, and go before a copy does
        off = len({*range(8, 32)} - kept) + copies.count(0)
        assert off <= 4
    for batch, expected in zip(data, before, strict=True):
        apart = (features(model, batch) - expected).norm() / expected.norm()
        assert float(apart) < 0.02, float(apart)
    # without the refit, a lost copy is missed
    sliced = with_known_choices(name, silent_by)
    by_hand = sv.Plan.from_dict({**sv.Plan.everything(anatomy).to_dict(), "tower": plan.to_dict()})
    sv.prune_(sliced, by_hand)
    missed = (features(sliced, data[0]) - before[0]).norm() / before[0].norm()
    assert float(missed) > 3 * float(apart)


@torch.no_grad()
def answer_loss(model, batches):
    losses = [
        F.cross_entropy(logits(model, b)[0, :-1], b["labels"][0, 1:], reduction="sum")
        for b in batches
    ]
    return float(sum(losses)) / sum(int((b["labels"][0, 1:] != -100).sum()) for b in batches)


@kinds
def test_the_whole_model_s_answers_judge(kind):
    """The reported losses are the pruned model's, and the smaller one is kept."""
    model, data = loaded(kind)
    sliced = copy.deepcopy(model)
    options = {"tower_ratio": SHARE[kind], "held_out": data[:1], "local_steps": 2}
    walked = sv.walk_(model, data[1:], 0.0, **options)
    report = walked.tower.report
    assert report.loss == pytest.approx(answer_loss(model, data[:1]), rel=10 * LOSS.rtol)
    sv.prune_(sliced, walked.plan)
    assert report.loss_sliced == pytest.approx(answer_loss(sliced, data[:1]), rel=10 * LOSS.rtol)
    assert report.loss <= report.loss_sliced


# Plans that someone else has made, and data that say nothing.
@pytest.mark.parametrize("name", tiered(MLPS, ("llava-llama", "qwen3_vl").__contains__))
def test_a_tower_alone_is_scored_by_its_weights(name):
    model = tiny.build(name)
    scores = sv.score(tower_of(model), (), "magnitude")
    shape = sv.anatomy(model.config)
    ratio = 0.45 if shape.tower.unread else 0.2
    plan = sv.make_plan(shape, [], 0.0, tower_ratio=ratio, tower_scores=scores).tower
    for index in plan.layers:
        best = scores.neuron[index].topk(len(plan.neurons[index])).indices
        assert {*plan.neurons[index]} == {*best.tolist()}


def test_without_data_neurons_go_by_their_weights(tmp_path):
    config = CompressConfig(ratio=0.0, tower_ratio=0.2)
    folder = str(folders.folder("idefics3"))
    run = compress(folder, config, tmp_path / "run")
    assert run.plan.tower.criteria == {"neuron": "magnitude"}
    assert run.plan.ratio == 0
    prune_from = ["prune", folder, "--tower-ratio", "0.2", "--low-memory", "--out"]
    cli.main([*prune_from, str(tmp_path / "files")])
    assert sv.Plan.load(tmp_path / "files" / "slimvlm_plan.json").tower == run.plan.tower


def test_a_plan_of_before_towers_still_applies(tmp_path):
    model = tiny.build("llava-llama")
    values = sv.make_plan(sv.anatomy(model), random_scores(sv.anatomy(model)), 0.3).to_dict()
    del values["tower"]
    for name in ("tower", "unread", "head_neuron_params"):
        del values["before"][name]
    plan = sv.Plan.from_dict(json.loads(json.dumps(values)))
    expected = copy.deepcopy(model)
    sv.mask_(expected, plan)
    sv.prune_(model, plan)
    batch = tiny.batch(model)
    assert_close(logits(model, batch), logits(expected, batch), FORWARD)
    sv.save(model, None, tmp_path / "out", plan)


@pytest.mark.parametrize("has_data", [True, False])
def test_neurons_that_a_person_chose_stay(has_data, tmp_path):
    model, data = loaded("idefics3")
    shape = sv.anatomy(model)
    plan = sv.make_plan(shape, [], 0.0, tower_ratio=0.2)
    mine = tuple(range(3, 3 + len(plan.tower_neurons[0])))
    tower = replace(plan.tower, neurons=(mine,) * len(plan.tower.neurons))
    plan = replace(plan, tower=tower)
    if has_data:
        assert sv.walk_(model, data, plan=plan).plan.tower.neurons == tower.neurons
        return
    plan.save(tmp_path / "plan.json")
    asked = ["prune", str(folders.folder("idefics3")), "--plan", str(tmp_path / "plan.json")]
    cli.main([*asked, "--out", str(tmp_path / "out")])
    assert sv.Plan.load(tmp_path / "out" / "slimvlm_plan.json").tower.neurons == tower.neurons


def test_layers_that_nobody_reads_go_from_every_plan_that_is_walked():
    model, data = loaded("llava")
    shape = sv.anatomy(model)
    tower = plan_by_hand(shape.tower, neurons=range(8))
    plan = replace(sv.Plan.everything(shape), tower=tower)
    found = sv.walk_(model, data, plan=plan).plan
    assert found.tower.layers == tower.layers[:-1]
    assert sv.anatomy(model) == found.after


def test_a_latency_tries_no_tower_where_no_sample_has_an_image(tmp_path):
    data = str(folders.write_llava_data(tmp_path / "data", 40, pictures=False))
    asked = {"target_latency": 0.85, "axis": "width", "data": data, "samples": 12}
    folder = str(folders.folder("llava"))
    recipe, _, _ = resolve(folder, CompressConfig(**asked, recover="none"))
    assert recipe.trials == ()
    with pytest.raises(ConfigError, match=r"tower_ratio 0\.4 needs images, and none of the 1"):
        resolve(folder, CompressConfig(tower_ratio=0.4, data=data, samples=12, recover="none"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda tower: tower.update(layers=[5]), r"tower: plan: layers must be sorted"),
        (lambda tower: tower["before"].update(unread=7), "another vision tower"),
        (lambda tower: tower.update(neurons=[[0], [0, 1]]), "equally wide"),
    ],
)
def test_a_wrong_tower_in_a_plan_is_named(change, told):
    shape = sv.anatomy(tiny.CONFIGS["idefics3"]())
    values = json.loads(json.dumps(sv.make_plan(shape, [], 0.0, tower_ratio=0.2).to_dict()))
    change(values["tower"])
    with pytest.raises((ConfigError, ImpossiblePlanError), match=told):
        sv.Plan.from_dict(values)
