"""Options that several verbs share, each explained once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from slimvlm.config import CalibrationConfig, LoadConfig
from slimvlm.errors import ConfigError
from slimvlm.verbs.printing import note

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from slimvlm.samples import Sample

INLINE = tyro.conf.arg(name="")
"""For a dataclass among a verb's parameters: its fields are options like all others."""
Model = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]


@dataclass(frozen=True, kw_only=True)
class TrainingData(LoadConfig):
    """What is learnt from, and how models are read."""

    data: str
    """Conversations: demo, LLaVA-format .json, or .jsonl/.parquet/datasets folder with messages."""
    images: str | None = None
    """Folder that image paths in the data start from."""
    samples: int | None = None
    """Read only the first so many samples."""
    max_bad: int = 0
    """Broken data rows to skip at most."""


def read_samples(source: TrainingData | CalibrationConfig) -> list[Sample]:
    """The conversations that options name; says which rows were skipped.

    Raises:
        ConfigError: If they name none.
    """
    from slimvlm.data import load_samples

    if source.data is None:
        raise ConfigError("data: say which conversations to read")
    return load_samples(source.data, source.images, source.samples, source.max_bad, note)


def check_model(model: str, options: LoadConfig) -> None:
    """Refuse a model that slimvlm does not know, before any weight is read."""
    from slimvlm.checkpoint import load_config

    load_config(model, options.trust_remote_code)


def check_compat(model: str, options: LoadConfig) -> None:
    """Refuse a model that no older transformers is known to read; says which versions do."""
    from slimvlm.checkpoint import load_config
    from slimvlm.compat import require_known

    versions = require_known(load_config(model, options.trust_remote_code))
    note(f"compat: also for transformers {' and '.join(versions)}")


def load_model(
    model: str, options: LoadConfig, device: str | None = None, shard: bool = False
) -> tuple[PreTrainedModel, Any]:
    """A model and its processor, read as the options say."""
    from slimvlm.checkpoint import load

    return load(model, options.dtype, device, options.trust_remote_code, shard)
