"""Write a converted checkpoint shard by shard, and read it back."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoProcessor, GenerationConfig

from slimvlm.core.errors import ConfigError, NumericalError, ReloadError
from slimvlm.core.progress import progress
from slimvlm.models.classes import auto_class
from slimvlm.pruning.save import probe
from slimvlm_tools.convert.layout import NATIVE, Layout
from slimvlm_tools.convert.source import Weights

SHARD_BYTES = 2**30
FORWARD_BYTES = 512 * 2**20
"""Up to this size the written model is loaded and run; beyond, names and shapes are compared."""
ON_DISK = (
    ("lm_head.", "language_model.lm_head."),
    ("model.language_model.", "language_model.model."),
    ("model.", ""),
)
"""Beginnings of names in memory, and what `save_pretrained` writes for them."""
SAMPLING = ("temperature", "top_p", "top_k", "typical_p", "min_p")


def write_checkpoint(
    layout: Layout, generation: Mapping[str, Any], folder: Path, dtype: str | None = None
) -> None:
    """Write weights, configuration, processor and generation settings.

    Args:
        layout: The conversion.
        generation: The source's ``generation_config.json``.
        folder: An existing folder.
        dtype: What floating-point tensors become; None leaves each as it is stored.
    """
    wanted = None if dtype is None else getattr(torch, dtype)
    _write_weights(layout, folder, wanted)
    for part in (layout.config, layout.config.text_config, layout.config.vision_config):
        part.dtype = wanted or _stored_dtype(layout)
    layout.config.architectures = [NATIVE[layout.config.model_type]]
    layout.config.save_pretrained(folder)
    layout.make_processor().save_pretrained(folder)
    _generation_config(layout, generation).save_pretrained(folder)


def check_written(layout: Layout, folder: Path) -> None:
    """Load a written folder as a user would.

    The processor always, the model too if it is small: then it also reads a picture and a
    question. Of a large one, names and shapes in the files are compared with the native class.

    Raises:
        ReloadError: If something is missing, left over, or does not load.
        NumericalError: If the loaded model's logits are not finite.
    """
    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ReloadError(f"{str(folder)!r}: the processor does not load back: {error}") from error
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if size > FORWARD_BYTES:
        _check_names(layout, folder)
    else:
        _check_model(layout, folder, processor)


def _check_names(layout: Layout, folder: Path) -> None:
    written = Weights(folder).shapes
    wanted = {_disk_name(name): piece.shape for name, piece in layout.pieces.items()}
    wrong = [n for n in {*written, *wanted} if written.get(n) != wanted.get(n)]
    if wrong:
        raise ReloadError(f"{str(folder)!r}: {min(wrong)!r} is not as the native class needs it")


@torch.no_grad()
def _check_model(layout: Layout, folder: Path, processor: Any) -> None:
    try:
        model, report = auto_class(layout.config).from_pretrained(
            folder, dtype="auto", trust_remote_code=False, output_loading_info=True
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ReloadError(f"{str(folder)!r} does not load back: {error}") from error
    if problems := {name: sorted(map(str, keys)) for name, keys in report.items() if keys}:
        raise ReloadError(f"{str(folder)!r} loads with wrong keys: {problems}")
    batch = {k: v.to(model.dtype) if v.is_floating_point() else v
             for k, v in probe(model, processor).items()}  # fmt: skip
    try:
        logits: Tensor = model.eval()(**batch).logits
    except (RuntimeError, ValueError, IndexError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ReloadError(f"{str(folder)!r} loads, but does not run: {reason}") from error
    if not bool(logits.isfinite().all()):
        raise NumericalError("convert: the logits of the converted model are not finite")


def _write_weights(layout: Layout, folder: Path, dtype: torch.dtype | None) -> None:
    order = sorted(
        layout.pieces, key=lambda n: (layout.pieces[n].weights.files[layout.pieces[n].name], n)
    )
    parts: list[list[str]] = []
    total = 0
    for shard in shards(layout, order, dtype):
        parts.append(list(shard))
        total += sum(tensor.nbytes for tensor in shard.values())
        part = folder / f"part-{len(parts)}"
        save_file(shard, part, metadata={"format": "pt"})
        part.chmod(0o644)
        shard.clear()
    if len(parts) == 1:
        (folder / "part-1").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        (folder / f"part-{number}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    text = json.dumps(index, indent=2) + "\n"
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def shards(
    layout: Layout, order: list[str], dtype: torch.dtype | None
) -> Iterator[dict[str, Tensor]]:
    """Written name to tensor, as many as fit into a shard at a time."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name in progress(order, "convert"):
        tensor = layout.pieces[name].read()
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        if shard and size + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[_disk_name(name)] = tensor
        size += tensor.nbytes
    yield shard


def _disk_name(name: str) -> str:
    for start, written in ON_DISK:
        if name.startswith(start):
            return written + name.removeprefix(start)
    return name


def _stored_dtype(layout: Layout) -> torch.dtype:
    """The data type of the language model as stored."""
    piece = layout.pieces["model.language_model.embed_tokens.weight"]
    return piece.weights.dtype(piece.name)


def _generation_config(layout: Layout, source: Mapping[str, Any]) -> GenerationConfig:
    """The source's settings with ours over them, less sampling settings that are switched off."""
    dropped = {"_from_model_config", "transformers_version"}
    if not source.get("do_sample"):
        dropped |= set(SAMPLING)
    text = layout.config.get_text_config()
    values: dict[str, Any] = {n: getattr(text, n, None) for n in ("bos_token_id", "eos_token_id")}
    values |= {name: value for name, value in source.items() if name not in dropped}
    try:
        config = GenerationConfig(**{**values, **layout.generation})
        config.validate(strict=True)
    except (ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"generation_config.json: {reason}") from error
    return config
