"""Metrics of replies, averages, retention, and paired differences."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimvlm.data.samples import Question
from slimvlm.evaluation import metrics
from tests.tables import tables

TABLES = tables(__file__)


def asking(*answers):
    return Question("q", "?", answers)


def test_yes_no_details_are_those_of_pope_and_the_average_rescales_mme():
    replies = ["yes", "yes", "no", "no", "Yes.", "perhaps"]
    answers = ["yes", "no", "no", "yes", "yes", "yes"]
    details = metrics.yes_no_details(replies, [asking(answer) for answer in answers])
    precision, recall = 2 / 3, 2 / 4
    assert details["f1"] == pytest.approx(100 * 2 * precision * recall / (precision + recall))
    assert details["yes_rate"] == pytest.approx(50)
    assert metrics.yes_no_details(["no"], [asking("yes")]) == {"f1": 0.0, "yes_rate": 0.0}
    # full scores are 800 and 2000; everything else is in percent already (LLaVA 1.5, 7B)
    mme = {"mme_cognition": 355.7, "mme_perception": 1510.7}
    expected = (355.7 / 8 + 1510.7 / 20 + 36.3 + 64.0 + 85.9) / 5
    found = metrics.average({**mme, "mmmu": 36.3, "mmbench": 64.0, "pope": 85.9})
    assert found == pytest.approx(expected)
    assert metrics.average({"mme_cognition": 800, "mme_perception": 2000}) == pytest.approx(100)
    assert metrics.average({"pope": 85.9}) == pytest.approx(85.9)


def scores_of(seed, **accuracy):
    generator = np.random.default_rng(seed)
    return {
        name: (generator.random(120 + 40 * i) < share).astype(float).tolist()
        for i, (name, share) in enumerate(accuracy.items())
    }


def answers(ours, theirs=None, chance=None, floors=None, pictures=None):
    """The table of answers, from scores by task; floors are scores, or levels in percent."""
    parts = []
    for name, scores in ours.items():
        full = metrics.MME_FULL_SCORES.get(name, 100) / 100
        rows = {"task": name, "picture": (pictures or {}).get(name) or ""}
        rows["ours"] = np.divide(scores, full)
        if theirs is not None:
            rows |= {"theirs": np.divide(theirs[name], full), "chance": (chance or {}).get(name, 0)}
            rows["chance"] /= 100
            floor = rows["chance"] if floors is None else floors[name]
            is_level = floors is not None and isinstance(floor, float)
            rows["floor"] = floor / 100 if is_level else np.divide(floor, full if floors else 1)
        parts.append(pd.DataFrame(rows))
    return pd.concat(parts, ignore_index=True)


def retention(*given):
    return metrics.retention(answers(*given))


def difference(before, after):
    return metrics.average_difference(answers(after, before))


CHANCE = {"a": 50.0, "b": 25.0}
ORIGINAL = scores_of(0, a=0.9, b=0.7)
PRUNED = scores_of(1, a=0.75, b=0.5)


def means_of(*models):
    return [float(np.mean([100 * np.mean(model[n]) for n in "ab"])) for model in models]


def test_retention_is_a_ratio_of_means_in_a_paired_interval():
    kept = retention(PRUNED, ORIGINAL, CHANCE)
    mean, base = means_of(PRUNED, ORIGINAL)
    assert kept.percent == pytest.approx(100 * mean / base)
    assert kept.above_chance == pytest.approx(100 * (mean - 37.5) / (base - 37.5))
    assert kept.above_chance < kept.percent
    assert kept.low < kept.percent < kept.high
    assert kept.high - kept.low < 30
    pruned, original = ({n: v * 16 for n, v in m.items()} for m in (PRUNED, ORIGINAL))
    many = retention(pruned, original, CHANCE)
    assert many.percent == pytest.approx(kept.percent)
    assert many.high - many.low < 0.4 * (kept.high - kept.low)  # more questions narrow it
    same = retention(ORIGINAL, ORIGINAL, CHANCE)
    assert (same.percent, same.above_chance) == pytest.approx((100, 100))
    assert 97 < same.low < 100 < same.high < 103  # the next question may differ
    assert kept == retention(PRUNED, ORIGINAL, CHANCE)


@pytest.mark.parametrize(("metric", "answers", "score"), TABLES["constant_answers"])
def test_the_best_constant_answer(metric, answers, score):
    found = metrics.majority_score(metric, [asking(*given) for given in answers])
    assert found == pytest.approx(score)


def test_floors_of_questions_are_drawn_may_not_be_reached_and_mme_has_its_scale():
    """Constants move no interval; a floor equal to the model leaves nothing, in every draw."""
    level = retention(PRUNED, ORIGINAL, CHANCE, {"a": 60.0, "b": 30.0})
    assert level.above_chance == retention(PRUNED, ORIGINAL, CHANCE).above_chance
    mean, base = means_of(PRUNED, ORIGINAL)
    assert level.above_floor == pytest.approx(100 * (mean - 45) / (base - 45))
    assert level.above_floor_low < level.above_floor < level.above_floor_high
    same = retention(PRUNED, ORIGINAL, CHANCE, PRUNED)
    assert same.above_floor_low < same.above_floor == 0 < same.above_floor_high
    half = {"a": [1.0, 0.0]}
    kept, below = (retention(half, half, {"a": 0.0}, {"a": f}) for f in (40.0, 60.0))
    assert kept.above_floor == pytest.approx(100)
    assert np.isnan(kept.above_floor_low)
    assert np.isnan([below.above_floor, below.above_floor_low]).all()
    third = {"a": [1.0] * 3 + [0.0] * 7}  # its mean is above 0.3 by a rounding error
    level = retention({"a": [0.0] * 10}, third, {"a": 30.0})
    assert np.isnan([level.above_floor, level.above_chance, level.above_floor_high]).all()
    nothing = retention(half, {"a": [0.0, 0.0]}, {"a": 0.0})
    assert {*nothing.as_json().values()} == {None}
    assert str(nothing) == "-"
    few = retention(*[{"a": [1.0] * 2 + [0.0] * 18}] * 2, {"a": 0.0})
    assert str(few) == "100.0 [no bounds]"  # 2 of 20 are not clearly above none
    # scores of MME reach 20 for each question; half of its full score is 50 %
    scores, base = {"mme_perception": [5.0, 15.0] * 30}, {"mme_perception": [15.0] * 60}
    kept = retention(scores, base, {"mme_perception": 37.5})
    assert kept.percent == pytest.approx(100 * 50 / 75)
    assert kept.above_floor == pytest.approx(kept.above_chance)
    assert kept.above_floor == pytest.approx(100 * (50 - 37.5) / (75 - 37.5))
    each = retention(scores, base, {"mme_perception": 0.0}, {"mme_perception": [7.5] * 60})
    assert each.above_floor == pytest.approx(kept.above_floor)


def differ(a, b):
    return difference({"a": a}, {"a": b})


def test_differences_of_averages_are_significant_where_they_are_clear():
    found = difference(ORIGINAL, PRUNED)
    base, mean = means_of(ORIGINAL, PRUNED)
    assert found.value == pytest.approx(mean - base)
    assert found.low < found.value < found.high < 0
    assert found.significant
    none = difference(ORIGINAL, ORIGINAL)
    assert none.low < none.value == 0 < none.high
    assert not none.significant
    worse = differ([1.0] * 40, [1.0] * 20 + [0.0] * 20)
    assert worse.low < worse.value == -50 < worse.high < 0
    assert worse.significant
    a, b = [1.0] * 20 + [0.0] * 20, [1.0] * 19 + [0.0] * 20 + [1.0]
    assert not differ(a, b).significant
    assert not differ(a, [1.0] * 21 + [0.0] * 19).significant
    # the same two averages: surer when the same questions stay right
    a, b = [1.0] * 50 + [0.0] * 50, [1.0] * 40 + [0.0] * 60
    paired, crossed = differ(a, b), differ(a, b[::-1])
    assert paired.value == crossed.value
    assert paired.high - paired.low < crossed.high - crossed.low


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=20))
def test_swapping_the_models_turns_the_difference_round(pairs):
    a, b = zip(*pairs, strict=True)
    there, back, same = (differ(*each) for each in ((a, b), (b, a), (a, a)))
    assert same.low < same.value == 0 < same.high
    assert back.value == pytest.approx(-there.value)
    assert (back.low, back.high) == pytest.approx((-there.high, -there.low))
