"""One self-contained HTML file about a run or a study; it opens offline and on a phone."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

from slimvlm.core.errors import ConfigError
from slimvlm.runs.report.gallery import MAX_BYTES, gallery_of
from slimvlm.runs.report.page import render
from slimvlm.runs.report.record import Record
from slimvlm.runs.report.run import is_run, read_run
from slimvlm.runs.report.study import is_study, read_study_folder
from slimvlm.runs.study.table import TABLE

_ROOM = 4_900_000
"""Bytes of the whole file at most."""


def read_record(folder: str | Path) -> Record:
    """Read a run folder of `compress` or the folder of a study.

    Raises:
        ConfigError: If it is neither, or a file in it cannot be read.
    """
    path = Path(folder)
    if is_run(path):
        return read_run(path)
    if is_study(path):
        return read_study_folder(path)
    raise ConfigError(
        f"report {str(folder)!r}: neither a run folder (config.json and plan.json) nor a study "
        f"({TABLE} and study.json)"
    )


def report_html(record: Record) -> str:
    """The page: figures, charts, tables, answers with their pictures, configuration.

    Everything that models and files say is escaped, and the page's content security policy lets it
    load nothing. Pictures are left out once the file would exceed 4.9 MB.
    """
    from slimvlm.runs.report import charts  # matplotlib: only where something is drawn

    values = {
        "record": record,
        "version": version("slimvlm"),
        "legend_items": charts.legend(record.entries),
        "config": json.dumps(record.config, indent=2),
        "charts": charts.overview(record.entries),
        "prunings": [
            (pruning.title, [charts.allocation(pruning.plan), *charts.score_maps(pruning)])
            for pruning in record.prunings
        ],
        "trainings": [(t, charts.loss_curves(t)) for t in record.trainings if t.steps],
    }
    bare = render("report.html.jinja", gallery=None, **values)
    if record.comparison is None:
        return bare
    room = min(MAX_BYTES, _ROOM - len(bare.encode()))
    return render("report.html.jinja", gallery=gallery_of(record.comparison, room), **values)
