"""Metrics give replies, as models write them, the scores that people would.

``replies.json`` has them by metric and by accepted answers (between bars). Its scores were written
by hand: for the graded metrics, from their definitions.
"""

import json
from fractions import Fraction
from pathlib import Path

import pytest

from slimvlm.data.samples import Question
from slimvlm.evaluation.metrics import METRICS

REPLIES = json.loads(Path(__file__).with_name("replies.json").read_text(encoding="utf-8"))


def test_every_metric_has_replies():
    assert set(REPLIES) == set(METRICS)
    assert sum(len(rows) for of in REPLIES.values() for rows in of.values()) >= 300


@pytest.mark.parametrize("metric", REPLIES)
def test_a_reply_scores_as_people_would_score_it(metric):
    wrong = {}
    for answers, rows in REPLIES[metric].items():
        question = Question("q", "?", tuple(answers.split("|")))
        for reply, score in rows.items():
            found = METRICS[metric](reply, question)
            if found != pytest.approx(float(Fraction(score)), abs=1e-9):
                wrong[answers, reply] = found, score
    assert wrong == {}


@pytest.mark.parametrize(
    "piece", ["<answer>", "\\boxed{", "<think>", "*a ", "answer: ", "A. ", "no, "]
)
def test_a_reply_that_repeats_itself_is_scored(piece):
    """Patterns that backtrack over such replies would take minutes."""
    for metric in METRICS.values():
        assert 0 <= metric(1500 * piece, Question("q", "?", ("B", "yes"))) <= 1
