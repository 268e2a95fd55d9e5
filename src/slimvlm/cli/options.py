"""How groups of options stand on the command line, and the few that are the command line's own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from slimvlm.core.options import (
    TASK_BATCH_SIZE,
    QuestionOptions,
    RunOptions,
    TargetOptions,
    TrainingConfig,
)

INLINE = tyro.conf.arg(name="")
"""For a dataclass among a verb's parameters: its fields are options like all others."""
Model = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]


@dataclass(frozen=True, kw_only=True)
class QuestionFlags(QuestionOptions):
    """What models are asked, and how."""

    tasks: str | None = None
    """Comma-separated names: built-in tasks (demo for all, the default without --data), YAML files
    of your own, or the study's benchmarks mme, pope, gqa, scienceqa_img, mmmu_val, ai2d, mathvista,
    docvqa (needs slimvlm[eval])."""
    blind: bool = False
    """Show the pictures of other questions: the floor of a model that cannot see."""
    log: Path | None = None
    """Folder that keeps replies as they come; a stopped evaluation goes on there."""


def _numbers(words: list[str]) -> tuple[float, ...]:
    return tuple(float(number) for word in words for number in word.split(","))


TYPES = tyro.constructors.ConstructorRegistry()
"""How types of options are read where tyro does it in another way."""


@TYPES.primitive_rule
def numbers(
    info: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec[tuple[float, ...]] | None:
    """Any number of numbers, with commas or spaces between them."""
    if info.type != tuple[float, ...]:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="FLOAT,...",
        instance_from_str=_numbers,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [str(number) for number in value],
    )


@dataclass(frozen=True, kw_only=True)
class RunFlags(RunOptions):
    """The options of a run, by names that those of training leave free."""

    batch_size: Annotated[int, tyro.conf.arg(name=TASK_BATCH_SIZE)] = 16
    """Questions answered at once."""


@dataclass(frozen=True, kw_only=True)
class TrainingFlags(TrainingConfig):
    """How to train; the study's decision chart fills in what is not said."""

    train: Literal["projector", "lora", "full", "none"] | None = None
    """What learns; none skips training."""
    loss: str | None = None
    """Weighted sum of sft, hidden, cosine, kl, rkl, jsd."""
    seed: tyro.conf.Suppress[tyro.conf.Fixed[int]] = 0  # a run has one, among those of pruning


@dataclass(frozen=True, kw_only=True)
class TargetFlags(TargetOptions):
    """How small or fast the model must become."""

    target_latency: float | None = None
    """Instead: time to read a question, as a share of the original's."""
