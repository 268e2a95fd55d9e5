"""Budgets, counting, ties, refusals: the units that `make_plan` keeps."""

import math
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from slimvlm.core.errors import ConfigError, ImpossiblePlanError, SlimError
from slimvlm.models.anatomy import read_anatomy
from slimvlm.planning.make import (
    Budget,
    channels_to_remove,
    default_multiple,
    make_plan,
    make_plan_for_params,
    ratio_for_params,
    width_candidates,
)
from slimvlm.planning.plan import Plan
from slimvlm.scoring.unit_scores import Scores
from tests import tiny
from tests.handmade import random_scores
from tests.planning.anatomies import (
    SYNTHETIC,
    TINY,
    anatomy_named,
    scores_named,
    step_of,
    synthetic,
)

anatomies = st.sampled_from([*TINY, *SYNTHETIC])
axes = st.sampled_from(["depth", "width", "both"])


def counted_ratio(plan):
    """The share of the backbone that a plan removes, counted unit by unit."""
    removed = 0
    for index, shape in enumerate(plan.before.layers):
        if index not in plan.layers:
            removed += shape.params
            continue
        removed += (shape.num_kv_heads - len(plan.kv_groups[index])) * shape.kv_group_params
        removed += (shape.intermediate_size - len(plan.neurons[index])) * shape.neuron_params
    return removed / plan.before.backbone_params


# The budget
@given(anatomies, axes, st.floats(0, 0.42), st.integers(0, 5))
def test_budgets_are_hit_within_a_step(name, axis, ratio, seed):
    anatomy = anatomy_named(name)
    plan = make_plan(anatomy, random_scores(anatomy, seed), ratio, axis)
    assert plan.asked_ratio == ratio
    assert plan.ratio == pytest.approx(counted_ratio(plan), abs=1e-12)
    assert plan.before.backbone_params - plan.after.backbone_params == round(
        plan.ratio * anatomy.backbone_params
    )
    share = 0.5 if axis == "depth" else 1  # whole layers: the nearest count
    assert abs(plan.ratio - ratio) <= share * step_of(anatomy, axis) + 1e-9


@given(anatomies, st.sampled_from(["width", "both"]), st.floats(0, 0.4))
def test_uniform_plans_are_equally_wide_and_legal(name, axis, ratio):
    anatomy = anatomy_named(name)
    plan = make_plan(anatomy, scores_named(name), ratio, axis)
    assert plan.after.is_uniform
    shape, multiple = plan.after.layers[0], default_multiple(anatomy)
    assert shape.num_kv_heads in anatomy.legal_kv_heads()
    full = anatomy.layers[0].intermediate_size
    assert shape.intermediate_size == full or shape.intermediate_size % multiple == 0


@given(anatomies, axes, st.floats(0, 0.4))
def test_the_best_units_stay(name, axis, ratio):
    anatomy, scores = anatomy_named(name), scores_named(name)
    plan = make_plan(anatomy, scores, ratio, axis)

    def check(values, kept):
        gone = sorted(set(range(len(values))) - set(kept))
        assert list(kept) == sorted(kept)
        if gone and kept:
            assert values[list(kept)].min() >= values[gone].max()

    free = [i for i in range(anatomy.num_layers) if i not in anatomy.pinned_layers]
    check(scores.layer[free], tuple(free.index(i) for i in plan.layers if i in free))
    for index in plan.layers:
        check(scores.kv_group[index], plan.kv_groups[index])
        check(scores.neuron[index], plan.neurons[index])


@given(anatomies, axes)
def test_ratio_zero_keeps_everything(name, axis):
    anatomy = anatomy_named(name)
    plan = make_plan(anatomy, scores_named(name), 0.0, axis)
    everything = Plan.everything(anatomy)
    assert plan.ratio == 0
    assert plan.after == anatomy
    kept = (plan.layers, plan.kv_groups, plan.neurons)
    assert kept == (everything.layers, everything.kv_groups, everything.neurons)


@settings(max_examples=10)
@given(st.sampled_from([1, 2, 16, 32, 64, 128, 256]), st.floats(0.05, 0.5))
def test_round_to_is_obeyed(round_to, ratio):
    anatomy = anatomy_named("7b")
    plan = make_plan(anatomy, scores_named("7b"), ratio, "width", round_to=round_to)
    assert plan.after.layers[0].intermediate_size % round_to == 0
    assert abs(plan.ratio - ratio) <= step_of(anatomy, "width", round_to) + 1e-9


