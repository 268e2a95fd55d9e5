"""What training switches on in a model, and off again when it is done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer

from slimvlm.geometry import text_config_of


def computes_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 matrices natively."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


@contextmanager
def kept_use_cache(model: PreTrainedModel) -> Iterator[None]:
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
def fast_attention(
    model: PreTrainedModel, teacher: PreTrainedModel | None, bf16: bool
) -> Iterator[None]:
    """Plain attention on a CPU in bfloat16, where it took two thirds of SDPA's time."""
    if model.device.type != "cpu" or not bf16:
        yield
        return
    models = [m for m in (model, teacher) if m is not None]
    before = [m.config._attn_implementation for m in models]
    try:
        for m in models:
            m.set_attn_implementation("eager")
        yield
    finally:
        for m, implementation in zip(models, before, strict=True):
            m.set_attn_implementation(implementation)


def without_autocast(trainer: Trainer) -> Any:
    """The trained model with its own forward again, which Accelerate had wrapped in autocast."""
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    vars(model).pop("forward", None)
    return model
