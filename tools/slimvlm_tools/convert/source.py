"""An original checkpoint folder, read as plain files: JSON, and tensors one at a time.

Nothing here goes through Auto classes: they would ask to run the folder's own code, or take an
original ``"model_type": "llava"`` for the native class and fill it with defaults.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from slimvlm.core.documents import read_object
from slimvlm.core.errors import LONGEST, ConfigError, UnsupportedModelError, one_line

PATTERNS = ["*.json", "*.safetensors", "*.bin", "*.model", "*.txt"]
WEIGHT_FILES = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
"""Where weights may stand, in the order in which transformers looks."""
Allowed = Mapping[str, tuple[Sequence[Any], Any]]
"""Fields of a source configuration, the values that can be mapped, and what one unset means."""
MAPPED_BYTES = 256 * 2**20
"""Bytes read from a mapped file before it is closed and opened again: pages that were read count
as the process's memory until then."""


def find_folder(name: str | Path, what: str, cached_only: bool = False) -> Path:
    """The folder that a path or a hub id means; an id is fetched first."""
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
    """A JSON object; empty if the file does not exist."""
    return read_object(path, "file") if path.is_file() else {}


def require(values: Mapping[str, Any], allowed: Allowed) -> None:
    """Check fields of a source configuration that must have values that can be mapped."""
    for name, (choices, default) in allowed.items():
        if (value := values.get(name, default)) not in choices:
            raise UnsupportedModelError(
                f"config.json: {name} {value!r} has no native counterpart. Can be converted: "
                + ", ".join(map(repr, choices))
            )


def pick(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Those of the named fields that a source configuration sets."""
    return {name: values[name] for name in names if values.get(name) is not None}


class OriginalWeights:
    """The tensors of a checkpoint folder by name, ``.safetensors`` or ``.bin``, sharded or not.

    Attributes:
        folder: The folder.
        tensors: Shape and data type of every tensor, without its values.
    """

    def __init__(self, folder: Path) -> None:
        """Find names and shapes; values stay unread."""
        self.folder = folder
        self.tensors: dict[str, Tensor] = {}
        self._files: dict[str, Path] = {}
        self._opened: tuple[Path, dict[str, Tensor]] | None = None
        self._bytes_read = 0
        files, promised = _weight_files(folder)
        for file in files:
            for name, tensor in self._open(file).items():
                if name in self.tensors:
                    raise ConfigError(f"weights: {name!r} stands twice in {str(folder)!r}")
                self.tensors[name], self._files[name] = tensor.to("meta"), file
        if lost := sorted(promised - self.tensors.keys()):
            raise ConfigError(f"weights: the index of {str(folder)!r} names {lost[0]!r}, no file")

    def read(self, name: str, block: int = 0, blocks: int = 1) -> Tensor:
        """One tensor, or one of several equal blocks of its rows, as its own memory."""
        tensor = self._open(self._files[name])[name]
        if blocks > 1:
            tensor = tensor.chunk(blocks)[block]
        self._bytes_read += tensor.nbytes
        return tensor.clone(memory_format=torch.contiguous_format)

    def _open(self, file: Path) -> dict[str, Tensor]:
        """The tensors of a file, mapped where it can be. The last file stays open."""
        is_stale = self._bytes_read > MAPPED_BYTES and _is_mapped(file)
        if self._opened is None or self._opened[0] != file or is_stale:
            self._opened, self._bytes_read = None, 0
            self._opened = (file, _open_weights(file))
        return self._opened[1]


def _weight_files(folder: Path) -> tuple[list[Path], set[str]]:
    """The files that hold weights, and the names that their index promises."""
    for path in (folder / name for name in WEIGHT_FILES):
        if not path.is_file():
            continue
        if path.suffix != ".json":
            return [path], set()
        weight_map = read_json(path).get("weight_map", {})
        names = {str(file) for file in weight_map.values()}
        if outside := [name for name in names if Path(name).name != name]:
            raise ConfigError(f"weights: {path.name} names {outside[0]!r}, outside {str(folder)!r}")
        files = [folder / name for name in sorted(names)]
        if lost := [file.name for file in files if not file.is_file()]:
            raise ConfigError(f"weights: {str(folder)!r} lacks {lost[0]!r}, which its index names")
        return files, set(weight_map)
    raise ConfigError(f"weights: {str(folder)!r} holds none of {', '.join(WEIGHT_FILES)}")


def _is_mapped(file: Path) -> bool:
    """Whether a file is read page by page; what torch < 1.6 wrote is not."""
    return file.suffix == ".safetensors" or zipfile.is_zipfile(file)


def _open_weights(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=_is_mapped(file))
    except (OSError, RuntimeError, SafetensorError, pickle.UnpicklingError, EOFError) as error:
        raise ConfigError(
            f"weights: {str(file)!r} cannot be read ({one_line(error)[:LONGEST]})"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ConfigError(f"weights: {str(file)!r} is not a plain dictionary of tensors")
    return state
