"""A run's configuration as the ``slimvlm compress`` command that asks for it, and as YAML."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

import yaml

from slimvlm.core.documents import built, read_yaml
from slimvlm.core.errors import ConfigError
from slimvlm.core.options import TASK_BATCH_SIZE, CompressConfig, RecoverConfig, file_only

NOT_TRAINED = "none"
RECIPE = ("axis", "train", "loss")
"""Options that a recipe chooses when they are not given."""
FILE_OPTIONS = file_only(CompressConfig) | file_only(RecoverConfig)
"""Options without a flag on the command line."""


def compress_command(model: str, config: CompressConfig, out: str | Path) -> str:
    """Write the ``slimvlm compress`` command for a run; options at their defaults are left out.

    Those that a recipe chooses always stand there: a later recipe must not change what the command
    does. It reads the run's own ``run.yaml`` where an option has no flag.
    """
    if {*_unusual(config), *_unusual(config.recover or RecoverConfig())} & FILE_OPTIONS:
        return shlex.join(["slimvlm", "compress", "--config", f"{out}/run.yaml", "--out", str(out)])
    words = ["slimvlm", "compress", model, *_given(config, {"batch_size": TASK_BATCH_SIZE})]
    if config.recover is not None:
        words += _given(config.recover, {"seed": None})
    elif config.data is not None:
        words += ["--train", NOT_TRAINED]
    return shlex.join([*words, "--out", str(out)])


def config_text(model: str, config: CompressConfig) -> str:
    """Write a run's configuration as YAML: the model, and every option that is not the default."""
    trained = NOT_TRAINED if config.recover is None else _unusual(config.recover)
    values = {"model": model, **_unusual(config), "recover": trained}
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return text


def read_config(path: str | Path) -> tuple[str, CompressConfig, Mapping[str, Any] | None]:
    """Read model and configuration from a YAML file or from the ``config.json`` of a run.

    The third value holds the training options that the file gives, None for no training; the chart
    chooses the others.
    """
    where, values = f"config {str(path)!r}", read_yaml(path, "config")
    if not isinstance(values, dict) or not isinstance(values.get("model"), str):
        raise ConfigError(f"{where}: must name a model, and options")
    options = {name: v for name, v in values.items() if name not in ("model", "made_from")}
    if options.get("recover") == NOT_TRAINED:
        options["recover"] = None
    given = options.get("recover", {})
    return values["model"], built(CompressConfig, options, where), given


def _unusual(config: Any) -> dict[str, Any]:
    """Collect the options that differ from their defaults or that a recipe chooses."""
    found = {}
    for row in fields(config):
        value = getattr(config, row.name)
        if value is None or isinstance(value, RecoverConfig):
            continue
        if value != _default(row) or row.name in RECIPE:
            found[row.name] = list(value) if isinstance(value, tuple) else value
    return found


def _given(config: Any, names: Mapping[str, str | None]) -> Iterator[str]:
    """Yield the options of a command; ``names`` renames some, or leaves them out by None."""
    for row in fields(config):
        name, value = names.get(row.name, row.name), getattr(config, row.name)
        usual = value is None or (value == _default(row) and row.name not in RECIPE)
        if usual or name is None or isinstance(value, RecoverConfig):
            continue
        yield f"--{name.replace('_', '-')}"
        if value is not True or row.default is not False:
            yield from map(str, value if isinstance(value, tuple) else (value,))


def _default(row: Field[Any]) -> Any:
    return row.default if row.default_factory is MISSING else row.default_factory()
