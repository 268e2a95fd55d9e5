"""How a ratio is shared between layers and kinds of unit: budgets, nesting, symmetry, refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimvlm.core.errors import ConfigError, ImpossiblePlanError
from slimvlm.models.anatomy import Anatomy, LayerShape, read_anatomy
from slimvlm.planning.budget import Budget, default_multiple
from slimvlm.planning.make import make_plan, make_plan_for_params
from slimvlm.planning.plan import Plan
from slimvlm.scoring.unit_scores import Scores
from tests import tiny
from tests.helpers import random_scores

FEW = settings(max_examples=20)
SCALES = ("layer", "kind", "nothing")


def shape_of(kv_heads: int, queries: int, neurons: int, hidden: int = 64) -> LayerShape:
    return LayerShape(
        num_kv_heads=kv_heads,
        queries_per_group=queries,
        head_dim=8,
        intermediate_size=neurons,
        kv_group_params=2 * (queries + 1) * 8 * hidden,
        neuron_params=3 * hidden,
        fixed_params=2 * hidden,
    )


def anatomy_of(*shapes: LayerShape, hidden: int = 64) -> Anatomy:
    return Anatomy(
        model_type="mistral",
        text_type="mistral",
        hidden_size=hidden,
        vocab_size=100,
        layers=shapes,
        embedding_params=100 * hidden,
        head_params=0,
        final_norm_params=hidden,
        vision_params=0,
        projector_params=0,
    )


sizes = st.tuples(st.integers(1, 6), st.integers(1, 4), st.integers(5, 200))
uneven = st.lists(sizes, min_size=2, max_size=7)
even = st.builds(lambda size, count: [size] * count, sizes, st.integers(2, 8))
multiples = st.sampled_from([1, 2, 8, 16])
seeds = st.integers(0, 99)

MIXED = anatomy_of(*[shape_of(4, 2, 96)] * 6)


def built(layers: list[tuple[int, int, int]]) -> Anatomy:
    return anatomy_of(*[shape_of(*size) for size in layers])


def largest_step(anatomy: Anatomy, round_to: int) -> int:
    sizes = [(s.kv_group_params, round_to * s.neuron_params) for s in anatomy.layers]
    return max(max(pair) for pair in sizes)


def kept_units(plan: Plan) -> set[tuple[str, int, int]]:
    return {
        (name, index, unit)
        for name in ("kv_groups", "neurons")
        for index, kept in enumerate(getattr(plan, name))
        for unit in kept
    }


def ranked(anatomy: Anatomy, scores: Scores, ratio: float, **options: Any) -> Plan:
    return make_plan(anatomy, scores, ratio, "width", allocation="global", **options)


# One ranking of all layers


@FEW
@given(uneven, st.floats(0, 0.9), multiples, seeds, st.sampled_from(SCALES))
def test_a_ranking_meets_the_budget_within_half_a_step(
    layers: list[tuple[int, int, int]], ratio: float, round_to: int, seed: int, scale: str
) -> None:
    anatomy = built(layers)
    scores = random_scores(anatomy, seed)
    step = largest_step(anatomy, round_to)
    try:
        plan = ranked(anatomy, scores, ratio, round_to=round_to, relative_to=scale)
    except ImpossiblePlanError:
        least = sum(
            s.fixed_params
            + s.kv_group_params
            + min(round_to, s.intermediate_size) * s.neuron_params
            for s in anatomy.layers
        )
        most = (sum(s.params for s in anatomy.layers) - least) / anatomy.backbone_params
        assert ratio > most
        return
    share = 1.0 if plan.after.is_uniform else 0.5
    is_at_the_end = len({len(k) for k in plan.kv_groups}) == 1 == len(plan.kv_groups[0])
    assert (
        abs(plan.ratio - ratio) * anatomy.backbone_params
        <= (step if is_at_the_end else share * step) + 1e-6
    )


@FEW
@given(uneven, st.floats(0, 0.6), multiples, seeds)
def test_every_layer_keeps_a_group_and_widths_are_multiples(
    layers: list[tuple[int, int, int]], ratio: float, round_to: int, seed: int
) -> None:
    anatomy = built(layers)
    try:
        plan = ranked(anatomy, random_scores(anatomy, seed), ratio, round_to=round_to)
    except ImpossiblePlanError:
        return
    assert plan.layers == tuple(range(anatomy.num_layers))
    for index, shape in enumerate(anatomy.layers):
        assert len(plan.kv_groups[index]) >= 1
        width = len(plan.neurons[index])
        assert width == shape.intermediate_size or (width % round_to == 0 and width >= round_to)


@FEW
@given(
    uneven,
    st.floats(0, 0.5),
    st.floats(0, 0.5),
    multiples,
    seeds,
    st.sampled_from(SCALES),
    st.sampled_from([None, 0.6]),
)
def test_a_higher_ratio_keeps_a_subset(
    layers: list[tuple[int, int, int]],
    first: float,
    second: float,
    round_to: int,
    seed: int,
    scale: str,
    cap: float | None,
) -> None:
    options: dict[str, Any] = {
        "round_to": round_to,
        "relative_to": scale,
        "max_layer_ratio": cap,
    }
    anatomy = built(layers)
    scores = random_scores(anatomy, seed)
    try:
        little = ranked(anatomy, scores, min(first, second), **options)
        much = ranked(anatomy, scores, max(first, second), **options)
    except ImpossiblePlanError:
        return
    assert kept_units(much) <= kept_units(little)


@FEW
@given(even, st.floats(0.05, 0.5), seeds, st.sampled_from(SCALES), st.randoms())
def test_permuted_units_are_kept_at_their_new_places(
    sizes: list[tuple[int, int, int]], ratio: float, seed: int, scale: str, random: Any
) -> None:
    anatomy = built(sizes)
    scores = random_scores(anatomy, seed)
    assert scores.kv_group is not None
    assert scores.neuron is not None
    layers = random.sample(range(anatomy.num_layers), anatomy.num_layers)
    orders = {
        unit: [random.sample(range(len(row)), len(row)) for row in scores.of(unit)]
        for unit in ("kv_group", "neuron")
    }
    moved = Scores(
        "by-hand",
        **{
            unit: [scores.of(unit)[i][orders[unit][i]] for i in layers]
            for unit in ("kv_group", "neuron")
        },
    )
    try:
        plan = ranked(anatomy, scores, ratio, relative_to=scale)
        other = ranked(anatomy, moved, ratio, relative_to=scale)
    except ImpossiblePlanError:
        return
    for place, index in enumerate(layers):
        assert {orders["neuron"][index][i] for i in other.neurons[place]} == set(
            plan.neurons[index]
        )
        assert {orders["kv_group"][index][i] for i in other.kv_groups[place]} == set(
            plan.kv_groups[index]
        )


@pytest.mark.parametrize("scale", ["layer", "kind"])
@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5])
def test_equal_scores_thin_all_layers_and_kinds_equally(ratio: float, scale: str) -> None:
    anatomy = anatomy_of(*[shape_of(8, 1, 96), shape_of(4, 2, 192), shape_of(8, 2, 48)] * 2)
    equal = Scores(
        "equal",
        kv_group=[torch.full((s.num_kv_heads,), float(s.kv_group_params)) for s in anatomy.layers],
        neuron=[torch.full((s.intermediate_size,), 3.0) for s in anatomy.layers],
    )
    plan = ranked(anatomy, equal, ratio, round_to=1, relative_to=scale)
    shapes = anatomy.layers  # within half a group, and one of the coarsest neurons
    share = 1 - sum(map(len, plan.neurons)) / sum(s.intermediate_size for s in shapes)
    for shape, groups, neurons in zip(shapes, plan.kv_groups, plan.neurons, strict=True):
        assert abs(shape.intermediate_size * (1 - share) - len(neurons)) <= 1
        assert abs(shape.num_kv_heads * (1 - share) - len(groups)) <= 0.5 + 8 / 48


def test_layers_that_matter_less_lose_more_unless_scores_are_relative_to_them() -> None:
    scores = random_scores(MIXED)
    assert scores.neuron is not None
    weak = replace(scores, neuron=[row * (0.1 if i == 2 else 1) for i, row in
                                   enumerate(scores.neuron)])  # fmt: skip
    options: dict[str, Any] = {"units": ("neuron",), "round_to": 1}
    same = [ranked(MIXED, s, 0.3, relative_to="layer", **options) for s in (scores, weak)]
    assert same[0].neurons == same[1].neurons
    widths = [len(kept) for kept in ranked(MIXED, weak, 0.3, relative_to="kind", **options).neurons]
    assert widths[2] < min(widths[:2] + widths[3:]) / 4


def test_the_scale_follows_from_the_criterion() -> None:
    scores = random_scores(MIXED)
    for criterion, scale in (("gate", "kind"), ("taylor", "kind"), ("activation", "layer")):
        named = replace(scores, criterion=criterion)
        default, told = ranked(MIXED, named, 0.3), ranked(MIXED, named, 0.3, relative_to=scale)
        assert kept_units(default) == kept_units(told)
    assert len({str(ranked(MIXED, scores, 0.3, relative_to=s).neurons) for s in SCALES}) > 1


@FEW
@given(st.floats(0.05, 0.45), seeds, st.sampled_from([0.4, 0.5, 0.7]))
def test_no_layer_loses_more_than_its_cap(ratio: float, seed: int, cap: float) -> None:
    scores = random_scores(MIXED, seed)
    assert scores.neuron is not None
    weak = replace(scores, neuron=[row * 0.01**i for i, row in enumerate(scores.neuron)])
    try:
        plan = ranked(MIXED, weak, ratio, max_layer_ratio=cap, relative_to="kind")
    except ImpossiblePlanError:
        assert ratio > 0.3
        return
    for before, after in zip(MIXED.layers, plan.after.layers, strict=True):
        assert after.params >= (1 - cap) * before.params


@FEW
@given(st.floats(0, 0.3), st.tuples(st.integers(0, 2), st.integers(0, 2)), seeds)
def test_a_ranking_leaves_protected_layers_whole(
    ratio: float, protect: tuple[int, int], seed: int
) -> None:
    plan = ranked(MIXED, random_scores(MIXED, seed), ratio, protect=protect)
    for index in (*range(protect[0]), *range(6 - protect[1], 6)):
        assert len(plan.kv_groups[index]) == 4
        assert len(plan.neurons[index]) == 96


def test_layers_and_a_ranking_share_the_budget() -> None:
    plan = make_plan(MIXED, random_scores(MIXED), 0.4, "both", allocation="global")
    assert len(plan.layers) == 5
    assert len({len(plan.neurons[i]) for i in plan.layers}) > 1
    step = largest_step(MIXED, default_multiple(MIXED)) / MIXED.backbone_params
    assert abs(plan.ratio - 0.4) <= step


@FEW
@given(st.floats(0, 0.5), seeds)
def test_an_equally_wide_result_has_a_legal_head_count(ratio: float, seed: int) -> None:
    """With one neuron multiple in all, only groups can go: all layers may end equally wide."""
    anatomy = replace(read_anatomy(tiny.build("qwen2_vl")), pinned_layers=())
    scores = replace(random_scores(anatomy, seed), neuron=None)
    try:
        plan = ranked(anatomy, scores, ratio)
    except ImpossiblePlanError:
        return
    after = plan.after
    assert not after.is_uniform or after.layers[0].num_kv_heads in anatomy.legal_kv_heads()


def test_a_ranking_reaches_a_target_size() -> None:
    scores = random_scores(MIXED)
    target = MIXED.total_params * 7 // 10
    plan = make_plan_for_params(MIXED, scores, target, allocation="global")
    step = largest_step(MIXED, default_multiple(MIXED))
    assert target - 2 * step <= plan.after.total_params <= target


# The study's protected layers


@pytest.mark.parametrize(
    ("layers", "protected"), [(32, (4, 2)), (30, (4, 2)), (28, (4, 2)), (24, (3, 2)), (4, (1, 1))]
)
def test_protect_scales_with_the_depth(layers: int, protected: tuple[int, int]) -> None:
    anatomy = anatomy_of(*[shape_of(4, 2, 96)] * layers)
    assert Budget(anatomy, 0.2, "width", allocation="protect").protected == protected
    scores = random_scores(anatomy)
    ratio = 0.1
    plan = make_plan(anatomy, scores, ratio, allocation="protect")
    assert kept_units(plan) == kept_units(make_plan(anatomy, scores, ratio, protect=protected))
    told = make_plan(anatomy, scores, ratio, allocation="protect", protect=(0, 1))
    assert kept_units(told) == kept_units(make_plan(anatomy, scores, ratio, protect=(0, 1)))


# Kinds of unit


@FEW
@given(even, st.floats(0, 0.3), seeds, st.sampled_from(["uniform", "global"]))
def test_kinds_that_are_not_named_stay_whole(
    sizes: list[tuple[int, int, int]], ratio: float, seed: int, allocation: str
) -> None:
    anatomy = built(sizes)
    for unit, other in (("neuron", "kv_groups"), ("kv_group", "neurons")):
        try:
            plan = make_plan(
                anatomy, random_scores(anatomy, seed), ratio, allocation=allocation, units=(unit,)
            )
        except ImpossiblePlanError:
            continue
        assert getattr(plan, other) == getattr(Plan.everything(anatomy), other)
        assert set(plan.criteria) == {unit}


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 4])
def test_given_kv_heads_are_kept_and_neurons_give_the_rest(kv_heads: int) -> None:
    plan = make_plan(MIXED, random_scores(MIXED), 0.3, kv_heads=kv_heads)
    assert {len(kept) for kept in plan.kv_groups} == {kv_heads}
    step = default_multiple(MIXED) * 6 * MIXED.layers[0].neuron_params / MIXED.backbone_params
    assert abs(plan.ratio - 0.3) <= step


def test_kv_heads_that_cannot_meet_the_ratio_are_refused() -> None:
    with pytest.raises(ImpossiblePlanError, match="nearest legal shape"):
        make_plan(MIXED, random_scores(MIXED), 0.05, kv_heads=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"units": ("head",)}, r"units \('head',\) must be some of: kv_group, neuron"),
        ({"units": ()}, "units"),
        ({"kv_heads": 5}, r"kv_heads 5 must be one of: \[1, 2, 3, 4\]"),
        ({"kv_heads": 0}, "kv_heads 0"),
        ({"kv_heads": 2, "allocation": "global"}, "kv_heads 2 needs allocation"),
        ({"kv_heads": 2, "counting": "per_layer"}, "kv_heads 2 needs.*counting 'parameters'"),
        ({"kv_heads": 2, "units": ("neuron",)}, "kv_heads 2 needs 'kv_group'"),
        ({"counting": "per_layer", "allocation": "global"}, "counting 'per_layer'"),
        ({"max_layer_ratio": 0.5}, "max_layer_ratio 0.5 needs allocation 'global'"),
        ({"max_layer_ratio": 0.0, "allocation": "global"}, "max_layer_ratio 0.0 must be above 0"),
        ({"relative_to": "kind"}, "relative_to 'kind' needs allocation 'global'"),
        ({"relative_to": "me", "allocation": "global"}, "relative_to 'me' must be one of: layer"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_plan(MIXED, random_scores(MIXED), 0.2, **options)
