"""Counting: channels to remove, multiples of neurons, protected layers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimvlm.planning.budget import Budget, channels_to_remove, default_multiple
from slimvlm.planning.make import make_plan
from tests.handmade import random_scores
from tests.planning.anatomies import SYNTHETIC, TINY, anatomy_named, step_of, synthetic


def test_the_default_multiple_is_128_for_real_models_and_smaller_for_tiny_ones():
    assert default_multiple(anatomy_named("7b")) == 128
    for name in (*TINY, *SYNTHETIC):
        anatomy = anatomy_named(name)
        multiple = default_multiple(anatomy)
        assert multiple in (1, 2, 4, 8, 16, 32, 64, 128)
        assert multiple == 1 or step_of(anatomy, "width") <= (0.01 if multiple == 128 else 0.005)
        assert multiple >= 64 or 2 * step_of(anatomy, "width") > 0.005


@pytest.mark.parametrize(
    ("channels", "ratio", "removed"),
    [
        (64, 0.2, 13),
        (176, 0.33, 59),
        (640, 0.9, 576),  # 577 in floating point
        (192, 0.25, 48),
        (10, 0.0, 0),
        (7, 0.5, 4),
    ],
)
def test_channels_to_remove(channels, ratio, removed):
    assert channels_to_remove(channels, ratio) == removed
    assert 640 - int(640 * (1 - 0.9)) == 577


@given(st.integers(1, 20000), st.integers(0, 99))
def test_channels_to_remove_is_exact(channels, percent):
    expected = channels - (channels * (100 - percent)) // 100
    assert channels_to_remove(channels, percent / 100) == expected


@pytest.mark.parametrize(
    ("layers", "protected"), [(32, (4, 2)), (30, (4, 2)), (28, (4, 2)), (24, (3, 2)), (4, (1, 1))]
)
def test_protect_scales_with_the_depth(layers, protected):
    anatomy = synthetic(layers, 4, 2, 8, 96, 64, 100)
    assert Budget(anatomy, 0.2, "width", allocation="protect").protected == protected
    scores = random_scores(anatomy)
    for protect, expected in (((0, 0), protected), ((0, 1), (0, 1))):
        plan = make_plan(anatomy, scores, 0.1, allocation="protect", protect=protect)
        other = make_plan(anatomy, scores, 0.1, protect=expected)
        assert (plan.kv_groups, plan.neurons) == (other.kv_groups, other.neurons)
