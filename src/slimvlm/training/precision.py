"""The data types of a training, and everything else that it changes in a model and puts back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer

from slimvlm.models.hidden import placement_of
from slimvlm.models.load import computes_bfloat16
from slimvlm.models.parts import text_config_of


@dataclass(frozen=True)
class Precision:
    """In which data types a model computes and learns.

    Small steps vanish in half precision. So what learns is held in float32, and so is everything
    else, unless autocast computes in bfloat16 and the rest can stay as it was read. Shards keep
    their data type.

    Attributes:
        autocast: Whether products are computed in bfloat16.
        dtype: Data type of the model before and after.
    """

    autocast: bool
    dtype: torch.dtype

    @classmethod
    def of(cls, model: PreTrainedModel, bf16: bool | None) -> Precision:
        """As asked for; by default with autocast where the model's device is fast at it."""
        return cls(computes_bfloat16(model.device) if bf16 is None else bf16, model.dtype)

    @contextmanager
    def held(
        self, model: PreTrainedModel, teacher: PreTrainedModel | None, device: torch.device
    ) -> Iterator[None]:
        """Inside, models are held and compute as training needs it; the student's types come back.

        Args:
            model: The student; it moves to the device.
            teacher: The teacher, if it is in memory. It stays as it is held.
            device: Where training runs.
        """
        models = [model, *([] if teacher is None else [teacher])]
        placement_of(model).move_(device)
        with ExitStack() as stack:
            stack.enter_context(_kept_use_cache(model))
            if self.autocast and model.device.type == "cpu":
                for each in models:
                    stack.enter_context(_plain_attention(each))
            for each in [] if self.autocast else models:
                placement_of(each).hold_in_(torch.float32)
            yield
        if not self.autocast:
            placement_of(model).hold_in_(self.dtype)

    def hold_learning_(self, model: PreTrainedModel) -> None:
        """Hold in float32 what learns; the rest of the model needs autocast or is in it already."""
        placement_of(model).hold_in_(torch.float32, learning_only=True)


def without_autocast(trainer: Trainer) -> Any:
    """The trained model with its own forward again, which Accelerate had wrapped in autocast."""
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    vars(model).pop("forward", None)
    return model


@contextmanager
def _kept_use_cache(model: PreTrainedModel) -> Iterator[None]:
    """The Trainer turns the cache off in the configuration; generation wants it back."""
    configs = (model.config, text_config_of(model.config))
    before = [vars(config).get("use_cache") for config in configs]
    try:
        yield
    finally:
        for config, value in zip(configs, before, strict=True):
            vars(config).pop("use_cache", None)
            if value is not None:
                config.use_cache = value


@contextmanager
def _plain_attention(model: PreTrainedModel) -> Iterator[None]:
    """Attention in separate steps, which on a CPU in bfloat16 took two thirds of SDPA's time."""
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation("eager")
        yield
    finally:
        model.set_attn_implementation(before)
