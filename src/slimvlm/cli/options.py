"""Options that several verbs share, each explained once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from slimvlm.cli.printing import note
from slimvlm.core.options import CalibrationConfig, DataConfig, LoadConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from slimvlm.data.samples import Sample

INLINE = tyro.conf.arg(name="")
"""For a dataclass among a verb's parameters: its fields are options like all others."""
Model = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]


@dataclass(frozen=True, kw_only=True)
class TrainingData(DataConfig):
    """What is learnt from, and how models are read."""

    data: str = field()  # the base class has a default, which must go
    """Conversations: demo, LLaVA-format .json, or .jsonl/.parquet/datasets folder with messages."""
    samples: int | None = None
    """Read only the first so many samples."""


def read_samples(source: TrainingData | CalibrationConfig, model: str) -> list[Sample]:
    """The conversations that options name, if they do; says which rows were skipped.

    Args:
        source: The options.
        model: What is to read them: rows that its processor refuses are broken.
    """
    from slimvlm.runs.stages import samples_for

    return samples_for(model, source, source.samples, note)


def check_model(model: str, options: LoadConfig) -> None:
    """Refuse a model that slimvlm does not know, before any weight is read."""
    from slimvlm.models.load import load_config

    load_config(model, options.trust_remote_code)


def check_compat(model: str, options: LoadConfig) -> None:
    """Refuse a model that no older transformers is known to read; says which versions do."""
    from slimvlm.models.load import load_config
    from slimvlm.pruning.compat import require_known

    versions = require_known(load_config(model, options.trust_remote_code))
    note(f"compat: also for transformers {' and '.join(versions)}")


def load_model(
    model: str, options: LoadConfig, device: str | None = None, shard: bool = False
) -> tuple[PreTrainedModel, Any]:
    """A model and its processor, read as the options say."""
    from slimvlm.models.load import load

    return load(model, options.dtype, device, options.trust_remote_code, shard)
