"""Choose what learns: the projector, LoRA on the backbone, or everything but the tower."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from slimvlm.config import RecoverConfig
from slimvlm.errors import ConfigError
from slimvlm.geometry import backbone_of, family_of


def prepare_training(model: PreTrainedModel, config: RecoverConfig) -> Any:
    """Freeze a model but for what learns.

    Args:
        model: Its flags are set in place.
        config: ``train`` says what learns, ``lora_*`` how.

    Returns:
        The model to train: the same object, or PEFT's wrapper around it.

    Raises:
        ConfigError: If ``projector`` is asked of a model that has none.
    """
    family = family_of(model.config.model_type)
    model.requires_grad_(False)
    if config.train == "projector" and not family.projector:
        raise ConfigError(f"train 'projector': {model.config.model_type!r} has no projector")
    trained = model
    if config.train == "lora":
        trained = _with_lora(model, config)
    if config.train == "full":
        model.get_submodule(family.backbone).requires_grad_(True)
        model.get_submodule(family.head).requires_grad_(True)
    for path in family.projector:
        _require_grad(model, path)
    return trained


def keep_learning_in_float32_(trained: Any) -> None:
    """Hold what learns in float32, since small steps vanish in half precision.

    Needs autocast in training, because the rest of the model stays as it is.
    """
    for parameter in trained.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def merge(trained: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The plain model behind a trained one: LoRA added into its weights, nothing frozen.

    Flags matter for speed: torch 2.13 runs ``lm_head`` over a slice of hidden states several times
    slower while its weight is frozen, since it then copies the weight for each sample.

    Args:
        trained: From `prepare_training`.
        dtype: Data type that the model had before; what learned in float32 goes back to it.
    """
    plain: PreTrainedModel = trained.merge_and_unload() if _is_peft(trained) else trained
    for parameter in plain.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return plain.requires_grad_(True)


def plain_model(trained: Any) -> PreTrainedModel:
    """The transformers model inside a trained one, LoRA still beside its weights."""
    model: PreTrainedModel = trained.get_base_model() if _is_peft(trained) else trained
    return model


def lora_targets(model: PreTrainedModel) -> str:
    """A regular expression that matches the backbone's matrices and nothing else."""
    family, row = family_of(model.config.model_type), backbone_of(model.config)
    paths = "|".join(re.escape(p.path) for p in (*row.attention, *row.mlp))
    return rf"{re.escape(family.backbone)}\.layers\.\d+\.({paths})"


def _with_lora(model: PreTrainedModel, config: RecoverConfig) -> Any:
    import peft

    lora = peft.LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=lora_targets(model),
    )
    return peft.get_peft_model(model, lora)


def _require_grad(model: nn.Module, path: str) -> None:
    parent, _, name = path.rpartition(".")
    part = getattr(model.get_submodule(parent), name, None)
    if isinstance(part, nn.Parameter | nn.Module):
        part.requires_grad_(True)


def _is_peft(model: Any) -> bool:
    import peft

    return isinstance(model, peft.PeftModel)
