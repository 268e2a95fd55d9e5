"""Two models answer by answer: which answers are lost and gained, and why some are not compared."""

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from slimvlm.core.errors import ConfigError, DataError
from slimvlm.data.samples import Question, Task
from slimvlm.evaluation.compare import CHANGES, compare, comparison_json, comparison_rows
from slimvlm.evaluation.metrics import METRICS
from slimvlm.evaluation.results import Result, TaskResult

TEXT = TaskResult("perplexity", 12.0, 0.0, False, ("p", "q"), ("", ""), (2.5, 2.4))


def questions(name, count, size=None):
    """Questions about pictures of noise, all with the answer "cat"."""
    rng = np.random.default_rng(0)
    found = []
    for i in range(count):
        noise = () if size is None else (rng.integers(0, 255, (size[1], size[0], 3), np.uint8),)
        pictures = tuple(map(Image.fromarray, noise))
        found.append(Question(f"{name}-{i}", f"what is in {name} {i}?", ("cat",), pictures))
    return found


def task_of(name, asked, metric="exact_match"):
    return Task(name, metric, 0.0, lambda limit: asked[:limit])


def answered(asked, replies, metric="exact_match"):
    """The result of these replies: words, or a string of ``1`` (right) and ``0`` (wrong)."""
    if isinstance(replies, str):
        replies = ["cat" if digit == "1" else "dog" for digit in replies]
    scores = tuple(METRICS[metric](r, q) for r, q in zip(replies, asked, strict=True))
    ids, mean = tuple(q.id for q in asked), 100 * sum(scores) / len(scores)
    return TaskResult(metric, mean, 0.0, True, ids, tuple(replies), scores)


def result(model, **tasks):
    return Result(model, 2_000_000, 1_000_000, tasks, prefill_ms=1.0, decode_ms=1.0)


def two(a, b, size=None):
    """A comparison on one task, from strings of right and wrong."""
    asked = questions("pets", len(a), size)
    theirs, ours = (result(n, pets=answered(asked, r)) for n, r in (("large", a), ("small", b)))
    return compare(theirs, ours, {"pets": task_of("pets", asked)}), asked


def graded():
    asked = [Question(f"q{i}", "list", ("a, b",)) for i in range(2)]
    a = result("a", pets=answered(asked, ["a, b"] * 2, "set_f1"))
    b = result("b", pets=answered(asked, ["a, c", "c"], "set_f1"))
    return compare(a, b, {"pets": task_of("pets", asked, "set_f1")})


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_every_question_is_of_one_kind(pairs):
    a, b = ("".join(str(int(pair[side])) for pair in pairs) for side in (0, 1))
    task = two(a, b)[0].tasks["pets"]
    assert task.counts == {
        "lost": pairs.count((True, False)),
        "gained": pairs.count((False, True)),
        "both wrong": pairs.count((False, False)),
        "both right": pairs.count((True, True)),
    }
    assert sum(task.counts.values()) == len(pairs)
    change = 100 * (task.counts["gained"] - task.counts["lost"]) / len(pairs)
    assert task.difference.value == pytest.approx(change)
    assert task.score_b - task.score_a == pytest.approx(change)


