"""The options of every stage, each with its meaning and its allowed values in one place."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from slimvlm.errors import ConfigError

Train = Literal["projector", "lora", "full"]
LOSS_NAMES = ("sft", "hidden", "kl", "rkl")
_POSITIVE = (
    "epochs",
    "learning_rate",
    "batch_size",
    "gradient_accumulation",
    "lora_rank",
    "lora_alpha",
    "temperature",
    "save_steps",
    "logging_steps",
)


def parse_loss(expression: str) -> dict[str, float]:
    """Read a weighted sum of losses: ``sft+hidden`` or ``0.7*sft+0.3*hidden``.

    Terms without a weight share what is left of 1 equally, so ``sft+hidden`` is the study's
    0.5/0.5.

    Raises:
        ConfigError: If a name is unknown or repeated, or a weight is not positive.
    """
    weights: dict[str, float | None] = {}
    for term in expression.replace(" ", "").split("+"):
        match = re.fullmatch(r"(?:(\d+\.?\d*(?:e-?\d+)?)\*)?([a-z]+)", term)
        name = match[2] if match else term
        if match is None or name not in LOSS_NAMES or name in weights:
            raise ConfigError(
                f"loss {expression!r}: term {term!r} must be one of {', '.join(LOSS_NAMES)}, once, "
                "with an optional weight such as 0.5*sft"
            )
        weights[name] = float(match[1]) if match[1] else None
    free = [name for name, weight in weights.items() if weight is None]
    rest = 1.0 - sum(weight for weight in weights.values() if weight is not None)
    if any(weight == 0 for weight in weights.values()) or (free and rest <= 0):
        raise ConfigError(f"loss {expression!r}: every term needs a weight above 0")
    return {n: rest / len(free) if w is None else w for n, w in weights.items()}


@dataclass(frozen=True, kw_only=True)
class RecoverConfig:
    """How to train after pruning.

    Raises:
        ConfigError: If a value is out of range; the message names the field.
    """

    train: Train = "lora"
    """What learns: the projector, LoRA on the backbone plus the projector, or all but the tower."""
    loss: str = "sft+hidden"
    """Weighted sum of sft, hidden (L2 on final hidden states), kl and rkl."""
    fraction: float = 1.0
    """Share of the data to use: a seeded subset, recorded with the run."""
    epochs: float = 1.0
    """Passes over that share."""
    max_steps: int = -1
    """Stop after so many optimizer steps; -1 for no limit."""
    learning_rate: float = 2e-4
    """Peak learning rate of AdamW; cosine decay to zero."""
    warmup_ratio: float = 0.03
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = 0.0
    """AdamW weight decay."""
    batch_size: int = 8
    """Samples in a step on each device."""
    gradient_accumulation: int = 1
    """Steps whose gradients are added before the optimizer moves."""
    lora_rank: int = 64
    """Rank of the LoRA matrices."""
    lora_alpha: int = 128
    """LoRA scale is alpha / rank."""
    lora_dropout: float = 0.05
    """Dropout before the LoRA matrices."""
    temperature: float = 2.0
    """Temperature of kl and rkl."""
    kd_on: Literal["answer", "text", "all"] = "answer"
    """Positions that distillation compares: answers, all text, or images too; never padding."""
    paper_exact: bool = False
    """Reduce kl, rkl and hidden as the study's trainer does: over every position."""
    bf16: bool | None = None
    """bfloat16 autocast; by default where the device computes it natively."""
    gradient_checkpointing: bool = False
    """Trade time for activation memory."""
    save_steps: int = 200
    """Steps between resumable checkpoints."""
    logging_steps: int = 10
    """Steps between log lines."""
    report_to: str = "none"
    """Trackers of the Trainer: wandb, tensorboard, trackio, none."""
    seed: int = 0
    """Seed of the data order, the subset and LoRA's initial values."""

    def __post_init__(self) -> None:
        parse_loss(self.loss)
        if self.train not in ("projector", "lora", "full"):
            raise ConfigError(f"train {self.train!r} must be one of: projector, lora, full")
        if not 0 < self.fraction <= 1:
            raise ConfigError(f"fraction {self.fraction} must be above 0 and at most 1")
        if self.kd_on not in ("answer", "text", "all"):
            raise ConfigError(f"kd_on {self.kd_on!r} must be one of: answer, text, all")
        if self.max_steps < 1 and self.max_steps != -1:
            raise ConfigError(f"max_steps {self.max_steps} must be above 0, or -1 for no limit")
        for name in _POSITIVE:
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} {getattr(self, name)} must be above 0")
        for name in ("warmup_ratio", "lora_dropout", "weight_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} {getattr(self, name)} must be at least 0 and below 1")

    @property
    def loss_weights(self) -> dict[str, float]:
        """The loss as weights by name."""
        return parse_loss(self.loss)
