"""Write self-contained HTML: the report of a run or a study, and two models answer by answer.

Each file opens offline and on a phone. Everything that models and files say is escaped, and a
page's content security policy lets it load nothing.
"""

import base64
import json
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from io import BytesIO
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from slimvlm.core.progress import progress
from slimvlm.data.samples import open_image
from slimvlm.evaluation.compare import CHANGES, RIGHT, Change, Comparison, Pair
from slimvlm.runs.report.record import Record, read_record

__all__ = ["comparison_html", "gallery_of", "read_record", "report_html"]

_MARKUP, MAX_BYTES = (
    300,
    4_900_000,
)  # around a picture; of a page, beyond which pictures are left out
MAX_CARDS: Mapping[Change, int] = {"both wrong": 40, "both right": 12}  # of a task; others: all
SMALL, SMALL_SHOWN, LARGE = 64, 128, 256
"""Pictures up to the first size are enlarged to the second; those above the third are reduced."""


def report_html(record: Record) -> str:
    """Write the page; pictures are left out once the file would exceed 4.9 MB."""
    from slimvlm.runs.report import charts  # matplotlib: only where something is drawn

    overview = []
    for _, ours in record.entries.groupby("model", sort=False):
        overview += [*charts.by_ratio(ours), *charts.trade_offs(ours)]
    values = {
        "record": record,
        "version": version("slimvlm"),
        "config": json.dumps(record.config, indent=2),
        "charts": overview,
        "prunings": [
            (title, [*charts.allocation(plan), *charts.score_maps(plan, scores)])
            for title, plan, scores in progress(record.prunings, "drawing plans")
        ],
        "trainings": [
            (title, about, charts.loss_curves(steps))
            for title, about, steps in progress(record.trainings, "drawing losses")
            if steps
        ],
    }
    return _render("report.html.jinja", record.comparison, **values)


def comparison_html(comparison: Comparison, title: str) -> str:
    """Write one HTML file with a table and every lost or gained answer, with pictures."""
    return _render("comparison.html.jinja", comparison, title=title)


def _render(template: str, comparison: Comparison | None, **values: Any) -> str:
    """Fill in a template, twice where answers are shown: first without their pictures."""
    environment = Environment(
        loader=PackageLoader("slimvlm.runs.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["points"] = "{:+z.1f}".format
    page = environment.get_template(template)
    bare = page.render(gallery=comparison and gallery_of(comparison, 0), **values)
    if comparison is None:
        return bare
    return page.render(gallery=gallery_of(comparison, MAX_BYTES - len(bare.encode())), **values)


def gallery_of(comparison: Comparison, room: int) -> dict[str, Any]:
    """Lay out a comparison as cards: the values of ``gallery.html.jinja``."""
    # Unchanged answers whose replies differ most come first. Pictures are shown until they fill so
    # many bytes: those of lost answers first, and tasks take turns.
    queue: list[tuple[int, int, str, Pair]] = []
    hidden = {name: Counter(task.counts) for name, task in comparison.tasks.items()}
    for name, task in comparison.tasks.items():
        for rank, kind in enumerate(CHANGES):
            pairs = [pair for pair in task.pairs if pair.kind == kind]
            if kind in MAX_CARDS:
                pairs.sort(key=lambda p: (-abs(p.score_a - p.score_b), p.reply_a == p.reply_b))
                pairs = pairs[: MAX_CARDS[kind]]
            queue += [(rank, place, name, pair) for place, pair in enumerate(pairs)]
            hidden[name][kind] -= len(pairs)
    queue.sort(key=lambda entry: entry[:2])
    cards: dict[str, list[dict[str, Any]]] = {name: [] for name in comparison.tasks}
    left_out = 0
    for *_, name, pair in queue:
        pictures: list[dict[str, Any]] = []
        for image in pair.question.images if room > 0 else ():  # as PNG data URIs
            shown = open_image(image)
            if max(shown.size) > SMALL_SHOWN:  # large ones are reduced, small ones shown larger
                shown.thumbnail((LARGE, LARGE))
                shown = shown.quantize(256)
            buffer = BytesIO()
            shown.save(buffer, "PNG", optimize=True)
            enlarged = max(shown.size) <= SMALL
            scale = SMALL_SHOWN / max(shown.size) if enlarged else 1
            width, height = (max(1, round(side * scale)) for side in shown.size)
            uri = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
            pictures.append({"uri": uri, "width": width, "height": height, "enlarged": enlarged})
        size = sum(len(each["uri"]) + _MARKUP for each in pictures)
        if size > room:
            pictures, room = [], 0
        room -= size
        left_out += bool(pair.question.images) and not pictures
        cards[name].append({"pair": pair, "pictures": pictures})
    rows = [*comparison.tasks.values(), comparison.total]
    ends = [end for row in rows for end in vars(row.difference).values() if end is not None]
    reach = max(1.0, *map(abs, ends))
    return {
        "comparison": comparison,
        "cards": cards,  # by task
        "hidden": {name: +counts for name, counts in hidden.items()},  # answers without a card
        "pictures_left_out": left_out,
        "graded": any({p.score_a, p.score_b} - {0, 1} for p in comparison.total.pairs),
        "place": lambda points: round(50 + 48 * points / reach, 1),  # on the axis of all tasks
        "kinds": CHANGES,
        "right": RIGHT,
    }