def test_counts_of_all_tasks_add_up_and_others_are_named():
    one, other = questions("one", 4), questions("two", 4)
    a = result("a", one=answered(one, "1100"), two=answered(other, "1111"))
    b = result("b", one=answered(one, "1010"), two=answered(other, "1110"))
    found = compare(a, b, {})
    assert found.total.counts == {"lost": 2, "gained": 1, "both wrong": 1, "both right": 4}
    assert found.total.difference.value == pytest.approx(-12.5)
    for before, lost in (("cat", 2), ("hen", 0)):  # wrong before and after, in other words
        words = {"a": before, "b": "cow"}
        worded = [result(n, one=answered(one, ["dog", w] * 2)) for n, w in words.items()]
        total = compare(*worded, {}).total
        assert (total.flips, total.counts["lost"]) == (2, lost)
    halves = {
        n: result(n, mme_perception=replace(MME, scores=(s,) * 4))
        for n, s in (("a", 20.0), ("b", 18.0))
    }
    found = compare(halves["a"], halves["b"], {})  # 2000 and 1800 of 2000 points
    assert found.total.difference.value == pytest.approx(-10)
    assert found.tasks["mme_perception"].difference.value == pytest.approx(-200)
    kinds = [pair.kind for pair in graded().tasks["pets"].pairs]
    assert kinds == ["both right", "lost"]  # graded answers are right from one half
    both = answered(TWO, "10")
    a = result("a", pets=both, text=TEXT, extra=both)
    found = compare(a, result("b", pets=both, text=replace(TEXT, score=13.0)), {})
    assert list(found.tasks) == ["pets"]
    assert found.left_out["extra"] == "only A has results of it"
    assert "12.00 of A, 13.00 of B" in found.left_out["text"]


TWO = questions("pets", 2)
MME = TaskResult("mme", 2000.0, 37.5, True, tuple("abcd"), ("yes",) * 4, (20.0,) * 4)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"pets": answered(TWO[:1], "1")}, r"'pets'.*other questions"),
        ({"pets": answered(TWO, "11", "set_f1")}, r"'pets'.*another metric"),
        ({"cats": answered(TWO, "11")}, "no task"),
    ],
)
def test_results_that_do_not_pair_are_refused(other, message):
    with pytest.raises(ConfigError, match=message):
        compare(result("a", pets=answered(TWO, "11")), result("b", **other), {})


def test_rows_mark_a_significant_difference_and_json_names_answers():
    header, rows = comparison_rows(two("1" * 40, "1" * 20 + "0" * 20)[0])
    assert header[0] == "task"
    assert header[-5:] == ["flips = lost + gained + reworded", *CHANGES]
    assert [row[0] for row in rows] == ["pets", "all", "AVG-% free, floor 0.0"]
    assert rows[-1][1] == "100.0"
    assert re.fullmatch(r"50\.0 \[\d+\.\d, \d+\.\d\]", rows[-1][2])
    assert all(len(row) == len(header) for row in rows)
    assert rows[0][1:3] == ["100.0", "50.0"]
    assert re.fullmatch(r"-50\.0 \[-\d+\.\d, -\d+\.\d\] \*", rows[0][3])
    assert rows[0][-5:] == ["20 = 20 + 0 + 0", "20", "0", "0", "20"]
    _, rows = comparison_rows(two("1010", "1010")[0])
    assert re.fullmatch(r"\+0\.0 \[-\d+\.\d, \+\d+\.\d\]", rows[0][3].strip())
    values = comparison_json(two("1101", "1010")[0])
    pets = values["tasks"]["pets"]
    assert pets["lost"] == ["pets-1", "pets-3"]
    assert pets["gained"] == ["pets-2"]
    assert pets["flips"] == 3
    assert pets["points"] == -25
    assert pets["significant"] is False
    assert values["all"]["counts"] == pets["counts"]
    assert list(values["retention_by_kind"]) == ["free"]
    assert values["retention_by_kind"]["free"]["percent"] == pytest.approx(200 / 3)
    assert values["retention_by_kind"]["free"]["floor"] == 0


def gone(limit):
    raise DataError("data 'q.jsonl': no such file")


@pytest.mark.parametrize(
    ("known", "note"),
    [
        ({}, "the task is not known here"),
        ({"pets": Task("pets", "exact_match", 0.0, gone)}, "'q.jsonl': no such file"),
        ({"pets": task_of("pets", [replace(q, answers=("dog",)) for q in TWO])}, "has changed"),
    ],
)
def test_unknown_and_changed_tasks_show_no_wrong_questions(known, note):
    a, b = (result(n, pets=answered(TWO, n)) for n in ("11", "10"))
    found = compare(a, b, known)
    assert found.total.counts["lost"] == 1
    assert note in found.tasks["pets"].note
    assert all(not pair.question.prompt for pair in found.tasks["pets"].pairs)
