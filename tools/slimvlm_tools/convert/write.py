"""Write a converted checkpoint tensor by tensor, and read it back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoProcessor, GenerationConfig, PreTrainedModel

from slimvlm.core.errors import (
    LONGEST,
    ConfigError,
    NumericalError,
    ReloadError,
    SlimError,
    one_line,
)
from slimvlm.models.files import write_weights
from slimvlm.models.load import empty_model, load
from slimvlm.pruning.layout import write_processor
from slimvlm.pruning.save import probe
from slimvlm.scoring.layerwise import open_checkpoint
from slimvlm_tools.convert.pieces import EMBEDDINGS, Conversion, check_complete

SHARD_BYTES = 2**30
FORWARD_BYTES = 512 * 2**20
"""Up to this size the written model is loaded and run; beyond, names and shapes are compared."""
SAMPLING = ("temperature", "top_p", "top_k", "typical_p", "min_p")


def write_checkpoint(
    conversion: Conversion,
    generation: Mapping[str, Any],
    folder: Path,
    dtype: torch.dtype | None = None,
) -> None:
    """Write weights, configuration, processor and generation settings."""
    model: Any = empty_model(conversion.config)
    check_complete(model, conversion.pieces)
    embeddings = conversion.pieces[EMBEDDINGS]
    written = dtype or embeddings.weights.tensors[embeddings.name].dtype
    for config in (model.config, model.config.text_config, model.config.vision_config):
        config.dtype = written
    model.generation_config = _generation_config(model, generation, conversion.generation)

    def read(name: str) -> Tensor:
        tensor = conversion.pieces[name].read()
        return tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor

    write_weights(model.to(written), read, folder, SHARD_BYTES)
    for file in folder.glob("*.safetensors"):  # safetensors makes them their owner's alone
        file.chmod((folder / "config.json").stat().st_mode)
    write_processor(conversion.processor, folder)


def check_written(folder: Path) -> None:
    """Load a written folder as a user would.

    Names and shapes are compared with the native class, and the processor is loaded; the model
    too if it is small: then it also reads a picture and a question.
    """
    is_small = sum(f.stat().st_size for f in folder.glob("*.safetensors")) <= FORWARD_BYTES
    try:
        written = open_checkpoint(folder)
        if written.unused:
            raise ValueError(f"it holds weights that nothing reads: {written.unused[:3]}")
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
        logits = _probe_logits(folder, processor) if is_small else torch.zeros(0)
    except (OSError, LookupError, RuntimeError, ValueError, TypeError, SlimError) as error:
        raise ReloadError(
            f"{str(folder)!r} does not load back: {one_line(error)[:LONGEST]}"
        ) from error
    if not bool(logits.isfinite().all()):
        raise NumericalError("convert: the logits of the converted model are not finite")


@torch.no_grad()
def _probe_logits(folder: Path, processor: Any) -> Tensor:
    model, _ = load(folder, device="cpu")
    batch = {name: value.to(model.dtype) if value.is_floating_point() else value
             for name, value in probe(model, processor).items()}  # fmt: skip
    logits: Tensor = model(**batch).logits
    return logits


def _generation_config(
    model: PreTrainedModel, source: Mapping[str, Any], ours: Mapping[str, Any]
) -> GenerationConfig:
    """The source's settings with ours over them, less sampling settings that are switched off."""
    dropped = {"_from_model_config", "transformers_version"}
    if not source.get("do_sample"):
        dropped |= set(SAMPLING)
    text = model.config.get_text_config()
    values: dict[str, Any] = {n: getattr(text, n, None) for n in ("bos_token_id", "eos_token_id")}
    values |= {name: value for name, value in source.items() if name not in dropped}
    try:
        config = GenerationConfig(**{**values, **ours})
        config.validate(strict=True)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"generation_config.json: {one_line(error)[:LONGEST]}") from error
    return config
