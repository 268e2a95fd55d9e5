"""Activations between layers, in a folder that is read through memory maps.

Every file appears whole, and a folder of files takes its name when all of them are there, so that
a run that was killed goes on after the last whole layer.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from slimvlm.core.errors import ConfigError, UnsupportedModelError
from slimvlm.core.files import new_file


class Scratch:
    """A folder of folders of files, one file for each stored batch.

    Folders: ``batches`` (what calibration reads of a batch, and what the text model calls its
    layers with), ``hidden-<i>`` (what leaves layer ``i - 1``), ``gradient-<i>`` (the loss's
    gradient of what enters layer ``i``), ``scores-<criterion>-<i>``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def has(self, name: str) -> bool:
        """Whether a folder is there with all its files."""
        return (self.folder / name).is_dir()

    def finish(self, name: str) -> None:
        """All files of a folder are there."""
        self._folder(name).rename(self.folder / name)

    def count(self, name: str) -> int:
        """How many files a folder has."""
        return len(list(self._folder(name).glob("*.safetensors")))

    def drop(self, name: str) -> None:
        """Remove a folder, whole or not."""
        for path in (self.folder / name, self.folder / f".{name}.partial"):
            shutil.rmtree(path, ignore_errors=True)

    def drop_all_but(self, name: str | None) -> None:
        """Remove every folder but one, or all."""
        for path in self.folder.iterdir():
            if path.is_dir() and path.name not in (name, f".{name}.partial"):
                shutil.rmtree(path)

    def drop_file(self, name: str, place: int) -> None:
        """Remove one file."""
        self._path(name, place).unlink()

    def write(
        self, name: str, place: int, tensors: Mapping[str, Tensor], about: Any = None
    ) -> None:
        """Write a file of a folder, in place of an older one."""
        self._folder(name).mkdir(exist_ok=True)
        stored = {key: value.detach().contiguous().cpu() for key, value in tensors.items()}
        with new_file(self._path(name, place), outlives_power_cut=False) as partial:
            save_file(stored, partial, {"about": json.dumps(about)})

    def read(self, name: str, place: int, device: torch.device) -> dict[str, Tensor]:
        """The tensors of a file, mapped on a CPU."""
        with safe_open(self._path(name, place), framework="pt", device=str(device)) as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118

    def about(self, name: str, place: int) -> Any:
        """What was noted beside the tensors of a file; None if there is no such file."""
        path = self._path(name, place)
        if not path.is_file():
            return None
        with safe_open(path, framework="pt") as file:
            return json.loads(file.metadata()["about"])

    def require_space(self, needed: int) -> None:
        """Refuse to begin what the disk cannot hold.

        Raises:
            ConfigError: If there is too little room.
        """
        free = shutil.disk_usage(self.folder).free
        stored = [path.stat().st_size for path in self.folder.rglob("*.safetensors")]
        if needed - sum(stored) > free:
            raise ConfigError(
                f"scratch {str(self.folder)!r}: {needed / 2**30:.1f} GiB needed, "
                f"{sum(stored) / 2**30:.1f} GiB there already, "
                f"{free / 2**30:.1f} GiB free"
            )

    def _folder(self, name: str) -> Path:
        """The folder, or the one that is filled before `finish` gives it its name."""
        whole = self.folder / name
        return whole if whole.is_dir() else self.folder / f".{name}.partial"

    def _path(self, name: str, place: int) -> Path:
        return self._folder(name) / f"{place:06}.safetensors"


def packed(value: Any, tensors: dict[str, Tensor]) -> Any:
    """A layer's arguments as JSON; tensors go into ``tensors``, the same one once.

    Raises:
        UnsupportedModelError: If an argument is of a kind that no known model uses.
    """
    if isinstance(value, Tensor):
        for name, known in tensors.items():
            if known is value:
                return {"tensor": name}
        tensors[f"call.{len(tensors)}"] = value
        return {"tensor": f"call.{len(tensors) - 1}"}
    if isinstance(value, tuple | list):
        return {"tuple": [packed(item, tensors) for item in value]}
    if isinstance(value, dict):
        return {"dict": {key: packed(item, tensors) for key, item in value.items()}}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise UnsupportedModelError(
        f"low memory: decoder layers are called with a {type(value).__name__}, which cannot be kept"
    )


def unpacked(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `packed`."""
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "tuple" in value:
        return tuple(unpacked(item, tensors) for item in value["tuple"])
    return {key: unpacked(item, tensors) for key, item in value["dict"].items()}
