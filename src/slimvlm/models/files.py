"""A model's folder before anything in it is used: which files it may name, which sizes it may say.

Code that reads a folder asks `check_folder` first. What it lets through may still be refused by
transformers; `unreadable` then says so in one line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers.utils import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
)

from slimvlm.core.documents import read_object, read_text
from slimvlm.core.errors import (
    LONGEST,
    ConfigError,
    SlimError,
    is_out_of_memory,
    one_line,
    shortened,
)
from slimvlm.models.internals import file_if_reachable

_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_ADAPTER, _TEMPLATE = "adapter_config.json", "chat_template.jinja"
_SETTINGS = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"),
    "chat_template.json",
)
"""Files that must hold names and values if they are there."""
_MOST_SETTINGS, _MOST_TEMPLATE = 64 * 2**20, 2**20
"""Bytes of a file of settings, and of a chat template."""

_LIMITS: tuple[tuple[str, int, int], ...] = (
    (r"(num|n|max|encoder|decoder)(_\w+)?_layers?|n_layers?|layers|depth", 0, 2**10),
    (r"hidden_size|head_dim|num_(attention|key_value)_heads|patch_size|n_heads?", 1, 2**20),
    (r"intermediate_size|\w+_intermediate_size|num_\w*experts\w*|\w+_dim|\w+_heads", 0, 2**20),
    (r"image_size|height|width|crop_size|(shortest|longest)_edge|\w+_channels|depths", 0, 2**12),
    (r"(shortest|longest)_edge area|\w+_pixels", 1, 2**27),
    (r"image_seq_len\w*|num_\w*_tokens|(min|max)_(patches|\w*tiles)", 0, 2**14),
    (r"\w*_token_(id|ids|index)", -1, 2**31),
    (r"\w+_(size|rank|positions|embeddings|tokens|beams|sequences)", -1, 2**27),
)
"""Names of numbers and what they may be: far beyond every model that there is, but what is built
from them fits a machine. The first row that a name fits counts."""

_PACKED, _SPARE = 16, 2**20
"""How many weights a stored number can stand for, quantised, and how many may be stored nowhere."""


@contextmanager
def unreadable(model: str | Path, what: str) -> Iterator[None]:
    """Inside, say in one line that a library could not make sense of a model's files.

    Args:
        model: What the user calls the model.
        what: What was read: ``weights``.

    Raises:
        ConfigError: In place of whatever the library raises.
    """
    try:
        yield
    except SlimError:
        raise
    except Exception as error:  # broken files make libraries raise almost anything
        if is_out_of_memory(error):
            raise
        told = one_line(error)[:LONGEST]
        raise ConfigError(f"model {str(model)!r}: {what} cannot be read ({told})") from error


def check_folder(model: str | Path) -> None:
    """Refuse a model whose files lead elsewhere or whose numbers are absurd. No weight is read.

    Args:
        model: A folder, or a hub id of which the small files are looked at.

    Raises:
        ConfigError: If a file lies outside the folder (the hub's cache is known), the index names
            anything but safetensors files in it, it is an adapter, or a file is malformed.
    """
    small = (CONFIG_NAME, GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, *_SETTINGS)
    folder = Path(model)
    if not folder.is_dir():
        found = [file_if_reachable(str(model), name) for name in small]
        if found[0] is None:
            return
        folder = Path(found[0]).parent
    where = f"model {str(model)!r}"
    for path in folder.rglob("*"):
        _require_inside(path, folder, where)
    if (folder / _ADAPTER).exists():
        raise ConfigError(f"{where}: {_ADAPTER} makes it an adapter; merge it first")
    for name in (CONFIG_NAME, GENERATION_CONFIG_NAME, *_SETTINGS):
        if (folder / name).exists() or name == CONFIG_NAME:
            values = read_object(folder / name, "model", _MOST_SETTINGS)
            _require_plausible(values, f"{where}: {name}:")
    if (folder / _TEMPLATE).exists():
        read_text(folder / _TEMPLATE, "model", _MOST_TEMPLATE)
    if (folder / SAFE_WEIGHTS_INDEX_NAME).exists():
        weight_files(folder)


def weight_files(folder: Path) -> dict[str, Path]:
    """The file of each tensor of a checked folder, by its name in the files.

    Raises:
        ConfigError: If there is none, or the index names anything but safetensors files in the
            folder.
    """
    where, index = f"model {str(folder)!r}", folder / SAFE_WEIGHTS_INDEX_NAME
    single = folder / SAFE_WEIGHTS_NAME
    if single.exists() or not index.exists():
        pickled = [file.name for file in folder.iterdir() if file.suffix in _PICKLED]
        if pickled and not single.exists():
            raise ConfigError(
                f"{where}: {min(pickled)!r} is a pickle, and only safetensors are read. Use "
                "slimvlm convert for checkpoints in an original format"
            )
        with unreadable(folder, "weights"), safe_open(single, framework="pt") as file:
            return dict.fromkeys(file.keys(), single)
    rows = read_object(index, "model", _MOST_SETTINGS).get("weight_map")
    if not isinstance(rows, dict) or not rows:
        raise ConfigError(f"{where}: {index.name}: weight_map must map weights to files")
    for file in {str(name): name for name in rows.values()}.values():
        is_name = isinstance(file, str) and Path(file).name == file and "\\" not in file
        if not is_name or not file.endswith(".safetensors"):
            raise ConfigError(
                f"{where}: {index.name}: weight_map names {shortened(file)}, but weights must be "
                "safetensors files in the folder itself"
            )
        if not (folder / file).is_file():
            raise ConfigError(f"{where}: weights cannot be read ({file!r} is missing)")
    return {key: folder / file for key, file in rows.items()}


def require_stored(model: str | Path, described: int) -> None:
    """Refuse a configuration of a model that is far larger than its files, before it is built.

    Args:
        model: A folder; of a hub id nothing is known.
        described: Parameters that the configuration describes.

    Raises:
        ConfigError: If it is, or a file's header is malformed.
    """
    folder = Path(model)
    if not folder.is_dir():
        return
    stored = 0
    with unreadable(model, "weights"):
        for path in dict.fromkeys(weight_files(folder).values()):
            with safe_open(path, framework="pt") as file:
                stored += sum(prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    if described > _PACKED * stored + _SPARE:
        raise ConfigError(
            f"model {str(model)!r}: {CONFIG_NAME} describes {described:,} weights, and its files "
            f"hold {stored:,}"
        )


def _require_inside(path: Path, folder: Path, where: str) -> None:
    """A file is no link, or one to a file of the same folder or of the hub's cache."""
    if not path.is_symlink():
        return
    with unreadable(folder, path.name):  # a link to itself
        target, folder = path.resolve(), folder.resolve()
    snapshots = folder.parent
    blobs = snapshots.parent / "blobs"
    in_cache = snapshots.name == "snapshots" and target.is_relative_to(blobs)
    if not in_cache and not target.is_relative_to(folder):
        raise ConfigError(f"{where}: {path.name!r} is a link that leads out of the folder")


def _require_plausible(values: Any, where: str, name: str = "") -> None:
    """Look at every number and at every name of code, however deep."""
    if isinstance(values, dict):
        longest = values.get("longest_edge")
        are_areas = isinstance(longest, int) and longest > 2**12  # of Qwen's processors
        for key, value in values.items():
            _require_plausible(value, where, key + " area" * (are_areas and "_edge" in key))
    elif isinstance(values, list):
        for value in values:
            _require_plausible(value, where, name)
    elif isinstance(values, int | float) and not isinstance(values, bool):
        row = next((row for row in _LIMITS if re.fullmatch(row[0], name)), None)
        if row is not None and not row[1] <= values <= row[2]:
            limits = f"{row[1]} to {row[2]:,}"
            raise ConfigError(f"{where} {name} {shortened(values)} must be {limits}")
    elif isinstance(values, str) and name.endswith("_implementation") and "/" in values:
        raise ConfigError(f"{where} {name} {shortened(values)} names code, which is not run")
