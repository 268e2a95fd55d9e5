"""Read models, processors and configurations from folders and the hub."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import torch
import transformers
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from slimvlm.core.errors import ConfigError
from slimvlm.core.options import Dtype, LoadConfig
from slimvlm.core.processes import local_rank, num_ranks
from slimvlm.core.requests import digest
from slimvlm.data.chat import tokenizer_of
from slimvlm.models.anatomy import Anatomy, read_anatomy
from slimvlm.models.classes import (
    check_widths,
    class_of,
    empty_model,
    is_quantized,
    set_class_,
)
from slimvlm.models.files import check_folder, require_stored, unreadable
from slimvlm.models.hidden import shard_config
from slimvlm.models.parts import backbone_of, family_of

_SAMPLED = 64
_PROCESSOR_FILES = {
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt"),
    *("preprocessor_config.json", "processor_config.json"),
}
"""Files of which every processor and tokenizer has one."""


def resolve(model: str | Path) -> str:
    """Find the folder or hub id of a user's ``MODEL``; ``demo`` is built when first used."""
    if str(model) == "demo":
        from slimvlm.demo.build import build_demo

        return str(build_demo())
    path = Path(model)
    if (path / "checkpoint" / "config.json").is_file():
        return str(path / "checkpoint")  # a run folder
    looks_local = str(model).startswith((".", "/", "~")) or str(model).count("/") != 1
    looks_local = looks_local or path.parent.is_dir()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"model {str(model)!r}: the folder has no config.json")
    elif looks_local or path.exists():
        raise ConfigError(f"model {str(model)!r}: no such folder")
    return str(model)


def folder_of(model: str | Path) -> Path:
    """Return the folder of a model; files of a hub id are downloaded."""
    name = resolve(model)
    return Path(name) if Path(name).is_dir() else Path(snapshot_download(name))


def load_config(model: str | Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Read a model's configuration and check that slimvlm knows it; no weights are read."""
    name = resolve(model)
    where = "" if Path(name).is_dir() else "no such folder, and not found on the hub; "
    with unreadable(model, f"{where}config"):
        check_folder(name)
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            name, trust_remote_code=trust_remote_code
        )
        backbone_of(config)
        check_widths(config)
    return config


def load(
    model: str | Path,
    dtype: str = "auto",
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    shard: bool = False,
) -> tuple[PreTrainedModel, Any]:
    """Load a model and its processor as native transformers objects.

    Args:
        model: A folder, a hub id, or ``demo``.
        dtype: ``auto`` (as stored), ``float32``, ``bfloat16`` or ``float16``.
        device: Where to put it; by default this process's accelerator, else the CPU.
        trust_remote_code: Whether code that lies in the checkpoint may run. Layers of different
            widths need none here: slimvlm has that code itself and never runs the folder's copy.
        shard: Divide the weights among the processes that ``torchrun`` started (FSDP2); each reads
            its part alone.

    Returns:
        The model in evaluation mode, and its processor (its tokenizer, for a text model).

    Raises:
        ConfigError: If it cannot be found or read, or there is no such device.
        UnsupportedModelError: If slimvlm does not know the family.
    """
    if dtype not in get_args(Dtype):
        raise ConfigError(f"dtype {dtype!r} must be one of: {', '.join(get_args(Dtype))}")
    place = device_named(device)
    config = load_config(model, trust_remote_code)
    name = resolve(model)
    source = class_of(config)
    divided: dict[str, Any] = {"distributed_config": shard_config(config)} if shard else {}
    if is_quantized(config):  # some quantisers take the current card by default
        divided["device_map"] = {"": str(place)}
    require_buildable(name, config)
    with unreadable(model, "weights"):
        loaded, report = source.from_pretrained(
            name,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **divided,
        )
    if report["missing_keys"]:
        first, *rest = sorted(report["missing_keys"])
        raise ConfigError(
            f"model {str(model)!r}: weights lack {first!r}"
            + (f" and {len(rest)} more" * bool(rest))
        )
    set_class_(loaded)
    if not shard:  # shards lie where they belong
        loaded = loaded.to(place)
    return loaded.eval(), load_processor(name, config, trust_remote_code)


def require_buildable(name: str, config: PreTrainedConfig) -> None:
    """Refuse a model with pickled, malformed or far too few weights, before it is built."""
    with unreadable(name, "config"):
        described = sum(p.numel() for p in empty_model(config).parameters())
    require_stored(name, described)


