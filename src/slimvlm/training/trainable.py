"""Choose what learns: the projector, LoRA on the backbone, or everything but the tower."""

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
from transformers import PreTrainedModel

from slimvlm.core.errors import ConfigError
from slimvlm.core.files import write_text
from slimvlm.core.options import RecoverConfig
from slimvlm.models.hidden import is_sharded, placement_of
from slimvlm.models.parts import backbone_of, family_of, matrices, parameters_below, part_at


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
        head: Any = model.get_submodule(family.head)
        head.requires_grad_(config.reads_logits)
        model.get_submodule(family.backbone).requires_grad_(True)  # a tied head with it
        for path in family.towers:  # some lie inside the backbone
            model.get_submodule(path).requires_grad_(False)
    for path in family.projector:
        for parameter in parameters_below(model, path):
            parameter.requires_grad_(True)
    return trained


@contextmanager
def projector_in_every_graph(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the loss of a batch without pictures depends on the projector, too: by nothing.

    Else such a batch would have no gradient at all where only the projector learns, and processes
    that train together would wait for each other's.

    Args:
        model: From `plain_model`, after `prepare_training`.
    """
    paths = family_of(model.config.model_type).projector
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
    """The plain model behind a trained one: LoRA added into its weights, nothing frozen.

    Flags matter for speed: torch 2.13 runs ``lm_head`` over a slice of hidden states several times
    slower while its weight is frozen, since it then copies the weight for each sample.

    Args:
        trained: From `prepare_training`.
        dtype: Data type that the model had before; what learned in float32 goes back to it.
    """
    placement = placement_of(plain_model(trained))
    plain: PreTrainedModel = placement.merge_lora(trained) if _is_peft(trained) else trained
    placement.hold_in_(dtype, learning_only=True)
    return plain.requires_grad_(True)


def require_adapter_holds_all(model: PreTrainedModel) -> None:
    """Check that an adapter can hold all that learns: LoRA matrices and modules.

    Raises:
        ConfigError: If the projector has a parameter outside any module of its own.
    """
    for path in family_of(model.config.model_type).projector:
        if isinstance(part_at(model, path), nn.Parameter):
            raise ConfigError(f"keep_adapter: an adapter cannot hold the parameter {path!r}")


def save_adapter(trained: Any, folder: str | Path, dtype: torch.dtype) -> None:
    """Write what learned as a PEFT adapter: on the pruned model it gives the merged one.

    The projector, which learns without LoRA, is stored whole, as PEFT's ``modules_to_save``.

    Args:
        trained: From `prepare_training` with ``train="lora"``, not yet merged.
        folder: The new adapter folder.
        dtype: Data type that the projector will have in the merged model.
    """
    from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

    folder = Path(folder)
    trained.save_pretrained(folder)
    model = plain_model(trained)
    weights, whole = load_file(folder / SAFETENSORS_WEIGHTS_NAME), []
    for path in family_of(model.config.model_type).projector:
        part = part_at(model, path)
        if not isinstance(part, nn.Module):
            continue
        whole += [f"{path}.{n}" for n, _ in part.named_children()] * isinstance(part, nn.ModuleList)
        whole += [path] * (not isinstance(part, nn.ModuleList))
        for name, value in part.state_dict().items():
            weights[f"base_model.model.{path}.{name}"] = value.to(dtype).contiguous()
    save_file(weights, folder / SAFETENSORS_WEIGHTS_NAME)
    config = json.loads((folder / CONFIG_NAME).read_text())
    config["modules_to_save"] = whole or None
    write_text(folder / CONFIG_NAME, json.dumps(config, indent=2))


def plain_model(trained: Any) -> PreTrainedModel:
    """The transformers model inside a trained one, LoRA still beside its weights."""
    model: PreTrainedModel = trained.get_base_model() if _is_peft(trained) else trained
    return model


def lora_targets(model: PreTrainedModel, wanted: str = ".*") -> str:
    """A regular expression that matches matrices of the backbone and nothing else.

    Args:
        model: The model.
        wanted: A regular expression of a matrix's whole name in its layer; by default all.

    Raises:
        ConfigError: If it matches none of them.
    """
    family, row = family_of(model.config.model_type), backbone_of(model.config)
    names = [p.path for p in (*row.attention, *row.mlp)]
    chosen = [name for name in names if re.fullmatch(wanted, name)]
    if not chosen:
        raise ConfigError(f"lora_targets {wanted!r} matches none of: {', '.join(names)}")
    return rf"{re.escape(family.backbone)}\.layers\.\d+\.({'|'.join(map(re.escape, chosen))})"


def _with_lora(model: PreTrainedModel, config: RecoverConfig) -> Any:
    import peft

    lora = peft.LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=0.0 if _experts_learn(model, config) else config.lora_dropout,
        target_modules=lora_targets(model, config.lora_targets),
    )
    with by_old_names():
        return peft.get_peft_model(model, lora)


@contextmanager
def by_old_names() -> Iterator[None]:
    """Inside, checkpointing may have the name that all supported versions of transformers know."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*gradient_checkpointing.*", FutureWarning)
        yield


def _experts_learn(model: PreTrainedModel, config: RecoverConfig) -> bool:
    """Whether weights of experts get LoRA, before which PEFT has no dropout."""
    of_experts = [m.projection.path for _, m in matrices(model) if m.is_of_experts]
    return any(re.fullmatch(config.lora_targets, path) for path in of_experts)


def _is_peft(model: Any) -> bool:
    import peft

    return isinstance(model, peft.PeftModel)
