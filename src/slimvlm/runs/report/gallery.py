"""Answers of two models as cards with pictures, as many as fit into one HTML file."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from markupsafe import escape
from PIL import Image

from slimvlm.data.images import open_image
from slimvlm.evaluation.compare import CHANGES, RIGHT, Change, Comparison, Pair, TaskComparison
from slimvlm.evaluation.metrics import Difference
from slimvlm.runs.report.page import render

MAX_BYTES = 4_700_000
"""How large a page may grow before it leaves out pictures."""
MAX_CARDS: Mapping[Change, int] = {"both wrong": 40, "both right": 12}
"""Cards of one task at most. Answers that were lost or gained are always shown."""
CARD_BYTES = 850
"""Markup of a card without its words and pictures, rounded up."""
SMALL, SMALL_SHOWN, LARGE = 64, 128, 256
"""Pictures up to the first size are enlarged to the second; those above the third are reduced."""


@dataclass(frozen=True)
class Picture:
    """A picture as a page shows it.

    Attributes:
        uri: A PNG data URI.
        width: In CSS pixels.
        height: In CSS pixels.
        enlarged: Whether it is shown larger than it is, pixel by pixel.
    """

    uri: str
    width: int
    height: int
    enlarged: bool


@dataclass(frozen=True)
class Card:
    """An answer as a page shows it; without pictures once the file is full."""

    pair: Pair
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Gallery:
    """What ``gallery.html.jinja`` shows.

    Attributes:
        comparison: The two models.
        cards: Cards by task.
        hidden: For each task, how many answers of each kind get no card.
        pictures_left_out: Cards that had to go without their pictures.
        graded: Whether some answers are neither right nor wrong.
        place: From points to a place on an axis from 0 to 100 that all tasks share.
    """

    comparison: Comparison
    cards: Mapping[str, Sequence[Card]]
    hidden: Mapping[str, Mapping[Change, int]]
    pictures_left_out: int
    graded: bool
    place: Callable[[float], float]
    kinds: tuple[Change, ...] = CHANGES
    right: float = RIGHT


def gallery_of(comparison: Comparison, max_bytes: int = MAX_BYTES) -> Gallery:
    """Lay out a comparison.

    Answers that did not change are shown up to `MAX_CARDS` for each task, and pictures until the
    page reaches its size: those of lost answers come first.

    Args:
        comparison: What `slimvlm.evaluation.compare.compare` found.
        max_bytes: Room for all cards.
    """
    cards, pictures_left_out = _cards(comparison, max_bytes)
    return Gallery(
        comparison=comparison,
        cards=cards,
        hidden={name: _hidden(task) for name, task in comparison.tasks.items()},
        pictures_left_out=pictures_left_out,
        graded=any(
            score not in (0, 1)
            for task in comparison.tasks.values()
            for pair in task.pairs
            for score in (pair.score_a, pair.score_b)
        ),
        place=_places([*(t.difference for t in comparison.tasks.values()), comparison.difference]),
    )


def comparison_html(comparison: Comparison, title: str) -> str:
    """One HTML file with a table and every answer that was lost or gained, pictures included.

    It needs no network and works without scripts.
    """
    return render("comparison.html.jinja", title=title, gallery=gallery_of(comparison))


def _places(drawn: Sequence[Difference]) -> Callable[[float], float]:
    reach = max(max(abs(d.low), abs(d.high), 1.0) for d in drawn)
    return lambda value: round(50 + 48 * value / reach, 1)


def _shown(task: TaskComparison, kind: Change) -> list[Pair]:
    """Pairs of one kind that get a card; replies that differ most come first."""
    pairs = [pair for pair in task.pairs if pair.kind == kind]
    if kind not in MAX_CARDS:
        return pairs
    pairs.sort(key=lambda p: (-abs(p.score_a - p.score_b), p.reply_a == p.reply_b))
    return pairs[: MAX_CARDS[kind]]


def _hidden(task: TaskComparison) -> dict[Change, int]:
    left = {kind: n - len(_shown(task, kind)) for kind, n in task.counts.items()}
    return {kind: n for kind, n in left.items() if n}


def _cards(comparison: Comparison, room: int) -> tuple[dict[str, list[Card]], int]:
    """Cards by task, and how many of them had to go without their pictures."""
    queue = [
        (rank, turn, task.name, pair)
        for rank, kind in enumerate(CHANGES)
        for task in comparison.tasks.values()
        for turn, pair in enumerate(_shown(task, kind))
    ]
    queue.sort(key=lambda entry: entry[:2])  # tasks take turns, so that all get some pictures
    room -= sum(CARD_BYTES + _text_bytes(pair) for *_, pair in queue)
    cards: dict[str, list[Card]] = {name: [] for name in comparison.tasks}
    left_out = 0
    for *_, name, pair in queue:
        pictures = tuple(map(_picture, pair.question.images)) if room > 0 else ()
        size = sum(len(picture.uri) for picture in pictures)
        if size > room:
            pictures, room = (), 0
        room -= size
        left_out += bool(pair.question.images) and not pictures
        cards[name].append(Card(pair, pictures))
    return cards, left_out


def _text_bytes(pair: Pair) -> int:
    asked = pair.question
    words = (asked.id, asked.prompt, *asked.answers, pair.reply_a, pair.reply_b)
    return sum(len(str(escape(text)).encode()) for text in words)


def _picture(image: Image.Image | Path) -> Picture:
    """A PNG data URI: small pictures as they are, large ones reduced, in 256 colours."""
    shown = open_image(image)
    if max(shown.size) > SMALL_SHOWN:
        shown.thumbnail((LARGE, LARGE))
        shown = shown.quantize(256)
    buffer = BytesIO()
    shown.save(buffer, "PNG", optimize=True)
    enlarged = max(shown.size) <= SMALL
    scale = SMALL_SHOWN / max(shown.size) if enlarged else 1
    width, height = (max(1, round(side * scale)) for side in shown.size)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return Picture(f"data:image/png;base64,{encoded}", width, height, enlarged)
