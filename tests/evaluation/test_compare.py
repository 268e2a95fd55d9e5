"""Two models answer by answer: what was lost, what was gained, and the report about it."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import replace
from html import unescape
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from slimvlm.core.errors import ConfigError
from slimvlm.data.samples import Question, Task
from slimvlm.evaluation.compare import (
    CHANGES,
    Comparison,
    compare,
    comparison_json,
    comparison_rows,
)
from slimvlm.evaluation.metrics import METRICS, paired_difference
from slimvlm.evaluation.results import Result, TaskResult
from slimvlm.runs.report.gallery import MAX_CARDS, comparison_html
from slimvlm.runs.tables import LEGEND, as_markdown, as_table, result_json, result_rows

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>&amp;"


def questions(name: str, count: int, size: tuple[int, int] | None = None) -> list[Question]:
    rng = np.random.default_rng(0)

    def pictures() -> tuple[Image.Image, ...]:
        if size is None:
            return ()
        return (Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), np.uint8)),)

    return [
        Question(f"{name}-{i}", f"what is in {name} {i}?", ("cat",), pictures())
        for i in range(count)
    ]


def task_of(name: str, asked: Sequence[Question], metric: str = "exact_match") -> Task:
    return Task(name, metric, 0.0, lambda limit: asked[:limit])


def answered(
    asked: Sequence[Question], replies: Sequence[str], metric: str = "exact_match"
) -> TaskResult:
    scores = [METRICS[metric](r, q) for r, q in zip(replies, asked, strict=True)]
    ids = tuple(q.id for q in asked)
    mean = 100 * sum(scores) / len(scores)
    return TaskResult(metric, mean, 0.0, True, ids, tuple(replies), tuple(scores))


def result(model: str, **tasks: TaskResult) -> Result:
    return Result(model, 2_000_000, 1_000_000, tasks, 1.0, 1.0)


def replies(right: str) -> list[str]:
    """Replies from a string of ``1`` (right) and ``0`` (wrong)."""
    return ["cat" if digit == "1" else "dog" for digit in right]


def two(
    a: str, b: str, size: tuple[int, int] | None = None, wrong: str = "dog"
) -> tuple[Comparison, list[Question]]:
    """A comparison on one task, from strings of right and wrong; ``wrong`` is what B then says."""
    asked = questions("pets", len(a), size)
    said = [wrong if reply == "dog" else reply for reply in replies(b)]
    ours = result("small", pets=answered(asked, said))
    theirs = result("large", pets=answered(asked, replies(a)))
    return compare(theirs, ours, {"pets": task_of("pets", asked)}), asked


def cards(html: str) -> list[str]:
    return re.findall(r"<article.*?</article>", html, flags=re.DOTALL)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_every_question_is_of_one_kind(pairs: list[tuple[bool, bool]]) -> None:
    a, b = ("".join(str(int(pair[side])) for pair in pairs) for side in (0, 1))
    found, _ = two(a, b)
    task = found.tasks["pets"]
    assert task.counts == {
        "lost": pairs.count((True, False)),
        "gained": pairs.count((False, True)),
        "both wrong": pairs.count((False, False)),
        "both right": pairs.count((True, True)),
    }
    assert sum(task.counts.values()) == len(pairs)
    change = 100 * (task.counts["gained"] - task.counts["lost"]) / len(pairs)
    assert task.difference.points == pytest.approx(change)
    assert task.score_b - task.score_a == pytest.approx(change)


def test_counts_of_all_tasks_add_up() -> None:
    asked = {name: questions(name, 4) for name in ("one", "two")}
    a = result(
        "a",
        one=answered(asked["one"], replies("1100")),
        two=answered(asked["two"], replies("1111")),
    )
    b = result(
        "b",
        one=answered(asked["one"], replies("1010")),
        two=answered(asked["two"], replies("1110")),
    )
    found = compare(a, b, {})
    assert found.counts == {"lost": 2, "gained": 1, "both wrong": 1, "both right": 4}
    assert found.difference.points == pytest.approx(-12.5)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40))
def test_a_model_does_not_differ_from_itself(scores: list[float]) -> None:
    same = paired_difference(scores, scores, resamples=20)
    assert (same.points, same.low, same.high, same.significant) == (0, 0, 0, False)


def test_a_clear_difference_is_significant() -> None:
    worse = paired_difference([1.0] * 40, [1.0] * 20 + [0.0] * 20)
    assert worse.low < worse.points == -50 < worse.high < 0
    assert worse.significant


def test_a_small_difference_is_not() -> None:
    a, b = [1.0] * 20 + [0.0] * 20, [1.0] * 19 + [0.0] * 20 + [1.0]
    assert not paired_difference(a, b).significant
    assert not paired_difference(a, [1.0] * 21 + [0.0] * 19).significant


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=20))
def test_swapping_the_models_turns_the_difference_round(pairs: list[tuple[float, float]]) -> None:
    a, b = zip(*pairs, strict=True)
    there, back = paired_difference(a, b, resamples=30), paired_difference(b, a, resamples=30)
    assert back.points == pytest.approx(-there.points)
    assert (back.low, back.high) == pytest.approx((-there.high, -there.low))


def test_pairing_matters() -> None:
    """The same two averages: surer when the same questions stay right."""
    a, b = [1.0] * 50 + [0.0] * 50, [1.0] * 40 + [0.0] * 60
    paired, crossed = paired_difference(a, b), paired_difference(a, b[::-1])
    assert paired.points == crossed.points
    assert paired.high - paired.low < crossed.high - crossed.low


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for seed in range(200):
        a, b = rng.random(80) < 0.8, rng.random(80) < 0.6
        found = paired_difference(
            a.astype(float).tolist(), b.astype(float).tolist(), resamples=200, seed=seed
        )
        hits += found.low <= -20 <= found.high
    assert 178 <= hits <= 199  # 95 % of 200, give or take three standard errors


@pytest.mark.parametrize(("a", "b"), [([], []), ([1.0], [1.0, 0.0])])
def test_scores_must_pair(a: list[float], b: list[float]) -> None:
    with pytest.raises(ValueError, match="same questions"):
        paired_difference(a, b)


def test_other_questions_are_refused() -> None:
    a = result("a", pets=answered(questions("pets", 3), replies("111")))
    b = result("b", pets=answered(questions("pets", 2), replies("11")))
    with pytest.raises(ConfigError, match=r"'pets'.*other questions \(3 and 2"):
        compare(a, b, {})


def test_another_metric_is_refused() -> None:
    asked = questions("pets", 2)
    a = result("a", pets=answered(asked, replies("11")))
    b = result("b", pets=answered(asked, replies("11"), "set_f1"))
    with pytest.raises(ConfigError, match="'exact_match' in one, 'set_f1'"):
        compare(a, b, {})


def test_nothing_in_common_is_refused() -> None:
    asked = questions("pets", 1)
    with pytest.raises(ConfigError, match="no task"):
        compare(
            result("a", one=answered(asked, ["cat"])), result("b", two=answered(asked, ["cat"])), {}
        )


def test_what_cannot_be_compared_is_named() -> None:
    asked = questions("pets", 2)
    both = answered(asked, replies("10"))
    text = TaskResult("perplexity", 12.0, 0.0, False, ("p",), ("",), (2.5,))
    a = result("a", pets=both, text=text, extra=both)
    b = result("b", pets=both, text=replace(text, score=13.0))
    found = compare(a, b, {})
    assert list(found.tasks) == ["pets"]
    assert found.left_out["extra"] == "only A answered it"
    assert "12.00 of A, 13.00 of B" in found.left_out["text"]
    assert "text is not compared: perplexity 12.00" in comparison_html(found, "t")


def test_graded_answers_are_right_from_one_half() -> None:
    asked = [Question(f"q{i}", "list", ("a, b",)) for i in range(2)]
    a = result("a", pets=answered(asked, ["a, b"] * 2, "set_f1"))
    b = result("b", pets=answered(asked, ["a, c", "c"], "set_f1"))
    found = compare(a, b, {"pets": task_of("pets", asked, "set_f1")})
    assert [pair.kind for pair in found.tasks["pets"].pairs] == ["both right", "lost"]
    html = comparison_html(found, "t")
    assert "counts as right from 50" in html
    assert "50&thinsp;%" in html


def test_rows_mark_what_is_significant() -> None:
    header, rows = comparison_rows(two("1" * 40, "1" * 20 + "0" * 20)[0])
    assert header[0] == "task"
    assert header[-5:] == ["flips", *CHANGES]
    assert [row[0] for row in rows] == ["pets", "all"]
    assert all(len(row) == len(header) for row in rows)
    assert rows[0][1:3] == ["100.0", "50.0"]
    assert re.fullmatch(r"-50\.0 \[-\d+\.\d, -\d+\.\d\] \*", rows[0][3])
    assert rows[0][-5:] == ["20", "20", "0", "0", "20"]
    _, rows = comparison_rows(two("1010", "1010")[0])
    assert rows[0][3].strip() == "0.0 [0.0, 0.0]"


def test_json_names_what_was_lost_and_gained() -> None:
    values = comparison_json(two("1101", "1010")[0])
    pets = values["tasks"]["pets"]
    assert pets["lost"] == ["pets-1", "pets-3"]
    assert pets["gained"] == ["pets-2"]
    assert pets["flips"] == 3
    assert pets["points"] == -25
    assert pets["significant"] is False
    assert values["all"]["counts"] == pets["counts"]


def test_html_has_every_lost_and_gained_question() -> None:
    a, b = "1" * 100 + "0" * 100, "0" * 100 + "1" * 100
    found, asked = two(a, b)
    page = comparison_html(found, "t")
    assert "200 questions, 200 flips" in page
    shown = cards(page)
    assert len(shown) == 200
    for question, kind in zip(asked, ["lost"] * 100 + ["gained"] * 100, strict=True):
        ours = [card for card in shown if f">{question.id}<" in card]
        assert len(ours) == 1
        assert f'data-kind="{kind}"' in ours[0]
        assert question.prompt in ours[0]


@pytest.mark.parametrize(("digit", "kind"), [("1", "both right"), ("0", "both wrong")])
def test_html_says_how_many_unchanged_answers_it_hides(digit: str, kind: str) -> None:
    found, _ = two(digit * 100, digit * 100)
    html = comparison_html(found, "t")
    assert len(cards(html)) == MAX_CARDS[kind]  # type: ignore[index]
    assert f"{100 - MAX_CARDS[kind]} more {kind} are not shown." in html  # type: ignore[index]


def test_html_escapes_what_models_files_and_data_say() -> None:
    found, asked = two("11", "00", wrong=EVIL)
    asked = [replace(q, id=q.id + EVIL, prompt=EVIL, answers=("cat", EVIL)) for q in asked]
    a = result(EVIL, **{EVIL: answered(asked, replies("11"))})
    b = result(EVIL, **{EVIL: answered(asked, ["dog", EVIL + " no"])})
    found = compare(a, b, {EVIL: task_of(EVIL, asked)})
    html = comparison_html(replace(found, left_out={EVIL: EVIL}), EVIL)
    assert len(re.findall("<script", html)) == 1  # our own
    assert "<img" not in html
    assert not re.search(r"<[^>]*onerror", html)
    assert html.count(EVIL) == 0
    assert EVIL + " no" in unescape(html)


def test_html_asks_the_network_for_nothing() -> None:
    html = comparison_html(two("11", "10", size=(64, 64))[0], "t")
    assert not re.search(r"https?://|@import|url\(|<link|src=\"(?!data:)", html)
    assert "default-src 'none'" in html


@pytest.mark.parametrize(
    ("size", "stored", "shown", "enlarged"),
    [
        ((64, 64), (64, 64), (128, 128), True),
        ((32, 16), (32, 16), (128, 64), True),
        ((200, 100), (200, 100), (200, 100), False),
        ((1024, 512), (256, 128), (256, 128), False),
        ((2000, 2), (256, 1), (256, 1), False),
    ],
)
def test_pictures_fit(
    size: tuple[int, int], stored: tuple[int, int], shown: tuple[int, int], enlarged: bool
) -> None:
    html = comparison_html(two("1", "0", size=size)[0], "t")
    found = re.search(
        r'<img src="data:image/png;base64,([^"]+)" width="(\d+)" height="(\d+)"', html
    )
    assert found is not None
    image = Image.open(BytesIO(base64.b64decode(found[1])))
    assert image.format == "PNG"
    assert image.size == stored
    assert (int(found[2]), int(found[3])) == shown
    assert ('class="pixel"' in html) is enlarged


def test_small_pictures_are_kept_exactly() -> None:
    found, asked = two("1", "0", size=(64, 64))
    uri = re.search(r"base64,([^\"]+)", comparison_html(found, "t"))
    assert uri is not None
    image = Image.open(BytesIO(base64.b64decode(uri[1])))
    assert image.convert("RGB").tobytes() == asked[0].images[0].tobytes()  # type: ignore[union-attr]


def test_html_stays_below_five_megabytes() -> None:
    """Noise does not compress: pictures go, those of lost answers last; words stay."""
    found, _ = two("0" * 300 + "1" * 300, "1" * 300 + "0" * 300, size=(64, 64))
    html = comparison_html(found, "t")
    assert 4_000_000 < len(html.encode()) < 5_000_000
    shown = cards(html)
    assert len(shown) == 600
    bare = [card for card in shown if "<img" not in card]
    assert f"Pictures of {len(bare)} answers are left out" in html
    with_picture = [card for card in shown if "<img" in card]
    assert {'data-kind="lost"' in card for card in with_picture[:200]} == {True}


def test_every_task_gets_some_of_the_pictures() -> None:
    asked = {name: questions(name, 300, (64, 64)) for name in ("one", "two")}
    said = {
        right: {name: answered(q, replies(right * 300)) for name, q in asked.items()}
        for right in "10"
    }
    known = {name: task_of(name, q) for name, q in asked.items()}
    found = compare(result("a", **said["1"]), result("b", **said["0"]), known)
    shown = [card for card in cards(comparison_html(found, "t")) if "<img" in card]
    ours = sum(">one-" in card for card in shown)
    assert 0 <= 2 * ours - len(shown) <= 1


def test_a_task_that_is_not_at_hand_is_compared_without_questions() -> None:
    asked = questions("pets", 2, (64, 64))
    a, b = (result(n, pets=answered(asked, replies(n))) for n in ("11", "10"))
    found = compare(a, b, {})
    assert found.counts["lost"] == 1
    html = comparison_html(found, "t")
    assert "the task is not known here" in html
    assert ">pets-1<" in html
    assert "<img" not in html


def test_a_task_that_has_changed_shows_no_wrong_questions() -> None:
    asked = questions("pets", 2)
    a, b = (result(n, pets=answered(asked, replies(n))) for n in ("11", "10"))
    changed = [replace(q, answers=("dog",)) for q in asked]
    found = compare(a, b, {"pets": task_of("pets", changed)})
    assert "has changed" in found.tasks["pets"].note
    assert all(not pair.question.prompt for pair in found.tasks["pets"].pairs)


@pytest.mark.parametrize(("a", "b"), [(True, True), (True, False), (False, True)])
def test_a_blind_result_shows_the_pictures_that_were_seen(a: bool, b: bool) -> None:
    asked = questions("pets", 4, (8, 8))
    ours = replace(result("small", pets=answered(asked, replies("0101"))), blind=b)
    theirs = replace(result("large", pets=answered(asked, replies("1111"))), blind=a)
    found = compare(theirs, ours, {"pets": task_of("pets", asked)})
    shown = [pair.question.images for pair in found.tasks["pets"].pairs]
    right = [question.images for question in asked]
    assert shown == ([*right[2:], *right[:2]] if a and b else right)
    start = "A and B were asked blind" if a and b else f"{'A' if a else 'B'} was asked blind"
    assert found.note.startswith(start)
    assert found.note in comparison_html(found, "t")
    assert comparison_json(found)["note"] == found.note
    assert two("1", "0")[0].note == ""


def measured(model: str, right: str, **changes: object) -> Result:
    pets = answered(questions("pets", len(right)), replies(right))
    text = TaskResult("perplexity", 12.0, 0.0, False, ("p", "q"), ("", ""), (2.5, 2.4))
    return result(model, pets=replace(pets, **changes), text=text)  # type: ignore[arg-type]


def test_tables_show_the_floors_that_are_known() -> None:
    plain = {n: measured(n, right) for n, right in (("large", "1" * 8), ("small", "1" * 6 + "00"))}
    header, rows = result_rows(plain)
    assert header == ["task", "chance", "large", "small"]
    assert not any("above floor" in row[0] for row in rows)
    blind = (1.0, *[0.0] * 7)
    plain["large"] = measured("large", "1" * 8, majority=25.0, blind_scores=blind)
    header, rows = result_rows(plain)
    assert header == ["task", "chance", "majority", "blind", "large", "small"]
    assert all(len(row) == len(header) for row in rows)
    cells = {row[0]: row[1:] for row in rows}
    assert cells["pets"][:3] == ["0", "25.0", "12.5"]
    assert cells["text (lower is better)"][:3] == ["", "", ""]
    above = cells["AVG-% above floor [95 % interval]"]
    assert above[:4] == ["", "", "", "100.0"]
    assert above[4].startswith("66.7 [")
    pets = result_json(plain)["large"]["tasks"]["pets"]
    assert (pets["chance"], pets["majority"], pets["blind"]) == (0.0, 25.0, 12.5)


def test_tables_mark_what_differs_from_the_first_model() -> None:
    names = {"large": "1" * 40, "worse": "1" * 20 + "0" * 20, "same": "1" * 40}
    models = {name: measured(name, right) for name, right in names.items()}
    header, rows = result_rows(models)
    cells = {row[0]: row[2:] for row in rows}
    assert cells["pets"] == ["100.0", "50.0 *", "100.0"]
    assert cells["AVG"] == ["100.0", "50.0 *", "100.0"]
    assert cells["text (lower is better)"] == ["12.0"] * 3
    assert as_table(header, rows).caption == LEGEND
    assert as_markdown(header, rows).endswith("\n\n\\" + LEGEND + "\n")
    values = result_json(models)
    assert values["worse"]["tasks"]["pets"]["significant"] is True
    assert values["worse"]["tasks"]["pets"]["difference"]["points"] == -50
    assert values["worse"]["average_significant"] is True
    assert values["same"]["average_difference"]["points"] == 0
    assert "significant" not in values["large"]["tasks"]["pets"]
    header, rows = result_rows({name: models[name] for name in ("large", "same")})
    assert as_table(header, rows).caption is None
    assert LEGEND not in as_markdown(header, rows)