def test_both_splits_the_budget_and_units_share_that_of_widths():
    anatomy = anatomy_named("7b")
    plan = make_plan(anatomy, scores_named("7b"), 0.4, "both")
    gone = anatomy.num_layers - len(plan.layers)
    by_layers = gone * anatomy.layers[0].params / anatomy.backbone_params
    assert by_layers == pytest.approx(0.2, abs=0.5 * step_of(anatomy, "depth"))
    assert plan.ratio == pytest.approx(0.4, abs=0.005)
    plan = make_plan(anatomy, scores_named("7b"), 0.3, "width")
    shape, before = plan.after.layers[0], plan.before.layers[0]
    groups = 1 - shape.num_kv_heads / before.num_kv_heads
    assert groups == pytest.approx(1 - shape.intermediate_size / before.intermediate_size, abs=0.04)


# Protected layers
@given(
    anatomies,
    axes,
    st.floats(0, 0.25),
    st.tuples(st.integers(0, 1), st.integers(0, 1)),
    st.sampled_from(["parameters", "per_layer"]),
)
def test_protected_layers_stay_whole(name, axis, ratio, protect, counting):
    anatomy = anatomy_named(name)
    options = {"protect": protect, "counting": "parameters" if axis == "both" else counting}
    plan = make_plan(anatomy, scores_named(name), ratio, axis, **options)
    count = anatomy.num_layers
    with suppress(SlimError):  # with a large ratio every layer between may go
        large = make_plan(anatomy, scores_named(name), 2 * ratio + 0.4, "depth", **options)
        assert {*range(protect[0]), *range(count - protect[1], count)} <= {*large.layers}
    for index in (*range(protect[0]), *range(count - protect[1], count)):
        assert index in plan.layers
        assert len(plan.kv_groups[index]) == anatomy.layers[index].num_kv_heads
        assert len(plan.neurons[index]) == anatomy.layers[index].intermediate_size
    if counting == "parameters":
        share = 0.5 if axis == "depth" else 1
        assert abs(plan.ratio - ratio) <= share * step_of(anatomy, axis) + 1e-9


# LLM-Pruner's counting (REFERENCE.md)
@pytest.mark.parametrize("row", yaml.safe_load(Path(__file__).with_name("counts.yaml").read_text()))
def test_per_layer_counts(row):
    kv_heads, head_dim, neurons, ratio, *left = row
    anatomy = synthetic(3, kv_heads, 1, head_dim, neurons, 64, 128)
    plan = make_plan(anatomy, random_scores(anatomy), ratio, "width", counting="per_layer")
    for shape in plan.after.layers:
        assert [shape.num_kv_heads, shape.intermediate_size] == left


def test_per_layer_is_a_share_of_the_unprotected_layers_and_follows_the_query_groups():
    anatomy = synthetic(10, 4, 1, 8, 96, 64, 128)
    options = {"counting": "per_layer", "protect": (1, 1)}
    depth, width = (
        make_plan(anatomy, random_scores(anatomy), 0.25, axis, **options)
        for axis in ("depth", "width")
    )
    assert len(depth.layers) == 8  # 8 - floor(8 * 0.75) go
    assert [len(kept) for kept in width.neurons] == [96, *[72] * 8, 96]
    anatomy = anatomy_named("llama")  # four KV heads with two queries each
    plan = make_plan(anatomy, scores_named("llama"), 0.5, "width", counting="per_layer")
    shape = plan.after.layers[0]
    assert (shape.num_heads, shape.num_kv_heads, shape.intermediate_size) == (4, 2, 48)
    rounded = make_plan(anatomy, scores_named("llama"), 0.3, counting="per_layer", round_to=8)
    assert rounded.after.layers[0].intermediate_size == 64  # of 67


# Ties and runs
def test_of_equal_units_the_later_stay_and_runs_of_layers_go_together():
    anatomy, groups = anatomy_named("llama"), [torch.ones(4)] * 4
    equal = Scores("equal", layer=torch.ones(4), kv_group=groups, neuron=[torch.ones(96)] * 4)
    depth, width = (
        make_plan(anatomy, equal, 0.5, axis, counting="per_layer") for axis in ("depth", "width")
    )
    assert depth.layers == (2, 3)
    assert width.kv_groups == ((2, 3),) * 4
    assert width.neurons == (tuple(range(48, 96)),) * 4
    anatomy = synthetic(6, 4, 1, 8, 96, 64, 16)
    runs = torch.full((6, 6), 9.0)
    runs[0] = torch.tensor([9, 0, 9, 0, 9, 9])  # single layers say 1 and 3
    runs[1, 4] = 1.0  # the best run of two is 4, 5
    scores = Scores("angular", layer=runs[0].clone(), layer_runs=runs)
    options = {"counting": "per_layer"}
    assert make_plan(anatomy, scores, 0.3, "depth", **options).layers == (0, 1, 2, 3)
    protected = make_plan(anatomy, scores, 0.4, "depth", protect=(0, 1), **options)
    assert protected.layers == (2, 3, 4, 5)  # 4, 5 may not go: the first of the equal runs does


