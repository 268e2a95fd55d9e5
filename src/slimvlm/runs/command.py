"""A run's configuration → the ``slimvlm compress`` command that asks for it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from slimvlm.core.options import TASK_BATCH_SIZE, CompressConfig, RecoverConfig

RECIPE = ("axis", "train", "loss")
"""Options that a recipe chooses when they are not given."""


def compress_command(model: str, config: CompressConfig, out: str | Path) -> str:
    """The ``slimvlm compress`` command for a run.

    Options with their default values are left out, but for those that the recipe of the ratio
    chooses: a later recipe must not change what the command does.

    Args:
        model: Folder, hub id or ``demo``.
        config: The run's configuration.
        out: Its folder.
    """
    words = ["slimvlm", "compress", model, *_given(config, {"batch_size": TASK_BATCH_SIZE})]
    if config.recover is not None:
        words += _given(config.recover, {"seed": None})
    elif config.data is not None:
        words += ["--train", "none"]
    return shlex.join([*words, "--out", str(out)])


def _given(config: Any, names: Mapping[str, str | None]) -> Iterator[str]:
    """The options of a command; some have another name there, or none."""
    for row in fields(config):
        name, value = names.get(row.name, row.name), getattr(config, row.name)
        usual = value is None or (value == row.default and row.name not in RECIPE)
        if usual or name is None or isinstance(value, RecoverConfig):
            continue
        yield f"--{name.replace('_', '-')}"
        if value is not True or row.default is not False:
            yield from map(str, value if isinstance(value, tuple) else (value,))
