"""Select the trainable weights (projector, LoRA, all but the tower) and their data types."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from slimvlm.core.errors import ConfigError, one_line
from slimvlm.core.files import write_text
from slimvlm.core.options import HIDDEN_LOSSES, RecoverConfig
from slimvlm.models.hidden import hold_in_, is_sharded, merge_lora
from slimvlm.models.parts import Parts, parameters_below, part_at, text_config_of

LORA: dict[str, Any] = {"lora_alpha": 128, "lora_dropout": 0.05}
"""Defaults that `RecoverConfig.lora` overrides; target modules: all matrices of the backbone."""


def prepare_training(model: PreTrainedModel, config: RecoverConfig) -> Any:
    """Freeze all but the trainable weights, hold those in float32, and add LoRA by PEFT."""
    family = Parts(model).family
    model.requires_grad_(False)
    if config.train == "projector" and not family.projector:
        raise ConfigError(f"train 'projector': {model.config.model_type!r} has no projector")
    trained: Any = model
    if config.train == "lora":
        import peft

        parts = Parts(model)
        names = "|".join(re.escape(p.path) for p in (*parts.row.attention, *parts.row.mlp))
        where = rf"{re.escape(family.backbone)}\.layers\.\d+\.({names})"
        options = {**LORA, "target_modules": where, **config.lora}
        has_experts = any(matrix.is_of_experts for _, matrix in parts.matrices())
        if has_experts and not config.lora.keys() & {"target_modules", "lora_dropout"}:
            options["lora_dropout"] = 0.0  # PEFT has no dropout before weights of experts
        try:
            with old_names_allowed():
                settings = peft.LoraConfig(r=config.lora_rank, **options)
                trained = peft.get_peft_model(model, settings)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"lora {dict(config.lora)}: {one_line(error)}") from error
    if config.train == "full":
        head: Any = model.get_submodule(family.head)
        reads_logits = bool(config.loss_weights.keys() - set(HIDDEN_LOSSES))
        head.requires_grad_(reads_logits)
        model.get_submodule(family.backbone).requires_grad_(True)  # a tied head with it
        for path in family.towers:  # some lie inside the backbone
            model.get_submodule(path).requires_grad_(False)
    for path in family.projector:
        for parameter in parameters_below(model, path):
            parameter.requires_grad_(True)
    hold_in_(model, torch.float32, learning_only=True)
    return trained


@contextmanager
def old_names_allowed() -> Iterator[None]:
    """Allow the name of checkpointing that all supported versions of transformers know."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*gradient_checkpointing.*", FutureWarning)
        yield


@contextmanager
def training_precision(
    model: PreTrainedModel, teacher: PreTrainedModel | None, device: torch.device, autocast: bool
) -> Iterator[None]:
    """Convert models to the data types of training; the student's come back afterwards.

    Small steps vanish in half precision. So trainable weights are float32 (`prepare_training`), and
    so is everything else, unless autocast computes in bfloat16. Shards keep their data type, and so
    does the teacher. The student moves to the device.
    """
    models = [model, *([] if teacher is None else [teacher])]
    dtype = model.dtype
    if not is_sharded(model):
        model.to(device)  # type: ignore[arg-type]
    # the Trainer turns the cache off in the configuration; generation wants it back
    caches = [(c, vars(c).get("use_cache")) for c in (model.config, text_config_of(model.config))]
    # on a CPU in bfloat16, attention in separate steps took two thirds of SDPA's time
    is_eager = autocast and model.device.type == "cpu"
    attention = [(each, each.config._attn_implementation) for each in models if is_eager]
    try:
        for each, _ in attention:
            each.set_attn_implementation("eager")
        for each in [] if autocast else models:
            hold_in_(each, torch.float32)
        yield
    finally:
        for each, name in attention:
            each.set_attn_implementation(name)
        for config, value in caches:
            vars(config).pop("use_cache", None)
            if value is not None:
                config.use_cache = value
    if not autocast:
        hold_in_(model, dtype)


def without_autocast(trainer: Trainer) -> Any:
    """Return the trained model with its own forward, which Accelerate had wrapped in autocast."""
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    vars(model).pop("forward", None)
    return model


@contextmanager
def projector_in_every_graph(model: PreTrainedModel) -> Iterator[None]:
    """Add zero times the projector's weights, so that text-only batches give it a gradient.

    Else such a batch would have no gradient where only the projector learns, and DDP processes
    would wait for each other's.
    """
    paths = Parts(model).family.projector
    if is_sharded(model):  # sees pictures always, or never
        yield
        return

    def add_nothing(module: nn.Module, args: Any, embeddings: Tensor) -> Tensor:
        for path in paths:
            for parameter in parameters_below(model, path):
                embeddings = embeddings + (0.0 * parameter.sum()).to(embeddings.dtype)
        return embeddings

    handle = model.get_input_embeddings().register_forward_hook(add_nothing)
    try:
        yield
    finally:
        handle.remove()


def merge(trained: Any, dtype: torch.dtype) -> PreTrainedModel:
    """Return the plain model behind a trained one: LoRA merged, in ``dtype``, nothing frozen.

    A frozen ``lm_head`` would be several times slower: torch 2.13 copies its weight for each sample
    when it runs over a slice of hidden states.
    """
    plain: PreTrainedModel = merge_lora(trained) if _is_peft(trained) else trained
    hold_in_(plain, dtype, learning_only=True)
    return plain.requires_grad_(True)


def require_adapter_holds_all(model: PreTrainedModel) -> None:
    """Refuse a projector with a parameter outside its modules, which no adapter can hold."""
    for path in Parts(model).family.projector:
        if isinstance(part_at(model, path), nn.Parameter):
            raise ConfigError(f"keep_adapter: an adapter cannot hold the parameter {path!r}")


def save_adapter(trained: Any, folder: str | Path, dtype: torch.dtype) -> None:
    """Write the trainable weights as a PEFT adapter: on the pruned model it gives the merged one.

    The projector, which learns without LoRA, is stored whole, as PEFT's ``modules_to_save``, in
    ``dtype``.
    """
    from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

    folder = Path(folder)
    trained.save_pretrained(folder)
    model = plain_model(trained)
    weights, whole = load_file(folder / SAFETENSORS_WEIGHTS_NAME), []
    for path in Parts(model).family.projector:
        part = part_at(model, path)
        if not isinstance(part, nn.Module):
            continue
        is_list = isinstance(part, nn.ModuleList)
        whole += [f"{path}.{name}" for name, _ in part.named_children()] if is_list else [path]
        for name, value in part.state_dict().items():
            weights[f"base_model.model.{path}.{name}"] = value.to(dtype).contiguous()
    save_file(weights, folder / SAFETENSORS_WEIGHTS_NAME)
    config = json.loads((folder / CONFIG_NAME).read_text())
    config["modules_to_save"] = whole or None
    write_text(folder / CONFIG_NAME, json.dumps(config, indent=2))


def plain_model(trained: Any) -> PreTrainedModel:
    """Return the transformers model inside a trained one, LoRA still beside its weights."""
    model: PreTrainedModel = trained.get_base_model() if _is_peft(trained) else trained
    return model


def _is_peft(model: Any) -> bool:
    import peft

    return isinstance(model, peft.PeftModel)