def test_the_first_scores_that_cover_a_unit_count_and_units_without_scores_stay_whole():
    anatomy = anatomy_named("llama")
    first, second = random_scores(anatomy, 1), random_scores(anatomy, 2)
    plan, own, other = (
        make_plan(anatomy, scores, 0.3, "width", counting="per_layer")
        for scores in ([Scores("mine", neuron=first.neuron), second], first, second)
    )
    assert plan.neurons == own.neurons != other.neurons
    assert plan.kv_groups == other.kv_groups
    assert dict(plan.criteria) == {"kv_group": "by-hand", "neuron": "mine"}
    before = anatomy.layers[0]
    for unit in ("kv_group", "neuron"):
        only = Scores("one", **{unit: scores_named("llama").of(unit)})
        shape = make_plan(anatomy, only, 0.2, "width").after.layers[0]
        assert (shape.num_kv_heads < before.num_kv_heads) == (unit == "kv_group")
        assert (shape.intermediate_size < before.intermediate_size) == (unit == "neuron")


# Refusals

ODD = synthetic(5, 3, 1, 8, 90, 64, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(
            ({"ratio": ratio, "axis": axis}, rf"ratio {ratio}.*at least 0 and below 1")
            for ratio in (1.0, 1.2, -0.1, math.nan, math.inf)
            for axis in ("depth", "width", "both")
        ),
        *(
            ({"anatomy": ODD, "scores": scores_named(other), "axis": axis}, "another model")
            for other in ("phi", "7b")
            for axis in ("depth", "width", "both")
        ),
        *yaml.safe_load(Path(__file__).with_name("refusals.yaml").read_text()),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    usual = {"anatomy": anatomy_named("llama"), "scores": scores_named("llama"), "ratio": 0.2}
    lists = {name: tuple(value) for name, value in options.items() if isinstance(value, list)}
    with pytest.raises(ConfigError, match=message):
        make_plan(**{**usual, **options, **lists})


@pytest.mark.parametrize(
    ("axis", "missing"), [("depth", "layer"), ("both", "layer"), ("width", "neuron")]
)
def test_missing_scores_are_named(axis, missing):
    anatomy, scores = anatomy_named("llama"), scores_named("llama")
    kept = ("layer",) if missing == "neuron" else ("kv_group", "neuron")
    wrong = Scores("half", **{unit: scores.of(unit) for unit in kept})
    for scores, told in ((wrong, "'half'"), ([], "none")):
        with pytest.raises(ConfigError, match=f"needs scores of {missing}; given: {told}"):
            make_plan(anatomy, scores, 0.2, axis)
    with pytest.raises(ConfigError, match="needs scores of kv_group; given: 'half'"):
        make_plan(anatomy, Scores("half", neuron=random_scores(anatomy).neuron), 0.2, kv_heads=2)


def test_scores_with_nan_are_refused():
    anatomy, scores = anatomy_named("llama"), random_scores(anatomy_named("llama"))
    scores.layer[1] = math.nan
    scores.neuron[2][5] = math.nan
    for axis in ("depth", "width"):
        with pytest.raises(SlimError, match=r"NaN|finite"):
            make_plan(anatomy, scores, 0.3, axis)


@pytest.mark.parametrize(
    ("axis", "name"),
    [("depth", "llama"), ("width", "llama"), ("both", "7b"), ("width", "qwen2_vl")],
)
def test_an_unreachable_ratio_names_the_nearest(axis, name):
    anatomy, scores = anatomy_named(name), scores_named(name)
    with pytest.raises(ImpossiblePlanError, match=r"nearest legal shape") as refusal:
        make_plan(anatomy, scores, 0.995, axis)
    found = re.search(r"has ratio (0\.\d+)", str(refusal.value))
    assert found
    nearest = float(found[1])
    assert nearest < 0.99
    again = make_plan(anatomy, scores, nearest, axis)  # and that one can be had
    assert again.ratio == pytest.approx(nearest, abs=1e-4 + step_of(anatomy, axis))


# Whole-model targets
@pytest.mark.parametrize("name", ["llava-llama", "llama", "7b"])
def test_a_target_size_is_hit_or_refused(name):
    anatomy = anatomy_named(name)
    target = int(0.7 * anatomy.total_params)
    ratio = ratio_for_params(anatomy, target)
    plan = make_plan(anatomy, scores_named(name), ratio, "width")
    step = step_of(anatomy, "width") * anatomy.backbone_params
    assert abs(plan.after.total_params - target) <= step
    assert ratio_for_params(anatomy, anatomy.total_params) == 0
    with pytest.raises(ConfigError, match="has only"):
        ratio_for_params(anatomy, anatomy.total_params + 1)
    with pytest.raises(ImpossiblePlanError, match="only the backbone is pruned"):
        ratio_for_params(anatomy, anatomy.vision_params)


# Kinds of unit

sizes = st.tuples(st.integers(1, 6), st.integers(1, 4), st.integers(5, 200))
EVEN = synthetic(6, 4, 2, 8, 96, 64, 100)


@settings(max_examples=20)
@given(sizes, st.integers(2, 8), st.floats(0, 0.3), st.integers(0, 99))
def test_kinds_that_are_not_named_stay_whole(size, layers, ratio, seed):
    kv_heads, queries, neurons = size
    anatomy = synthetic(layers, kv_heads, queries, 8, neurons, 64, 100)
    for unit, other in (("neuron", "kv_groups"), ("kv_group", "neurons")):
        try:
            plan = make_plan(anatomy, random_scores(anatomy, seed), ratio, units=(unit,))
        except ImpossiblePlanError:
            continue
        assert getattr(plan, other) == getattr(Plan.everything(anatomy), other)
        assert set(plan.criteria) == {unit}


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 4])
def test_given_kv_heads_are_kept_and_neurons_give_the_rest(kv_heads):
    plan = make_plan(EVEN, random_scores(EVEN), 0.3, kv_heads=kv_heads)
    assert {len(kept) for kept in plan.kv_groups} == {kv_heads}
    step = default_multiple(EVEN) * 6 * EVEN.layers[0].neuron_params / EVEN.backbone_params
    assert abs(plan.ratio - 0.3) <= step
    if kv_heads == 1:
        with pytest.raises(ImpossiblePlanError, match="nearest legal shape"):
            make_plan(EVEN, random_scores(EVEN), 0.05, kv_heads=1)


