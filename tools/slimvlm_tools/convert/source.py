"""An original checkpoint folder, read as plain files: JSON, and tensors one at a time.

Nothing here goes through Auto classes: they would ask to run the folder's own code, or take an
original ``"model_type": "llava"`` for the native class and fill it with defaults.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from slimvlm.core.errors import ConfigError

PATTERNS = ["*.json", "*.safetensors", "*.bin", "*.model", "*.txt"]
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Where weights may stand, in the order in which transformers looks."""
MAPPED_BYTES = 256 * 2**20
"""Bytes read from a mapped file before it is closed and opened again: pages that were read count
as the process's memory until then."""


def find_folder(name: str | Path, what: str, cached_only: bool = False) -> Path:
    """The folder that a path or a hub id means; an id is fetched first.

    Args:
        name: A local folder or a hub id.
        what: How an error calls it.
        cached_only: Whether an id counts only if it is in the local cache already.

    Raises:
        ConfigError: If there is no such folder, or it has no ``config.json``.
    """
    folder = Path(name)
    if not folder.is_dir():
        if str(name).startswith((".", "/", "~")) or str(name).count("/") != 1 or folder.exists():
            raise ConfigError(f"{what} {str(name)!r}: no such folder")
        try:
            folder = Path(
                snapshot_download(str(name), allow_patterns=PATTERNS, local_files_only=cached_only)
            )
        except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
            raise ConfigError(
                f"{what} {str(name)!r}: no such folder, and it cannot be fetched from the hub"
            ) from error
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{what} {str(name)!r}: the folder has no config.json")
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty if the file does not exist.

    Raises:
        ConfigError: If the file is no JSON object.
    """
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{str(path)!r} is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{str(path)!r} must hold a JSON object")
    return values


class Weights:
    """The tensors of a checkpoint folder by name, ``.safetensors`` or ``.bin``, sharded or not.

    Attributes:
        folder: The folder.
        shapes: Shape of every tensor, known without reading it.
        files: The file of every tensor.
    """

    def __init__(self, folder: Path) -> None:
        """Read names and shapes only.

        Raises:
            ConfigError: If the folder has no weights, or they do not agree with their index.
        """
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.files: dict[str, Path] = {}
        self._opened: tuple[Path, Any] | None = None
        self._bytes_read = 0
        files, promised = _weight_files(folder)
        for file in files:
            for name, shape in self._read_shapes(file).items():
                if name in self.files:
                    raise ConfigError(f"weights: {name!r} stands twice in {str(folder)!r}")
                self.shapes[name], self.files[name] = shape, file
        if lost := sorted(promised - set(self.shapes)):
            raise ConfigError(f"weights: the index of {str(folder)!r} names {lost[0]!r}, no file")

    def read(self, name: str, block: int = 0, blocks: int = 1) -> Tensor:
        """One tensor, or one of several equal blocks of its rows, as its own memory."""
        rows = slice(None)
        if blocks > 1:
            size = self.shapes[name][0] // blocks
            rows = slice(block * size, (block + 1) * size)
        opened = self._open(self.files[name])
        if isinstance(opened, dict):
            tensor: Tensor = opened[name]
            part = tensor[rows].detach().clone() if tensor.dim() else tensor.detach().clone()
        elif self.shapes[name]:
            part = opened.get_slice(name)[rows].clone(memory_format=torch.contiguous_format)
        else:
            part = opened.get_tensor(name).clone()
        self._bytes_read += part.nbytes
        return part

    def dtype(self, name: str) -> torch.dtype:
        """The data type that a tensor is stored in."""
        opened = self._open(self.files[name])
        if isinstance(opened, dict):
            stored: torch.dtype = opened[name].dtype
            return stored
        head: Tensor = opened.get_slice(name)[:1]
        return head.dtype

    def _read_shapes(self, file: Path) -> dict[str, tuple[int, ...]]:
        opened = self._open(file)
        if isinstance(opened, dict):
            return {name: tuple(tensor.shape) for name, tensor in opened.items()}
        return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118

    def _open(self, file: Path) -> Any:
        """An open safetensors file, or the state dict of a ``.bin``. The last one stays open."""
        is_stale = self._bytes_read > MAPPED_BYTES and _is_mapped(file)
        if self._opened is None or self._opened[0] != file or is_stale:
            self._opened, self._bytes_read = None, 0
            self._opened = (file, _open_weights(file))
        return self._opened[1]


def _weight_files(folder: Path) -> tuple[list[Path], set[str]]:
    for name in WEIGHT_FILES:
        path = folder / name
        if not path.is_file():
            continue
        if path.suffix != ".json":
            return [path], set()
        weight_map = read_json(path).get("weight_map", {})
        files = [folder / file for file in sorted(set(weight_map.values()))]
        if lost := [file.name for file in files if not file.is_file()]:
            raise ConfigError(f"weights: {str(folder)!r} lacks {lost[0]!r}, which its index names")
        return files, set(weight_map)
    raise ConfigError(f"weights: {str(folder)!r} holds none of {', '.join(WEIGHT_FILES)}")


def _is_mapped(file: Path) -> bool:
    """Whether a file is read page by page; what torch < 1.6 wrote is not."""
    return file.suffix == ".safetensors" or zipfile.is_zipfile(file)


def _open_weights(file: Path) -> Any:
    try:
        if file.suffix == ".safetensors":
            return safe_open(file, framework="pt")
        mapped = _is_mapped(file)
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except (OSError, RuntimeError, SafetensorError, pickle.UnpicklingError, EOFError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"weights: {str(file)!r} cannot be read ({reason})") from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ConfigError(f"weights: {str(file)!r} is not a plain dictionary of tensors")
    return state
