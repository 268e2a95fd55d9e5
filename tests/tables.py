"""Tables of cases in YAML files beside the tests that run them."""

from pathlib import Path
from typing import Any

import yaml


def tables(test: str) -> dict[str, Any]:
    """Read the tables of a test module, given its ``__file__``."""
    return yaml.safe_load(Path(test).with_suffix(".yaml").read_text(encoding="utf-8"))
