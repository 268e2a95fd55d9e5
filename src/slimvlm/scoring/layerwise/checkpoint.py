"""A checkpoint whose weights stay in its files and are read a layer at a time."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_module_tensor_to_device
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from slimvlm.core.errors import ConfigError
from slimvlm.models.files import Origin, origins_in_files, unreadable, weight_files
from slimvlm.models.load import empty_model, folder_of, load_config, require_full_precision
from slimvlm.models.parts import Parts

_DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class LazyCheckpoint:
    """A native model without weights, and its files, from which they are read when asked for."""

    folder: Path
    model: PreTrainedModel  # parameters have no storage, buffers that files lack are there
    origins: Mapping[str, Origin]  # of parameters and stored buffers, by their names in the model
    files: Mapping[str, Path]  # of tensors by their names there
    unused: tuple[str, ...]  # names in the files that the model has no use for

    def read(self, name: str) -> Tensor:
        """Read a parameter or stored buffer."""
        origin, dtype = self.origins[name], self.model.get_parameter_or_buffer(name).dtype
        tensors = []
        for key in origin.keys:
            with safe_open(self.files[key], framework="pt") as file:
                tensors.append(file.get_tensor(key).to(dtype))
        return origin.made_of(tensors)

    @property
    def identity(self) -> dict[str, Any]:
        """The configuration; path, size and time of each weight file."""
        files = sorted(self.folder.resolve().glob("*.safetensors"))
        return {
            "config": self.model.config.to_json_string(),
            "dtype": str(self.model.dtype),
            "weights": [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files],
        }

    @contextmanager
    def loaded(self, has: Callable[[str], bool], device: torch.device) -> Iterator[None]:
        """Give parameters of these names their values inside, mapped from the files on a CPU.

        On another device also buffers of these names, and those of no layer: any layer may read
        them.
        """
        put = partial(set_module_tensor_to_device, clear_cache=False)  # else it waits each time
        parameters = self.model.named_parameters(remove_duplicate=False)
        chosen = [name for name, _ in parameters if has(name)]
        moved = [
            name
            for name, buffer in self.model.named_buffers(remove_duplicate=False)
            if buffer.device.type != device.type
            and (has(name) or not name.startswith(self._layers))
        ]
        try:
            for name in moved:
                put(self.model, name, device)
            for name in chosen:
                put(self.model, name, device, self.read(name))
            yield
        finally:
            for name in chosen:
                put(self.model, name, "meta")
            for name in moved:
                put(self.model, name, "cpu")
            self.model.tie_weights()

    def layer(self, index: int, device: torch.device) -> AbstractContextManager[None]:
        """Inside, a decoder layer has its weights."""
        return self.loaded(lambda name: name.startswith(f"{self._layers}{index}."), device)

    def before_layers(self, device: torch.device) -> AbstractContextManager[None]:
        """Inside, towers, projector and embeddings (and the norm) have their weights."""
        others = (self._layers, f"{Parts(self.model).family.head}.")
        return self.loaded(lambda name: not name.startswith(others), device)

    def after_layers(self, device: torch.device) -> AbstractContextManager[None]:
        """Inside, the final norm and the head have their weights."""
        parts = Parts(self.model)
        norm = f"{parts.family.backbone}.{parts.row.final_norm}."
        return self.loaded(lambda name: name.startswith((norm, f"{parts.family.head}.")), device)

    @property
    def _layers(self) -> str:
        return f"{Parts(self.model).family.backbone}.layers."


def open_checkpoint(
    model: str | Path, dtype: str = "auto", trust_remote_code: bool = False
) -> LazyCheckpoint:
    """Find every weight of a folder or hub id (downloaded) without reading any.

    Refuses files that lack a parameter or hold it in another shape.
    """
    where, config = f"model {str(model)!r}:", load_config(model, trust_remote_code)
    require_full_precision(config, "scored or pruned with low memory")
    folder = folder_of(model)
    files = weight_files(folder)
    keys_of: dict[Path, list[str]] = defaultdict(list)
    for key, path in files.items():
        keys_of[path].append(key)
    shapes: dict[str, list[int]] = {}
    numbers = Counter[str]()  # by data type
    with unreadable(model, "weights"):
        for path, keys in keys_of.items():
            with safe_open(path, framework="pt") as file:
                for key in keys:
                    part = file.get_slice(key)
                    shapes[key] = part.get_shape()
                    numbers[part.get_dtype()] += prod(shapes[key])
    ((most, _),) = numbers.most_common(1)
    if most not in _DTYPES:
        raise ConfigError(f"{where} weights of type {most} cannot be computed with")
    kind = getattr(torch, _DTYPES[most] if dtype == "auto" else dtype)
    with unreadable(model, "config"):
        skeleton = empty_model(config, kind, with_buffers=True).requires_grad_(False).eval()
        skeleton.tie_weights()  # parameters without storage are made one by one
    origins = origins_in_files(skeleton, files)
    for name, parameter in skeleton.named_parameters(remove_duplicate=False):
        if name not in origins:
            raise ConfigError(f"{where} weights lack {name!r}")
        keys = list(origins[name].keys)
        try:
            parts = [torch.empty(shapes[key], device="meta") for key in keys]
            shape = list(origins[name].made_of(parts).shape)
        except RuntimeError as error:
            raise ConfigError(
                f"{where} {len(keys)} tensors such as {keys[0]!r} do not fit together"
            ) from error
        if list(parameter.shape) != shape:
            raise ConfigError(
                f"{where} {keys[0]!r} has shape {shape} but the configuration says "
                f"{list(parameter.shape)}"
            )
    unused = files.keys() - {key for origin in origins.values() for key in origin.keys}
    found = LazyCheckpoint(folder, skeleton, origins, files, tuple(sorted(unused)))
    for buffer in [name for name, _ in skeleton.named_buffers() if name in origins]:
        set_module_tensor_to_device(skeleton, buffer, "cpu", found.read(buffer))
    return found
