"""What depends on the insides of transformers, with the versions that each was tried with.

Everything else uses what transformers documents. One more trick stands in ``modeling_pruned.py``,
which is copied into checkpoints and must stand alone: its classes are made when their name is asked
for (``__getattr__``; tried with 5.24).
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.utils.hub import cached_file

from slimvlm.core.errors import UnsupportedModelError
from slimvlm.models.hidden import require_finite_values
from slimvlm.models.parts import family_of


def retype_modules_(model: PreTrainedModel, old: PreTrainedConfig, new: PreTrainedConfig) -> None:
    """Give the language model's modules the classes of another type that computes the same.

    Relies on: a type's classes lie in ``models.<type>.modeling_<type>``, are called after its
    configuration (``LlamaConfig``, ``LlamaMLP``), and have the same attributes in both types. Tried
    with transformers 5.24.

    Args:
        model: The model.
        old: The text configuration that its modules were built from.
        new: Of the type that they shall have.
    """
    source, target = (
        importlib.import_module(f".models.{kind}.modeling_{kind}", "transformers")
        for kind in (old.model_type, new.model_type)
    )
    old_prefix, new_prefix = (type(each).__name__.removesuffix("Config") for each in (old, new))
    family = family_of(model.config.model_type)
    root = model if family.text_config is None else model.get_submodule(family.backbone)
    for module in root.modules():
        name = type(module).__name__
        if getattr(source, name, None) is type(module) and name.startswith(old_prefix):
            module.__class__ = getattr(target, new_prefix + name.removeprefix(old_prefix))


def names_in_files(model: Any, keys: Iterable[str]) -> dict[str, str]:
    """The name in a checkpoint's files of every parameter, by its name in the model.

    Relies on: `get_model_conversion_mapping` lists what ``from_pretrained`` renames, and
    ``save_pretrained`` undoes the renamings in ``_weight_conversions``, which are set here. Tried
    with transformers 5.24.

    Args:
        model: A model without weights.
        keys: The names in the files.

    Raises:
        UnsupportedModelError: If weights are not only renamed but computed from others.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    if len(renamings) != len(conversions):
        kind = model.config.model_type
        raise UnsupportedModelError(f"model_type {kind!r} cannot be read with low memory")
    state, prefix = model.state_dict(), model.base_model_prefix
    named = {rename_source_key(key, renamings, [], prefix, state)[0]: key for key in keys}
    model._weight_conversions = [entry for entry in renamings if entry._was_used]
    for target, source in getattr(model, "all_tied_weights_keys", {}).items():
        if source in named:
            named.setdefault(target, named[source])
    return {target: source for target, source in named.items() if target in state}


def file_if_reachable(model: str, name: str) -> str | None:
    """The path of a file of a hub repository, from the cache or the hub; None if neither has it.

    Relies on: ``cached_file`` has switches for each error that it can raise. Tried with
    transformers 5.24.
    """
    errors = ("gated_repo", "missing_entries", "connection_errors")
    quiet: dict[str, Any] = {f"_raise_exceptions_for_{error}": False for error in errors}
    path: str | None = cached_file(model, name, **quiet)
    return path


def write_weights(
    model: Any, weights: Mapping[str, Tensor], folder: Path, shard_bytes: int
) -> None:
    """Write a model that has no storage; each tensor is asked for when its file is written.

    Relies on: ``save_pretrained`` takes a model with a device map and a hook of Accelerate for one
    whose weights lie on a disk, asks the hook for them, and holds one file in memory. Tried with
    transformers 5.24.

    Args:
        model: As `models.classes.empty_model` makes it, with its configuration.
        weights: Its parameters by name.
        folder: An existing folder.
        shard_bytes: Largest weight file.

    Raises:
        NumericalError: If a weight is NaN or infinite.
    """
    model.hf_device_map = {"": "disk"}
    model._hf_hook = SimpleNamespace(weights_map=_FiniteWeights(weights))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*offloaded modules.*")
        model.save_pretrained(folder, max_shard_size=shard_bytes)


class _FiniteWeights:
    """Weights by name; one that is no number is not given out."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = weights

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.weights[name]
        if tensor.is_floating_point():
            require_finite_values(tensor, f"weight {name!r} as {tensor.dtype}")
        return tensor