def load_as(
    options: LoadConfig, model: str | Path, device: str | torch.device | None = None
) -> tuple[PreTrainedModel, Any]:
    """Load a model with options, on their device unless another one is given."""
    return load(model, options.dtype, device or options.device, options.trust_remote_code)


def check_models(options: LoadConfig, *models: str) -> None:
    """Refuse devices that are absent and models that cannot be read, before any weight is read."""
    device_named(options.device)
    for model in models:
        load_config(model, options.trust_remote_code)


def default_device() -> torch.device:
    """Return this process's accelerator (CUDA, MPS, XPU, ...) if there is one, else the CPU."""
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    found: Any = torch.accelerator.current_accelerator()
    return torch.device(found.type, local_rank() % torch.accelerator.device_count())


def device_named(name: str | torch.device | None) -> torch.device:
    """Find the device of a user's name; by default, and for a kind alone, this process's."""
    usual = default_device()
    if name is None or str(name) == usual.type:
        return usual
    cards = [] if usual.type == "cpu" else [usual.type]
    cards += [f"{usual.type}:{index}" for index in range(torch.accelerator.device_count())]
    if str(name) not in ("cpu", *cards):
        raise ConfigError(f"device {str(name)!r} must be one of: {', '.join(['cpu', *cards])}")
    if num_ranks() > 1 and str(name) in cards:
        raise ConfigError(
            f"device {str(name)!r}: each of {num_ranks()} processes takes one of its own. Give cpu "
            f"or {usual.type}"
        )
    return torch.device(name)


def has_float64(device: torch.device) -> bool:
    """Whether a device computes in float64."""
    return device.type != "mps"


def with_float64(values: Tensor) -> Tensor:
    """Move values to where float64 sums are possible: their device, or else the CPU."""
    return values if has_float64(values.device) else values.cpu()


def load_processor(name: str, config: PreTrainedConfig, trust_remote_code: bool = False) -> Any:
    """Read the processor of a model that sees, else its tokenizer; None if absent."""
    sees = family_of(config.model_type).vision is not None
    auto = transformers.AutoProcessor if sees else transformers.AutoTokenizer
    here = {path.name for path in Path(name).iterdir()} if Path(name).is_dir() else _PROCESSOR_FILES
    if not name or not here & _PROCESSOR_FILES:
        return None
    with unreadable(name, "processor" if sees else "tokenizer"):
        processor = auto.from_pretrained(name, trust_remote_code=trust_remote_code)
        tokenizer_of(processor)("a")  # some settings fail at the first word
    return processor


def anatomy(model: PreTrainedModel | PreTrainedConfig | str | Path) -> Anatomy:
    """Read the anatomy of a model, a configuration, or a folder or hub id (not its weights).

    Raises:
        ConfigError: If a folder or id cannot be read.
        UnsupportedModelError: If slimvlm does not know the family.
    """
    if isinstance(model, nn.Module):
        return read_anatomy(model)
    config = model if isinstance(model, PreTrainedConfig) else load_config(model)
    backbone_of(config)
    check_widths(config)
    with unreadable(config._name_or_path, "config"):
        return read_anatomy(empty_model(config))


def computes_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 matrices natively, and does not emulate that."""
    if device.type == "mps":
        return False  # float32 is as fast on the first chips, and torch cannot tell which one it is
    if device.type == "cuda":  # it answers for the current card
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        supported: Any = getattr(torch.get_device_module(device), "is_bf16_supported", None)
        if supported is None:
            return False
        knows_emulation = "including_emulation" in inspect.signature(supported).parameters
        return bool(supported(including_emulation=False) if knows_emulation else supported())
    found: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # from torch 2.8 on
    return bool(found.get("amx_bf16") or found.get("avx512_bf16"))


def digest_of_weights(model: nn.Module) -> str:
    """Hash a model's shapes, data types and a sample of every weight.

    Training and repair change every weight that they touch, so up to 64 evenly spaced values of
    each tensor tell models apart without reading gigabytes.
    """
    parts = []
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().flatten()
        parts.append(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        parts.append(flat[:: max(len(flat) // _SAMPLED, 1)].float().cpu().numpy().tobytes())
    return digest(parts)


def digest_of_tensors(values: Mapping[str, Any]) -> str:
    """Hash the tensors among some named values, such as a batch."""

    def parts() -> Iterator[bytes | memoryview]:
        for name, value in sorted(values.items()):
            if isinstance(value, Tensor):
                yield f"{name} {value.dtype} {list(value.shape)}".encode()
                flat = value.detach().cpu().contiguous().flatten()
                yield flat.view(torch.uint8).numpy().data

    return digest(parts())
