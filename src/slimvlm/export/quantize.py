"""Fewer bits for the weights of the decoder layers, in a checkpoint that ``from_pretrained`` loads.

Only weights are quantised, and only the matrices of the decoder layers: tower, projector, token
embedding and head stay as they are. Quantise last: what is quantised cannot be pruned or trained.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel, TorchAoConfig

from slimvlm.core.errors import ConfigError, ReloadError
from slimvlm.core.files import new_folder, require_free
from slimvlm.evaluation.measure import stored_bytes
from slimvlm.export.compressed import compressed
from slimvlm.models.classes import auto_class, empty_model, is_quantized, is_uneven, uneven_class
from slimvlm.models.cost import free_memory
from slimvlm.models.files import unreadable
from slimvlm.models.load import (
    device_named,
    folder_of,
    load_config,
    load_processor,
    require_buildable,
    resolve,
)
from slimvlm.models.parts import family_of, projections
from slimvlm.pruning.layout import write_processor
from slimvlm.pruning.manifest import write_manifest
from slimvlm.pruning.save import PLAN_FILE, check_reload

Bits = Literal["int8", "int4", "fp8"]
Backend = Literal["auto", "torchao", "bitsandbytes", "compressed-tensors"]
GROUP = 64
"""Weights of a row that share a scale in int4."""


@dataclass(frozen=True)
class Quantized:
    """What quantising did.

    Attributes:
        to: The type of the weights.
        backend: The library that made it and that loads it.
        bytes_before: Bytes of all weights, before.
        bytes_after: The same after, scales included.
    """

    to: str
    backend: str
    bytes_before: int
    bytes_after: int

    @property
    def saved(self) -> float:
        """Share of the bytes that is gone."""
        return 1 - self.bytes_after / self.bytes_before


@dataclass(frozen=True)
class _Method:
    """One way to quantise: what it needs, and what transformers is told, if it does it."""

    needs_gpu: bool
    row_multiple: int
    config: Callable[[list[str], torch.dtype], Any] | None = None


def _torchao_int8(skipped: list[str], dtype: torch.dtype) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=skipped)


def _torchao_int4(skipped: list[str], dtype: torch.dtype) -> Any:
    from torchao.quantization import Int4WeightOnlyConfig

    packed = Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format="tile_packed_to_4d")
    return TorchAoConfig(packed, modules_to_not_convert=skipped)


def _bitsandbytes_int8(skipped: list[str], dtype: torch.dtype) -> Any:
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)


def _bitsandbytes_int4(skipped: list[str], dtype: torch.dtype) -> Any:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skipped,
    )


METHODS: dict[tuple[str, str], _Method] = {
    ("int8", "torchao"): _Method(needs_gpu=False, row_multiple=1, config=_torchao_int8),
    ("int8", "bitsandbytes"): _Method(needs_gpu=False, row_multiple=1, config=_bitsandbytes_int8),
    ("int4", "torchao"): _Method(needs_gpu=True, row_multiple=GROUP, config=_torchao_int4),
    ("int4", "bitsandbytes"): _Method(
        needs_gpu=False, row_multiple=GROUP, config=_bitsandbytes_int4
    ),
    ("int8", "compressed-tensors"): _Method(needs_gpu=False, row_multiple=1),
    ("int4", "compressed-tensors"): _Method(needs_gpu=False, row_multiple=GROUP),
    ("fp8", "compressed-tensors"): _Method(needs_gpu=False, row_multiple=1),
}
"""By type and library. torchao packs int4 for a GPU only; bitsandbytes' nf4 also runs on a CPU."""


def quantize(
    model: str | Path,
    out: str | Path,
    to: Bits = "int8",
    backend: Backend = "auto",
    device: str | torch.device | None = None,
    force: bool = False,
) -> Quantized:
    """Write a checkpoint whose decoder layers have fewer bits, and read it back.

    int8 has one scale for each row (torchao; compressed-tensors, which also rounds activations to 8
    bit), or LLM.int8 with outliers in 16 bit (bitsandbytes). int4 has one scale for each 64 weights
    of a row: affine (torchao), symmetric (compressed-tensors) or nf4 (bitsandbytes). fp8 has one
    scale for each row, and rounds activations, too.

    Args:
        model: Folder or hub id.
        out: The new folder.
        to: ``int8``, ``int4`` or ``fp8``.
        backend: ``torchao``, ``bitsandbytes``, ``compressed-tensors`` (which vLLM reads), or
            ``auto``: torchao, but for int4 on a CPU and for fp8.
        device: Where to quantise; by default the accelerator if there is one, else the CPU.
        force: Whether an existing folder may be replaced.

    Raises:
        ConfigError: If the model or the machine does not allow it.
        ReloadError: If what was written does not load back to the same model.

    Reference:
        Dettmers et al. 2022, "LLM.int8()", arXiv:2208.07339; Dettmers et al. 2023, "QLoRA" (nf4),
        arXiv:2305.14314, Section 3.
    """
    require_free(out, force)
    target = device_named(device)
    config = load_config(model)
    require_buildable(resolve(model), config)
    chosen = _backend_for(to, backend, target)
    _check(config, to, chosen)
    name = resolve(model)
    skipped = _skipped(config)
    dtype = getattr(config, "dtype", None) or torch.bfloat16
    asked = METHODS[to, chosen].config
    small = _load(name, config, asked and asked(skipped, dtype), target)
    processor = load_processor(name, config)
    with new_folder(out, force) as folder:
        with nullcontext() if asked else compressed(small, to, skipped, GROUP) as settings:
            if settings is not None:
                small.config.quantization_config = settings
            _check_what_was_quantized(small)
            small.save_pretrained(folder)
            after = stored_bytes(small)
        if processor is not None:
            write_processor(processor, folder)
        if (Path(name) / PLAN_FILE).exists():
            shutil.copy(Path(name) / PLAN_FILE, folder / PLAN_FILE)
        check_reload(small, processor, folder)
        write_manifest(folder)
    before = sum(p.numel() for p in empty_model(config).parameters()) * dtype.itemsize
    return Quantized(to, chosen, before, after)


