"""Answers of two models as HTML: complete, escaped, offline, and below five megabytes."""

from __future__ import annotations

import base64
import re
from dataclasses import replace
from html import unescape
from io import BytesIO

import pytest
from PIL import Image

from slimvlm.evaluation.compare import Change, Comparison, compare
from slimvlm.runs.report.gallery import MAX_CARDS, comparison_html
from tests.evaluation.test_compare import TEXT, answered, graded, questions, result, task_of, two

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>&amp;"


def page(found: Comparison) -> str:
    return comparison_html(found, "t")


def cards(html: str) -> list[str]:
    return re.findall(r"<article.*?</article>", html, flags=re.DOTALL)


def test_every_lost_and_gained_question_has_a_card() -> None:
    a, b = "1" * 100 + "0" * 100, "0" * 100 + "1" * 100
    found, asked = two(a, b)
    html = page(found)
    assert "200 questions, 200 flips" in html
    shown = cards(html)
    assert len(shown) == 200
    for question, kind in zip(asked, ["lost"] * 100 + ["gained"] * 100, strict=True):
        ours = [card for card in shown if f">{question.id}<" in card]
        assert len(ours) == 1
        assert f'data-kind="{kind}"' in ours[0]
        assert question.prompt in ours[0]


@pytest.mark.parametrize(("digit", "kind"), [("1", "both right"), ("0", "both wrong")])
def test_the_number_of_hidden_answers_is_shown(digit: str, kind: Change) -> None:
    html = page(two(digit * 100, digit * 100)[0])
    assert len(cards(html)) == MAX_CARDS[kind]
    assert f"{100 - MAX_CARDS[kind]} more {kind} are not shown." in html


def test_graded_answers_show_their_score() -> None:
    assert "counts as right from 50" in page(graded())
    assert "50&thinsp;%" in page(graded())


def test_notes_are_shown() -> None:
    found, asked = two("11", "10", size=(64, 64))
    pets = answered(asked, "11")
    a, b = result("a", pets=pets, text=TEXT), result("b", pets=answered(asked, "10"), text=TEXT)
    blind = compare(replace(a, blind=True), b, {})
    assert blind.note
    html = page(blind)
    assert blind.note in html
    assert "text is not compared: perplexity 12.00" in html
    assert "the task is not known here" in html
    assert ">pets-1<" in html
    assert "<img" not in html
    assert "<img" in page(found)


def test_words_of_models_files_and_data_are_escaped() -> None:
    asked = [
        replace(q, id=q.id + EVIL, prompt=EVIL, answers=("cat", EVIL)) for q in questions("pets", 2)
    ]
    a = result(EVIL, **{EVIL: answered(asked, "11")})
    b = result(EVIL, **{EVIL: answered(asked, ["dog", EVIL + " no"])})
    found = compare(a, b, {EVIL: task_of(EVIL, asked)})
    html = comparison_html(replace(found, left_out={EVIL: EVIL}), EVIL)
    assert len(re.findall("<script", html)) == 1  # our own
    assert "<img" not in html
    assert not re.search(r"<[^>]*onerror", html)
    assert html.count(EVIL) == 0
    assert EVIL + " no" in unescape(html)


def test_it_asks_the_network_for_nothing() -> None:
    html = page(two("11", "10", size=(64, 64))[0])
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
def test_pictures_fit_and_small_ones_are_exact(
    size: tuple[int, int], stored: tuple[int, int], shown: tuple[int, int], enlarged: bool
) -> None:
    compared, asked = two("1", "0", size=size)
    html = page(compared)
    pattern = r'<img src="data:image/png;base64,([^"]+)" width="(\d+)" height="(\d+)"'
    found = re.search(pattern, html)
    assert found is not None
    image = Image.open(BytesIO(base64.b64decode(found[1])))
    assert image.format == "PNG"
    assert image.size == stored
    assert (int(found[2]), int(found[3])) == shown
    assert ('class="pixel"' in html) is enlarged
    if enlarged:
        assert image.convert("RGB").tobytes() == asked[0].images[0].tobytes()  # type: ignore[union-attr]


def test_a_page_stays_below_five_megabytes() -> None:
    """Noise does not compress: pictures go, those of lost answers last; words stay."""
    html = page(two("0" * 300 + "1" * 300, "1" * 300 + "0" * 300, size=(64, 64))[0])
    assert 4_000_000 < len(html.encode()) < 5_000_000
    shown = cards(html)
    assert len(shown) == 600
    bare = [card for card in shown if "<img" not in card]
    assert f"Pictures of {len(bare)} answers are left out" in html
    with_picture = [card for card in shown if "<img" in card]
    assert {'data-kind="lost"' in card for card in with_picture[:200]} == {True}


def test_every_task_gets_some_of_the_pictures() -> None:
    asked = {name: questions(name, 300, (64, 64)) for name in ("one", "two")}
    a, b = (
        result(right, **{name: answered(q, right * 300) for name, q in asked.items()})
        for right in "10"
    )
    found = compare(a, b, {name: task_of(name, q) for name, q in asked.items()})
    shown = [card for card in cards(page(found)) if "<img" in card]
    ours = sum(">one-" in card for card in shown)
    assert 0 <= 2 * ours - len(shown) <= 1
