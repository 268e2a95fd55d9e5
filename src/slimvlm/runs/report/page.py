"""HTML pages from the templates of this package: one file each, offline, everything escaped."""

from __future__ import annotations

from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from slimvlm.evaluation.metrics import signed


def render(template: str, **values: Any) -> str:
    """Fill a template of ``slimvlm/runs/report/templates``.

    What models, files and data say is untrusted: every value is escaped, and pages carry a content
    security policy that lets them load nothing.

    Args:
        template: File name, such as ``comparison.html.jinja``.
        values: What the template names.
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
