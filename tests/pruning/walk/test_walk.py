"""The walk: exact where it can be, never worse where it is fitted or judged."""

import copy
from itertools import accumulate, product
from pathlib import Path

import pytest
import torch
import yaml

from slimvlm.core import errors
from slimvlm.core.errors import NumericalError
from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.load import auto_class
from slimvlm.models.parts import Parts
from slimvlm.planning.make import make_plan, width_candidates
from slimvlm.planning.plan import Plan
from slimvlm.pruning.walk.engine import cheapest_plan
from slimvlm.pruning.walk.streams import PREFIX, Streams
from slimvlm.pruning.walk.walk import walk_
from slimvlm.scoring.batches import answer_loss
from slimvlm.scoring.forward import capture_grams
from slimvlm.scoring.layerwise import LayerwiseModel, Live
from slimvlm.scoring.score_model import score
from slimvlm.scoring.stores import Memory
from tests import tiny
from tests.handmade import (
    assert_equal,
    assert_untouched,
    logits,
    padded,
    plan_by_hand,
    random_scores,
    snapshot,
)
from tests.pruning.pruned import batches, build, doubled, narrow, sliced
from tests.scoring.test_obs import by_inverting
from tests.tiers import tiered
from tests.tolerances import SOLVE, assert_close

FAMILIES = ["llama", "mistral", "phi", "phi3", "gemma3", "qwen2_5_vl", "qwen3_vl", "llava-phi"]


@torch.no_grad()
def final_hidden(model, data):
    inputs = [{k: v for k, v in batch.items() if k != "labels"} for batch in data]
    outputs = [model.base_model(**x, use_cache=False).last_hidden_state for x in inputs]
    return torch.cat([output.flatten(0, 1) for output in outputs])


def walked(model, *args, **options):
    """A copy of the model after a walk, and what the walk says."""
    student = copy.deepcopy(model)
    return student, walk_(student, *args, **options)


# Repair
@pytest.mark.parametrize("name", tiered(FAMILIES, lambda name: name in ("phi", "qwen3_vl")))
def test_repair_comes_nearer_and_walking_layer_by_layer_is_the_model(name, tmp_path):
    model = build(name)
    data = batches(model)
    goal = final_hidden(model, data)
    plan = narrow(model, [0, 1, 3])
    student, found = walked(model, data, plan=plan, repair="both", ridge=1e-3)
    error = (final_hidden(student, data) - goal).square().sum()
    assert error < 0.75 * (final_hidden(sliced(model, plan), data) - goal).square().sum()
    assert found.plan == plan
    assert all(row.repaired < row.sliced for row in found.report.refits.values())
    assert "\n" not in found.report.summary()
    student.save_pretrained(tmp_path)
    again = auto_class(student.config).from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert torch.equal(logits(again, data[0]), logits(student, data[0]))
    assert_layer_by_layer_is_the_model(model, data[:2])


def blind(batch):
    """A batch without its picture."""
    return {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}


@torch.no_grad()
def assert_layer_by_layer_is_the_model(model, data):
    seen = []
    handle = Parts(model).norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    final_hidden(model, data)
    handle.remove()
    runner = LayerwiseModel(Live(model), Memory(), model.device)
    runner.embed(data)
    for index in range(len(runner.layers)):
        runner.pass_on(PREFIX, index, index + 1, runner.places)
    for place, expected in enumerate(seen):
        assert_close(runner.state(PREFIX, len(runner.layers), place), expected, SOLVE)


def test_layers_that_batches_without_pictures_skip_stay_as_they_are():
    """Mllama's cross-attention layers: 1 and 3."""
    model = build("mllama")
    data = list(map(blind, batches(model)))
    assert_layer_by_layer_is_the_model(model, data)
    before = snapshot(model)
    plan = plan_by_hand(read_anatomy(model), neurons=range(64))
    _, found = walked(model, data, plan=plan, repair="both", local_steps=1, held_out=data[:1])
    assert "no calibration batch runs layer 1, 3" in found.report.summary()
    touched = {index for index, _ in found.weights}
    assert touched == {0, 2, 4}
    assert_untouched(model, before)


@pytest.mark.parametrize(
    "form",
    tiered(["none", "width", "depth", "both", "auto"], lambda form: form in ("both", "auto")),
)
def test_nothing_removed_changes_no_bit(form):
    model = tiny.build("llava-phi")
    data = [tiny.batch(model, 24, seed) for seed in range(6)]
    before = snapshot(model)
    everything = Plan.everything(read_anatomy(model))
    found = walk_(model, data, plan=everything, repair=form, local_steps=0)
    assert (found.plan, dict(found.weights)) == (everything, {})
    assert_untouched(model, before)


