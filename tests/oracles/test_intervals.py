"""How often a 95 % interval holds the truth, where the truth is known because we made it up."""

import math

import numpy as np
import pytest

from slimvlm.evaluation.metrics import average_difference, retention
from slimvlm.evaluation.on_data import DataResult, OnSample
from tests.evaluation.test_metrics import answers

RIGHT, LOST, GAINED = 0.8, 0.25, 0.3  # of the original; of its right answers; of its wrong ones
SMALL = RIGHT * (1 - LOST) + (1 - RIGHT) * GAINED  # of the small model: 0.66
# samples, and how many of them are about one picture
FEW = [(5, 1), (20, 1), (60, 6)]
SOME = [(8, 1), (10, 1), (50, 1), (100, 1), (500, 1), (180, 18)]
LADDER = [*FEW, *(pytest.param(*size, marks=pytest.mark.slow) for size in [*SOME, (360, 18)])]


def pictures(count, each):
    return [f"picture {i // each}" for i in range(count)] if each > 1 else []


def chances(rng, count, each):
    """Uniform numbers, of which half are those of their picture: a correlation of one quarter."""
    shared = np.repeat(rng.random(count), each)[:count]
    return np.where(rng.random(count) < 0.5 * (each > 1), shared, rng.random(count))


def scores(rng, count, each):
    """Scores of an original and of a small model."""
    original = chances(rng, count, each) < RIGHT
    change = chances(rng, count, each)
    small = np.where(original, change >= LOST, change < GAINED)
    return (original * 1.0).tolist(), (small * 1.0).tolist()


def losses(rng, count, each):
    """Figures of two models on samples of 5 to 60 tokens; those of a picture are alike."""
    hardness = np.repeat(rng.gamma(2.0, 0.5, count), each)[:count]  # one on average
    found = []
    for i, picture in enumerate(pictures(count, each) or [""] * count):
        tokens, base = int(rng.integers(5, 60)), hardness[i] * rng.uniform(0.8, 1.2)
        apart, same = rng.gamma(1.5, 0.2) / 1.5, int(rng.binomial(tokens, rng.beta(9, 1)))
        named = {"picture": picture} if picture else {}
        found.append(OnSample(f"{i}", tokens, base + apart, base, same, apart / 2, **named))
    return DataResult("small", tuple(found), "original").figures


def missed(estimate, truth):
    """Whether an interval leaves the truth out; one without bounds does not."""
    low, high = estimate.low, estimate.high
    return not (low is None or math.isnan(low) or low - 1e-9 <= truth <= high + 1e-9)


def held(draw, truths, count, each, times):
    """The share of draws, in percent, in which each interval holds the truth."""
    rng, misses = np.random.default_rng(count), np.zeros(len(truths))
    for _ in range(times):
        misses += [missed(*pair) for pair in zip(draw(rng, count, each), truths, strict=True)]
    return dict(zip(draw.__doc__.split(), 100 - 100 * misses / times, strict=True))


def of_scores(rng, count, each):
    """change retention average apart"""
    a, b = scores(rng, count, each)
    (one, other), shown = (scores(rng, count, each) for _ in "ab"), pictures(count, each)
    groups = {"first": shown, "second": shown, "": shown}
    tasks = [{"first": x, "second": y} for x, y in ((a, one[0]), (b, one[1]))]
    pairs = (({"": b}, {"": a}), (tasks[1], tasks[0]), ({"": b}, {"": other[0]}))
    tables = [answers(*pair, pictures=groups) for pair in pairs]
    change, average, unpaired = map(average_difference, tables)
    return change, retention(tables[1]), average, unpaired


def of_losses(rng, count, each):
    """loss increase agreement divergence"""
    figures = losses(rng, count, each)
    return figures.loss, figures.increase, figures.agreement, figures.divergence


CHANGE = 100 * (SMALL - RIGHT)
TRUTHS = {of_scores: [CHANGE, 100 * SMALL / RIGHT, CHANGE, CHANGE], of_losses: [1.2, 0.2, 90, 0.1]}


@pytest.mark.parametrize(("count", "each"), LADDER)
@pytest.mark.parametrize("draw", TRUTHS)
def test_an_interval_holds_the_truth_in_about_nineteen_of_twenty_draws(draw, count, each):
    """Scores of few questions take few values, so that no interval of theirs can be exact."""
    found = held(draw, TRUTHS[draw], count, each, times=300)
    assert min(found.values()) >= 90, found
    if count // each >= 50:
        assert max(found.values()) <= 98.4, found


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_of_less_than_five_it_is_wide_or_has_no_bounds(count):
    rng = np.random.default_rng(0)
    change, kept, *_ = of_scores(rng, count, 1)
    assert change.high - change.low >= 100
    assert math.isnan(kept.low) or kept.high - kept.low >= 100
    loss = losses(rng, count, 1).loss
    assert loss.low is None or loss.high >= 2 * loss.low


def test_answers_that_are_all_alike_leave_a_doubt_that_shrinks():
    widths = []
    for count in (5, 20, 100, 500):
        same, alike = (
            [1.0] * count,
            tuple(OnSample(f"{i}", 9, 1.0, 1.0, 9, 0.0) for i in range(count)),
        )
        change = average_difference(answers({"": same}, {"": same}))
        agreement = DataResult("small", alike, "original").figures.agreement
        assert change.low <= -100 / count  # one more question may differ
        assert agreement.high == 100 >= agreement.low + 100 / (2 * count)
        widths.append((change.high - change.low, 100 - agreement.low))
    assert widths == sorted(widths, reverse=True)
    assert max(widths[-1]) < 2
