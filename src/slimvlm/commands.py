"""A configuration as the command line that gives it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from slimvlm.config import CompressConfig, RecoverConfig


def compress_command(model: str, config: CompressConfig, out: str | Path) -> str:
    """The ``slimvlm compress`` command for a run.

    Options with their default values are left out, but for those that the recipe of the ratio
    chooses: a later recipe must not change what the command does.

    Args:
        model: Folder, hub id or ``demo``.
        config: The run's configuration.
        out: Its folder.
    """
    words = ["slimvlm", "compress", model, *_options(config, RECIPE)]
    if config.recover is not None:
        words += _options(config.recover, RECIPE)
    elif config.data is not None:
        words += ["--train", "none"]
    return shlex.join([*words, "--out", str(out)])


RECIPE = ("axis", "train", "loss")
"""Options that a recipe chooses when they are not given."""


def _options(config: Any, always: tuple[str, ...]) -> Iterator[str]:
    for field in fields(config):
        value = getattr(config, field.name)
        if value is None or isinstance(value, RecoverConfig):
            continue
        if value == field.default and field.name not in always:
            continue
        yield f"--{field.name.replace('_', '-')}"
        if value is True and field.default is False:
            continue
        values = value if isinstance(value, tuple) else (value,)
        yield from map(str, values)