def _backend_for(to: str, backend: str, device: torch.device) -> str:
    """The library to use.

    Raises:
        ConfigError: If it is not there, or cannot do this on this device.
    """
    on_gpu = device.type == "cuda"
    if backend == "auto":
        others = {"fp8": "compressed-tensors"} | ({} if on_gpu else {"int4": "bitsandbytes"})
        backend = others.get(to, "torchao")
    if (to, backend) not in METHODS:
        known = ", ".join(sorted(f"{bits} with {library}" for bits, library in METHODS))
        raise ConfigError(f"to {to!r} with backend {backend!r} must be one of: {known}")
    if find_spec(backend.replace("-", "_")) is None:
        raise ConfigError(f"backend {backend!r} is not installed: pip install 'slimvlm[quant]'")
    if METHODS[to, backend].needs_gpu and not on_gpu:
        raise ConfigError(
            f"to {to!r}: {backend} packs {to} for a GPU only, and the device is {device}. Use "
            "--backend bitsandbytes, or --to int8"
        )
    return backend


def _check(config: PreTrainedConfig, to: str, backend: str) -> None:
    """Refuse what cannot be quantised, before weights are read.

    Raises:
        ConfigError: If it is quantised already, or a row has no whole number of groups.
    """
    if is_quantized(config):
        raise ConfigError("model: its weights are quantised already; quantise the original")
    multiple = METHODS[to, backend].row_multiple
    for _, projection, linear in projections(empty_model(config)):
        if linear.in_features % multiple:
            raise ConfigError(
                f"to {to!r}: rows of {projection.path} have {linear.in_features} weights, which is "
                f"no multiple of {multiple}. Plan with --round-to {multiple}, or use --to int8"
            )


def _skipped(config: PreTrainedConfig) -> list[str]:
    """Paths that stay as they are: tower, projector, head, and any other matrix outside units."""
    family = family_of(config.model_type)
    parts = [part for part in (family.vision, *family.projector, family.head) if part is not None]
    model = empty_model(config)
    owned = {id(linear) for _, _, linear in projections(model)}
    others = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and id(module) not in owned
        and not any(name == part or name.startswith(f"{part}.") for part in parts)
    ]
    return [*parts, *others]


def _load(
    name: str, config: PreTrainedConfig, quantization: Any, device: torch.device
) -> PreTrainedModel:
    source: Any = uneven_class(config) if is_uneven(config) else auto_class(config)
    needed = sum(file.stat().st_size for file in folder_of(name).glob("*.safetensors"))
    if device.type != "cpu" and needed > (free := free_memory(device)):
        raise ConfigError(
            f"device {str(device)!r}: {needed / 2**30:.2f} GiB of weights do not fit into "
            f"{free / 2**30:.2f} GiB that are free. Give cpu, or a device with more"
        )
    with unreadable(name, "weights"):
        model: PreTrainedModel = source.from_pretrained(
            name,
            dtype="auto",
            use_safetensors=True,
            quantization_config=quantization,
            device_map={"": str(device)},
        )
    model.eval()
    return model


def _check_what_was_quantized(model: PreTrainedModel) -> None:
    """Exactly the matrices of the decoder layers must have another kind of weight.

    Raises:
        ReloadError: If a library left one out or took another.
    """
    owned = {id(linear) for _, _, linear in projections(model)}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            weight = getattr(module, "weight", None)  # packed ones have another name
            changed = type(weight) is not nn.Parameter or weight.dtype.itemsize == 1
            if changed != (id(module) in owned):
                what = "was not quantised" if id(module) in owned else "was quantised"
                raise ReloadError(f"{name!r} {what}")
