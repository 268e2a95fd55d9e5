"""One self-contained HTML file about a run or a study; it opens offline and on a phone."""

from __future__ import annotations

import json
from importlib.metadata import version

from slimvlm.core.progress import progress
from slimvlm.runs.report.gallery import MAX_BYTES, gallery_of, render
from slimvlm.runs.report.read import Record, read_record

__all__ = ["read_record", "report_html"]

_WHOLE = 4_900_000
"""Bytes of the whole file at most."""


def report_html(record: Record) -> str:
    """Write the page: figures, charts, tables, answers with their pictures, configuration.

    Everything that models and files say is escaped, and the page's content security policy lets it
    load nothing. Pictures are left out once the file would exceed 4.9 MB.
    """
    from slimvlm.runs.report import charts  # matplotlib: only where something is drawn

    overview = []
    for model in dict.fromkeys(entry.model for entry in record.entries):
        ours = [entry for entry in record.entries if entry.model == model]
        overview += [*charts.by_ratio(ours), *charts.trade_offs(ours)]
    values = {
        "record": record,
        "version": version("slimvlm"),
        "legend_items": charts.legend(record.entries),
        "config": json.dumps(record.config, indent=2),
        "charts": overview,
        "prunings": [
            (pruning.title, [charts.allocation(pruning.plan), *charts.score_maps(pruning)])
            for pruning in progress(record.prunings, "drawing plans")
        ],
        "trainings": [
            (training, charts.loss_curves(training))
            for training in progress(record.trainings, "drawing losses")
            if training.steps
        ],
    }
    bare = render("report.html.jinja", gallery=None, **values)
    if record.comparison is None:
        return bare
    room = min(MAX_BYTES, _WHOLE - len(bare.encode()))
    return render("report.html.jinja", gallery=gallery_of(record.comparison, room), **values)
