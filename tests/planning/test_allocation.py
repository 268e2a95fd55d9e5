"""How a ratio is shared between layers and kinds of unit: budgets, nesting, symmetry, refusals."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimvlm.core.errors import ConfigError, ImpossiblePlanError
from slimvlm.models.anatomy import Anatomy, LayerShape
from slimvlm.planning.budget import Budget, default_multiple
from slimvlm.planning.make import make_plan
from slimvlm.planning.plan import Plan
from tests.handmade import random_scores

FEW = settings(max_examples=20)


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


def kept_units(plan: Plan) -> set[tuple[str, int, int]]:
    return {
        (name, index, unit)
        for name in ("kv_groups", "neurons")
        for index, kept in enumerate(getattr(plan, name))
        for unit in kept
    }


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
@given(even, st.floats(0, 0.3), seeds)
def test_kinds_that_are_not_named_stay_whole(
    sizes: list[tuple[int, int, int]], ratio: float, seed: int
) -> None:
    anatomy = built(sizes)
    for unit, other in (("neuron", "kv_groups"), ("kv_group", "neurons")):
        try:
            plan = make_plan(anatomy, random_scores(anatomy, seed), ratio, units=(unit,))
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
        ({"kv_heads": 2, "counting": "per_layer"}, "kv_heads 2 needs.*counting 'parameters'"),
        ({"kv_heads": 2, "units": ("neuron",)}, "kv_heads 2 needs 'kv_group'"),
        ({"allocation": "global"}, "allocation 'global' must be one of: uniform, protect"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_plan(MIXED, random_scores(MIXED), 0.2, **options)