# Candidates that share a ratio and differ in how many KV groups go for how many neurons
@pytest.fixture(scope="module")
def anatomy():
    return read_anatomy(tiny.build("llava-llama"))


def candidates(anatomy, axis="width", **options):
    layers = Scores("by-hand", layer=random_scores(anatomy).layer)
    return width_candidates(anatomy, [layers], 0.25, axis, "obs", **options)


def groups_of(plans):
    """How many KV groups the kept layers of each plan keep."""
    return [{len(plan.kv_groups[i]) for i in plan.layers} for plan in plans]


@pytest.mark.parametrize("axis", ["width", "both"])
def test_every_number_of_kv_groups_that_meets_the_ratio_is_there(anatomy, axis):
    found = candidates(anatomy, axis)
    assert groups_of(found) == ([{2}, {3}, {4}] if axis == "width" else groups_of(found))
    for plan in found:
        assert plan.after.is_uniform
        assert plan.ratio == pytest.approx(0.25, abs=0.05)
        assert plan.layers == found[0].layers
    neurons = [len(plan.neurons[plan.layers[0]]) for plan in found]
    assert neurons == sorted(neurons, reverse=True)
    assert len({*neurons}) == len(found)


def test_numbers_are_those_of_make_plan_and_other_allocations_leave_one_plan(anatomy):
    scores = random_scores(anatomy)
    for plan, kv_heads in zip(candidates(anatomy), (2, 3, 4), strict=True):
        expected = make_plan(anatomy, scores, 0.25, "width", kv_heads=kv_heads)
        assert plan.after.layers == expected.after.layers
        assert set(plan.criteria.values()) == {"obs"}
    for allocation in ("uniform", "protect"):
        (plan,) = candidates(anatomy, allocation=allocation)
        expected = make_plan(anatomy, scores, 0.25, "width", allocation)
        assert plan.after.layers == expected.after.layers