def test_padding_and_tokens_of_weight_zero_change_nothing():
    model = build("llava-llama")
    plan = narrow(model, [0, 1, 3])
    data = [doubled(tiny.batch(model, tokens, seed)) for seed, tokens in enumerate((24, 16, 20))]
    weights = {"answer": 0.0}

    def after(data, token_weights=None):
        options = {"plan": plan, "repair": "both", "token_weights": token_weights}
        return walked(model, data, **options)[0].state_dict()

    expected = after(data, weights)
    other = copy.deepcopy(data)
    for batch in other:  # answers come last: nothing before can see them
        answers = batch["labels"] != -100
        batch["input_ids"][answers] = 99
    for changed in (other, [padded(data)]):
        for name, value in after(changed, weights).items():
            torch.testing.assert_close(value, expected[name], atol=1e-8, rtol=1e-8)
    unweighted = after(data)
    assert any(not torch.allclose(unweighted[k], v, atol=1e-3) for k, v in expected.items())


@pytest.mark.parametrize(
    "layers", tiered([None, [0, 1], [1, 2, 3]], lambda layers: layers == [1, 2, 3])
)
def test_auto_is_never_worse_than_slicing_on_held_out_answers(layers):
    model = build("llama")
    data, judges = batches(model, 4), batches(model, 8)[4:]
    plan = narrow(model, layers)
    student, found = walked(model, data, plan=plan, held_out=judges)
    report = found.report
    assert report.loss == pytest.approx(answer_loss(student, judges), rel=1e-6)
    assert report.loss_sliced == pytest.approx(answer_loss(sliced(model, plan), judges), rel=1e-6)
    assert report.loss <= report.loss_sliced
    assert all(row.repaired <= row.sliced for row in report.refits.values())
    assert all(0 <= row.share <= 1 for row in report.refits.values())
    gone = "the first layers are removed: no layer before them could be repaired"
    assert (gone in report.notes) == (layers == [1, 2, 3])


def test_auto_refuses_a_repair_that_hurts_or_gains_nothing():
    """Fitted on too few tokens, a repair helps there and nowhere else."""
    model = build("llama")
    data, judges = batches(model, 1, 8), batches(model, 8)[4:]
    plan = narrow(model)
    spoilt, _ = walked(model, data, plan=plan, repair="both", ridge=0.0)
    student, found = walked(model, data, plan=plan, repair="auto", ridge=0.0, held_out=judges)
    assert all(row.share < 1 for row in found.report.refits.values())
    goal = final_hidden(model, judges)
    errors = [(final_hidden(m, judges) - goal).square().sum() for m in (student, spoilt)]
    assert errors[0] < errors[1]
    # the right answers are what the sliced model says
    data, plain = batches(model, 4), sliced(model, plan)
    for batch in judges:
        batch["labels"][:, 1:] = logits(plain, batch)[:, :-1].argmax(-1)
    student, found = walked(model, data, plan=plan, held_out=judges)
    assert dict(found.weights) == {}
    assert found.report.loss == found.report.loss_sliced
    assert "they were dropped" in found.report.summary()
    assert_untouched(student, snapshot(plain))


def test_a_norm_behind_the_mlp_keeps_its_seam():
    model = build("gemma3")
    data, plan = batches(model), plan_by_hand(read_anatomy(model), [0, 1, 3])
    student, found = walked(model, data, plan=plan, repair="depth")
    assert len(found.report.notes) == 1
    assert "layer 1" in found.report.notes[0]
    assert_equal(student.state_dict(), sliced(model, plan).state_dict())


MISTAKES = yaml.safe_load(Path(__file__).with_name("walks.yaml").read_text())["mistakes"]


@pytest.mark.parametrize(("options", "error", "message"), MISTAKES)
def test_mistakes_leave_the_model_alone(options, error, message):
    model = tiny.build("llama")
    before, plan = snapshot(model), narrow(model)
    data = [tiny.batch(model, 12, seed) for seed in range(5)]
    with pytest.raises(getattr(errors, error), match=message):
        walk_(model, **{"batches": data, "plan": plan, **options})
    assert_untouched(model, before)


def test_infinity_is_named_with_its_layer_and_the_model_stays():
    model = tiny.build("llama")
    data, plan = [tiny.batch(model, 12, seed) for seed in range(3)], narrow(model)
    Parts(model).layers[2].mlp.up_proj.weight.data[5] = torch.inf
    before = snapshot(model)
    with pytest.raises(NumericalError, match=r"2\.mlp\.down_proj"):
        walk_(model, data, plan=plan, repair="width")
    assert_untouched(model, before)


