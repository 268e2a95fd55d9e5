"""What a run or a study found, for people."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from slimvlm.verbs.printing import note


def report(
    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")],
    out: Path | None = None,
    force: bool = False,
) -> None:
    """Write one HTML file about a run or a study: charts, tables, answers, configuration.

    It opens offline, on a phone, in dark mode, and prints.

    Args:
        folder: The folder of compress or study.
        out: The file; by default report.html in that folder, which is replaced.
        force: Replace an existing file.
    """
    from slimvlm.outputs import require_free, write_text
    from slimvlm.report import read_record, report_html

    target = out if out is not None else folder / "report.html"
    require_free(target, force or out is None)
    page = report_html(read_record(folder))
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, page)
    note(f"report: {target} ({len(page.encode()) / 1e6:.1f} MB)")