def test_protected_layers_and_kinds_are_left_alone_and_wrong_candidates_refused(anatomy):
    (plan,) = candidates(anatomy, protect=(1, 0), units=("neuron",), round_to=2)
    assert {len(kept) for kept in plan.kv_groups} == {4}
    widths = [len(kept) for kept in plan.neurons]
    assert widths[0] == 96
    assert all(width % 2 == 0 for width in widths)
    found = candidates(anatomy, units=("kv_group",))
    assert {len(kept) for plan in found for kept in plan.neurons} == {96}
    assert max(plan.ratio for plan in found) == pytest.approx(0.25, abs=0.1)
    with pytest.raises(ConfigError, match="allocation 'search' must be one of"):
        candidates(anatomy, allocation="search")
    with pytest.raises(ConfigError, match="units"):
        candidates(anatomy, units=("head",))
    with pytest.raises(ImpossiblePlanError):
        width_candidates(anatomy, [], 0.99, "width", "obs")


# Counting
def test_the_default_multiple_is_128_for_real_models_and_smaller_for_tiny_ones():
    assert default_multiple(anatomy_named("7b")) == 128
    for name in (*TINY, *SYNTHETIC):
        anatomy = anatomy_named(name)
        multiple = default_multiple(anatomy)
        assert multiple in (1, 2, 4, 8, 16, 32, 64, 128)
        assert multiple == 1 or step_of(anatomy, "width") <= (0.01 if multiple == 128 else 0.005)
        assert multiple >= 64 or 2 * step_of(anatomy, "width") > 0.005


@given(st.integers(1, 20000), st.integers(0, 99))
def test_channels_to_remove_is_exact(channels, percent):
    expected = channels - (channels * (100 - percent)) // 100
    assert channels_to_remove(channels, percent / 100) == expected
    assert 640 - int(640 * (1 - 0.9)) == 577  # in floating point
    asked = ((64, 0.2), (176, 0.33), (640, 0.9), (192, 0.25), (10, 0.0), (7, 0.5))
    assert [channels_to_remove(*each) for each in asked] == [13, 59, 576, 48, 0, 4]


@pytest.mark.parametrize(
    ("layers", "protected"), [(32, (4, 2)), (30, (4, 2)), (28, (4, 2)), (24, (3, 2)), (4, (1, 1))]
)
def test_protect_scales_with_the_depth(layers, protected):
    anatomy = synthetic(layers, 4, 2, 8, 96, 64, 100)
    budget = Budget(anatomy=anatomy, ratio=0.2, axis="width", allocation="protect")
    assert budget.protected == protected
    scores = random_scores(anatomy)
    for protect, expected in (((0, 0), protected), ((0, 1), (0, 1))):
        plan = make_plan(anatomy, scores, 0.1, allocation="protect", protect=protect)
        other = make_plan(anatomy, scores, 0.1, protect=expected)
        assert (plan.kv_groups, plan.neurons) == (other.kv_groups, other.neurons)


def test_counting_by_layer_needs_no_kv_groups():
    anatomy = anatomy_named("gemma4-experts")
    plan = make_plan(anatomy, random_scores(anatomy), 0.3, counting="per_layer")
    for shape, kept in zip(anatomy.layers, plan.neurons, strict=True):
        neurons = shape.intermediate_size
        assert len(kept) == neurons - channels_to_remove(neurons, 0.3)
    assert not any(plan.kv_groups)


def test_layers_of_different_sizes_go_as_near_as_they_can():
    """Every second layer has experts, eight times as large as the others."""
    anatomy = read_anatomy(tiny.build("llama4"))
    anatomy = anatomy.with_layers([replace(s, kind="full_attention") for s in anatomy.layers])
    small, large = (shape.params for shape in anatomy.layers[:2])
    assert large > small
    for seed in range(8):
        order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
        for ratio in (0.2, 0.4, 0.6):
            plan = make_plan(anatomy, Scores("by-hand", layer=order.float()), ratio, "depth")
            sizes = [anatomy.layers[i].params for i in order.argsort().tolist()]
            nearest = min(abs(sum(sizes[:n]) / anatomy.backbone_params - ratio) for n in range(4))
            assert abs(plan.ratio - ratio) == pytest.approx(nearest)


def test_a_size_that_no_legal_shape_has_is_refused():
    anatomy = read_anatomy(tiny.build("llama"))
    least = anatomy.total_params - anatomy.backbone_params
    with pytest.raises(ImpossiblePlanError, match="smallest legal shape has"):
        make_plan_for_params(anatomy, random_scores(anatomy), least + 50, round_to=4096)
