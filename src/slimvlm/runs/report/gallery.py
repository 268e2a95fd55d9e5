"""HTML from the templates of this package, and answers of two models as cards with pictures."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import escape
from PIL import Image

from slimvlm.data.images import open_image
from slimvlm.evaluation.compare import CHANGES, RIGHT, Change, Comparison, Pair, TaskComparison
from slimvlm.evaluation.metrics import signed

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
    """A picture as a PNG data URI, with its size in CSS pixels."""

    uri: str
    width: int
    height: int
    enlarged: bool
    """Whether it is shown larger than it is, pixel by pixel."""


@dataclass(frozen=True)
class Card:
    """An answer as a page shows it; without pictures once the file is full."""

    pair: Pair
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Gallery:
    """The values of ``gallery.html.jinja``."""

    comparison: Comparison
    cards: Mapping[str, Sequence[Card]]
    """Cards by task."""
    hidden: Mapping[str, Mapping[Change, int]]
    """For each task, how many answers of each kind get no card."""
    pictures_left_out: int
    """Cards without their pictures, for want of room."""
    graded: bool
    """Whether some answers are neither right nor wrong."""
    place: Callable[[float], float]
    """From points to a place on an axis from 0 to 100 that all tasks share."""
    kinds: tuple[Change, ...] = CHANGES
    right: float = RIGHT


def comparison_html(comparison: Comparison, title: str) -> str:
    """Write one HTML file with a table and every lost or gained answer, with pictures."""
    return render("comparison.html.jinja", title=title, gallery=gallery_of(comparison))


def gallery_of(comparison: Comparison, max_bytes: int = MAX_BYTES) -> Gallery:
    """Lay out a comparison as cards.

    Up to `MAX_CARDS` unchanged answers of each task are shown. Pictures are shown until the cards
    fill ``max_bytes``: those of lost answers first, and tasks take turns.
    """
    queue: list[tuple[int, int, str, Pair]] = []
    hidden: dict[str, Counter[Change]] = {}
    for task in comparison.tasks.values():
        shown = [(rank, _shown(task, kind)) for rank, kind in enumerate(CHANGES)]
        queue += [(rank, i, task.name, p) for rank, pairs in shown for i, p in enumerate(pairs)]
        hidden[task.name] = Counter(task.counts)
        hidden[task.name] -= Counter(pair.kind for _, pairs in shown for pair in pairs)
    queue.sort(key=lambda entry: entry[:2])
    room = max_bytes - sum(CARD_BYTES + _text_bytes(pair) for *_, pair in queue)
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
    tasks = comparison.tasks.values()
    scores = {score for task in tasks for p in task.pairs for score in (p.score_a, p.score_b)}
    drawn = [*(task.difference for task in tasks), comparison.difference]
    reach = max(max(abs(d.low), abs(d.high), 1.0) for d in drawn)
    return Gallery(
        comparison=comparison,
        cards=cards,
        hidden=hidden,
        pictures_left_out=left_out,
        graded=bool(scores - {0, 1}),
        place=lambda value: round(50 + 48 * value / reach, 1),
    )


def _shown(task: TaskComparison, kind: Change) -> list[Pair]:
    """Choose the pairs of one kind that get a card; replies that differ most come first."""
    pairs = [pair for pair in task.pairs if pair.kind == kind]
    if kind not in MAX_CARDS:
        return pairs
    pairs.sort(key=lambda p: (-abs(p.score_a - p.score_b), p.reply_a == p.reply_b))
    return pairs[: MAX_CARDS[kind]]


def _text_bytes(pair: Pair) -> int:
    asked = pair.question
    words = (asked.id, asked.prompt, *asked.answers, pair.reply_a, pair.reply_b)
    return sum(len(str(escape(text)).encode()) for text in words)


def _picture(image: Image.Image | Path) -> Picture:
    """Encode a picture as a PNG data URI: large ones reduced, in 256 colours."""
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


def render(template: str, **values: Any) -> str:
    """Fill a template of ``slimvlm/runs/report/templates``, with every value escaped.

    Text of models, files and data is untrusted; the pages' content security policy lets them load
    nothing.
    """
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("slimvlm.runs.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["points"] = signed
    return environment