def test_half_precision_stays():
    model = tiny.build("llama").bfloat16()
    data = [tiny.batch(model, 24, seed) for seed in range(6)]
    plan = narrow(model, [0, 1, 3])
    goal, student = final_hidden(model, data).float(), sliced(model, plan)
    before = (final_hidden(student, data).float() - goal).square().sum()
    student, _ = walked(model, data, plan=plan, repair="both")
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}
    assert (final_hidden(student, data).float() - goal).square().sum() < 0.75 * before


# What the walk chooses
def test_units_are_those_of_a_plan_of_scores_or_of_the_highest_scores():
    model = tiny.build("llama")
    anatomy = read_anatomy(model)
    data = [tiny.batch(model, 12, seed) for seed in range(5)]
    scores = random_scores(anatomy)
    expected = make_plan(anatomy, scores, 0.3, "both")
    for given in ({"plan": expected}, {"ratio": 0.3, "axis": "both", "scores": scores}):
        student, found = walked(model, data, **given)
        assert found.plan == expected
        assert found.scores is None
        assert read_anatomy(student).layers == expected.after.layers
    _, found = walked(model, data, 0.5, "both", allocation="uniform", kv_heads=2)
    assert found.scores.criterion == "obs"
    for unit, kept in (("kv_group", found.plan.kv_groups), ("neuron", found.plan.neurons)):
        for index, values in enumerate(found.scores.of(unit)):
            assert len(values) == found.plan.before.layers[index].units(unit)
            if index not in found.plan.layers:
                assert not values.any()
                continue
            is_kept = torch.zeros(len(values), dtype=torch.bool)
            is_kept[list(kept[index])] = True
            assert 0 < is_kept.sum() < len(values)
            assert values[is_kept].min() > values[~is_kept].max()


def test_the_choice_is_that_of_the_criterion_where_the_inputs_are_the_same():
    """In the first layer: KV groups of the original's, neurons behind what is left of them."""
    model = tiny.build("llama")
    data = [tiny.batch(model, 24, seed) for seed in range(4)]
    options = {"allocation": "uniform", "kv_heads": 2, "repair": "none"}
    student, found = walked(model, data, 0.3, **options)
    scores = score(model, data, "obs")
    kept = found.plan.kv_groups[0]
    assert kept == tuple(sorted(scores.kv_group[0].topk(len(kept)).indices.tolist()))
    half = plan_by_hand(found.plan.before, kv_groups=kept)
    behind = score(sliced(model, half), data, "obs").neuron[0]
    kept = found.plan.neurons[0]
    assert kept == tuple(sorted(behind.topk(len(kept)).indices.tolist()))
    assert_untouched(student, snapshot(sliced(model, found.plan)))


@pytest.mark.parametrize(
    ("seed", "ratio"), tiered(product([0, 1], [0.25, 0.4]), lambda *case: case == (1, 0.25))
)
def test_balanced_is_the_cheapest_of_all_plans(ratio, seed):
    torch.manual_seed(seed)
    config = tiny.llama(intermediate_size=48, num_hidden_layers=2)
    model = auto_class(config).from_config(config, dtype=torch.float32).eval()
    data = [tiny.batch(model, 24, seed) for seed in range(4)]
    plans = width_candidates(read_anatomy(model), [], ratio, "width", "obs", round_to=1)
    assert len(plans) > 1
    totals = [0.0] * len(plans)
    statistics = capture_grams(model, data)
    for index in range(2):
        places = [(index, f"{path}_proj") for path in ("self_attn.o", "mlp.down")]
        pairs = [(statistics.matrices[place], statistics.parts[place].gram) for place in places]
        written = sum(float((weight @ gram * weight).sum()) for weight, gram in pairs)
        of_groups, of_neurons = (
            list(accumulate(by_inverting(weight.double(), gram.double(), width)[1], initial=0.0))
            for (weight, gram), width in zip(pairs, (16, 1), strict=True)
        )
        for place, plan in enumerate(plans):
            gone = 4 - len(plan.kv_groups[index]), 48 - len(plan.neurons[index])
            totals[place] += (of_groups[gone[0]] + of_neurons[gone[1]]) / written
    _, found = walked(model, data, ratio, repair="none", round_to=1)
    cheapest = plans[totals.index(min(totals))]
    assert found.plan.after.layers == cheapest.after.layers


# Local distillation
def test_no_local_steps_change_nothing():
    model = tiny.build("llama")
    data = [tiny.batch(model, 24, seed) for seed in range(5)]
    plan = narrow(model, [0, 1, 3])
    student, found = walked(model, data, plan=plan, repair="none", local_steps=0)
    assert_untouched(student, snapshot(sliced(model, plan)))
    assert {layer.distilled for layer in found.report.layers} == {None}


