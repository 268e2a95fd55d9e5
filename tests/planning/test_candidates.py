"""Plans that share a ratio and differ in how many KV groups go for how many neurons."""

from __future__ import annotations

from typing import Any

import pytest

from slimvlm.core.errors import ConfigError, ImpossiblePlanError
from slimvlm.models.anatomy import Anatomy, read_anatomy
from slimvlm.planning.candidates import width_candidates
from slimvlm.planning.make import make_plan
from slimvlm.planning.plan import Plan
from slimvlm.scoring.unit_scores import Scores
from tests import tiny
from tests.handmade import random_scores


@pytest.fixture(scope="module")
def anatomy() -> Anatomy:
    return read_anatomy(tiny.build("llava-llama"))


def candidates(anatomy: Anatomy, axis: str = "width", **options: Any) -> list[Plan]:
    layers = Scores("by-hand", layer=random_scores(anatomy).layer)
    return width_candidates(anatomy, [layers], 0.25, axis, "obs", **options)


def groups(plans: list[Plan]) -> list[set[int]]:
    """How many KV groups the kept layers of each plan keep."""
    return [{len(plan.kv_groups[i]) for i in plan.layers} for plan in plans]


@pytest.mark.parametrize("axis", ["width", "both"])
def test_every_number_of_kv_groups_that_meets_the_ratio_is_there(
    anatomy: Anatomy, axis: str
) -> None:
    found = candidates(anatomy, axis)
    assert groups(found) == ([{2}, {3}, {4}] if axis == "width" else groups(found))
    for plan in found:
        assert plan.after.is_uniform
        assert plan.ratio == pytest.approx(0.25, abs=0.05)
        assert plan.layers == found[0].layers
    neurons = [len(plan.neurons[plan.layers[0]]) for plan in found]
    assert neurons == sorted(neurons, reverse=True)
    assert len({*neurons}) == len(found)


def test_numbers_are_those_of_make_plan(anatomy: Anatomy) -> None:
    scores = random_scores(anatomy)
    for plan, kv_heads in zip(candidates(anatomy), (2, 3, 4), strict=True):
        expected = make_plan(anatomy, scores, 0.25, "width", kv_heads=kv_heads)
        assert plan.after.layers == expected.after.layers
        assert set(plan.criteria.values()) == {"obs"}


def test_other_allocations_leave_one_plan(anatomy: Anatomy) -> None:
    scores = random_scores(anatomy)
    for allocation in ("uniform", "protect"):
        (plan,) = candidates(anatomy, allocation=allocation)
        expected = make_plan(anatomy, scores, 0.25, "width", allocation)
        assert plan.after.layers == expected.after.layers


def test_protected_layers_and_kinds_are_left_alone(anatomy: Anatomy) -> None:
    (plan,) = candidates(anatomy, protect=(1, 0), units=("neuron",), round_to=2)
    assert {len(kept) for kept in plan.kv_groups} == {4}
    widths = [len(kept) for kept in plan.neurons]
    assert widths[0] == 96
    assert all(width % 2 == 0 for width in widths)


def test_groups_alone_leave_one_number(anatomy: Anatomy) -> None:
    found = candidates(anatomy, units=("kv_group",))
    assert {len(kept) for plan in found for kept in plan.neurons} == {96}
    assert max(plan.ratio for plan in found) == pytest.approx(0.25, abs=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"allocation": "search"}, "allocation 'search' must be one of"),
        ({"units": ("head",)}, "units"),
    ],
)
def test_wrong_requests_are_refused(
    anatomy: Anatomy, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        candidates(anatomy, **options)


def test_a_ratio_that_no_shape_meets_is_refused(anatomy: Anatomy) -> None:
    with pytest.raises(ImpossiblePlanError):
        width_candidates(anatomy, [], 0.99, "width", "obs")
