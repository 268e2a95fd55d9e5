"""What depends on the insides of transformers, with the versions that each was tried with.

Everything else uses what transformers documents. One more trick stands in ``modeling_pruned.py``,
which is copied into checkpoints and must stand alone: its classes are made when their name is asked
for (``__getattr__``; tried with 5.24).
"""

from __future__ import annotations

import copy
import importlib
import warnings
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
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


@dataclass(frozen=True)
class Origin:
    """What a parameter is made of.

    Attributes:
        keys: Names in a checkpoint's files.
        convert: Makes the parameter of these tensors; None where it is the only one.
    """

    keys: tuple[str, ...]
    convert: Callable[[Sequence[Tensor]], Tensor] | None = None

    def made_of(self, tensors: Sequence[Tensor]) -> Tensor:
        """The parameter, of what stands under its names in the files."""
        return tensors[0] if self.convert is None else self.convert(tensors)


def origins_in_files(model: Any, keys: Iterable[str]) -> dict[str, Origin]:
    """Where every parameter stands in a checkpoint's files, by its name in the model.

    Relies on: `get_model_conversion_mapping` lists what ``from_pretrained`` renames and computes
    (it stacks experts that lie in files one by one), and ``save_pretrained`` undoes what stands in
    ``_weight_conversions``, which is set here. Tried with transformers 5.24.

    Args:
        model: A model without weights.
        keys: The names in the files.

    Raises:
        UnsupportedModelError: If a tensor becomes several parameters.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    if any(len(each.target_patterns) > 1 for each in converters):
        kind = model.config.model_type
        raise UnsupportedModelError(f"model_type {kind!r} cannot be read with low memory")
    state, prefix = model.state_dict(), model.base_model_prefix
    named: dict[str, dict[str, str | None]] = defaultdict(dict)
    for key in sorted(keys, key=dot_natural_key):  # as they are stacked
        target, pattern = rename_source_key(key, renamings, converters, prefix, state)
        named[target][key] = pattern
    found = {
        target: _origin(model, target, patterns, converters)
        for target, patterns in named.items()
        if target in state
    }
    model._weight_conversions = [entry for entry in conversions if entry._was_used]
    for target, source in getattr(model, "all_tied_weights_keys", {}).items():
        if source in found:
            found.setdefault(target, found[source])
    return found


def _origin(
    model: Any,
    target: str,
    patterns: Mapping[str, str | None],
    converters: Sequence[WeightConverter],
) -> Origin:
    """Of a parameter, from the pattern of a converter that each of its names has in the files."""
    keys = tuple(patterns)
    used = [each for each in converters if patterns[keys[-1]] in each.source_patterns]
    if not used:
        return Origin(keys[-1:])

    def convert(tensors: Sequence[Tensor]) -> Tensor:
        converter = copy.deepcopy(used[0])
        for key, tensor in zip(keys, tensors, strict=True):
            given: Any = tensor  # it takes readers of tensors, too
            converter.add_tensor(target, key, str(patterns[key]), given)
        (made,) = converter.convert(target, model=model, config=model.config).values()
        return cast(Tensor, made[0] if isinstance(made, list) else made)

    return Origin(keys, convert)


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
        weights: Its parameters and buffers by name.
        folder: An existing folder.
        shard_bytes: Largest weight file.

    Raises:
        NumericalError: If a parameter is NaN or infinite.
    """
    model.hf_device_map = {"": "disk"}
    learned = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    model._hf_hook = SimpleNamespace(weights_map=_FiniteWeights(weights, learned))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*offloaded modules.*")
        model.save_pretrained(folder, max_shard_size=shard_bytes)


class _FiniteWeights:
    """Weights by name; a parameter that is no number is not given out. Buffers have bounds."""

    def __init__(self, weights: Mapping[str, Tensor], learned: Container[str]) -> None:
        self.weights, self.learned = weights, learned

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.weights[name]
        if name in self.learned and tensor.is_floating_point():
            require_finite_values(tensor, f"weight {name!r} as {tensor.dtype}")
        return tensor