@torch.no_grad()
def first_error(student, model, end, data):
    """Mean over tokens of how far the first layer's output is from what a later one reads."""
    shares = []
    for batch in data:
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        given, wanted = (
            m(**inputs, output_hidden_states=True).hidden_states[i]
            for m, i in ((student, 1), (model, end))
        )
        share = (given - wanted).norm(dim=-1) / wanted.norm(dim=-1)
        shares.append(torch.where(share <= 1, share.square(), 2 * share - 1))
    return float(torch.cat(shares, 1).mean())


@pytest.mark.parametrize(
    ("layers", "repair"),
    tiered(
        product([[0, 2, 3], [1, 2, 3]], ["none", "both"]),
        lambda layers, repair: (layers[0], repair) == (1, "both"),
    ),
)
def test_a_distilled_layer_is_nearer_to_the_original_on_held_out_states(repair, layers):
    model = tiny.build("llama")
    data = [tiny.batch(model, 24, seed) for seed in range(6)]
    judges = [tiny.batch(model, 20, seed) for seed in range(6, 9)]
    options = {"plan": narrow(model, layers), "repair": repair, "held_out": judges}
    student, found = walked(model, data, local_steps=12, **options)
    before, _ = walked(model, data, **options)
    pairs = [layer.distilled for layer in found.report.layers]
    assert all(pair is not None and pair[1] <= pair[0] for pair in pairs)
    assert pairs[0][1] < pairs[0][0]
    for pruned, error in zip((before, student), pairs[0], strict=True):
        assert first_error(pruned, model, layers[1], judges) == pytest.approx(error, rel=1e-4)
    assert {index for index, _ in found.weights} == {*layers}


def test_batches_that_teach_a_layer_nothing_are_passed_over():
    """Without pictures Mllama skips layers; tokens of weight zero have no error."""
    model = tiny.build("mllama")
    data = [tiny.batch(model, 12, seed) for seed in range(4)]
    data[1] = blind(data[1])
    data[2]["labels"][:] = -100
    plan = plan_by_hand(read_anatomy(model), neurons=range(64))
    options = {"token_weights": {"image": 0.0, "prompt": 0.0}, "repair": "none"}
    student, found = walked(model, data[:3], plan=plan, local_steps=3, held_out=data[3:], **options)
    assert all(layer.distilled is not None for layer in found.report.layers)
    assert all(value.isfinite().all() for value in student.state_dict().values())


# What stays as it was
@pytest.mark.parametrize("index", tiered(range(4), lambda index: index == 2))
def test_a_walk_that_stops_leaves_the_model_alone(index, monkeypatch):
    """When the layer is cut, refitted and trained."""
    model = tiny.build("llama")
    data = [tiny.batch(model, 12, seed) for seed in range(5)]
    before, said = snapshot(model), logits(model, data[0])
    honest = Streams.pass_on

    def stops(self, stream, at, *args):
        if (stream, at) == (PREFIX, index):
            raise KeyboardInterrupt
        honest(self, stream, at, *args)

    monkeypatch.setattr(Streams, "pass_on", stops)
    with pytest.raises(KeyboardInterrupt):
        walk_(model, data, 0.4, local_steps=1, round_to=1)
    assert_untouched(model, before)
    assert torch.equal(logits(model, data[0]), said)


def test_counting_by_layer_goes_through_a_walk():
    model = tiny.build("llama")
    data = [tiny.batch(model, 12, seed) for seed in range(5)]
    assert walk_(model, data, 0.3, counting="per_layer").plan.ratio > 0.1


def test_layers_with_attention_decide_how_much_of_it_goes(monkeypatch):
    """Three of four layers of Qwen 3.5 have none that can go."""
    model = tiny.build("qwen3_5")
    shapes = read_anatomy(model).layers
    assert {bool(shape.num_kv_heads) for shape in shapes} == {True, False}
    honest, seen = Streams.moments, set()

    def noted(self, name, writer, places):
        seen.add(writer.index)
        return honest(self, name, writer, places)

    monkeypatch.setattr(Streams, "moments", noted)
    plans = width_candidates(read_anatomy(model), (), 0.2, "width", "obs")
    assert len(plans) > 1
    data = [tiny.batch(model, 12, seed) for seed in range(2)]
    streams = Streams(Live(model), Memory(), torch.device("cpu"), None)
    with torch.no_grad():
        streams.embed_all(data, [])
        cheapest_plan(streams, plans)
    assert seen
    assert all(shapes[index].num_kv_heads for index in seen)
