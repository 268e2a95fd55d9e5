"""Write checkpoints whose decoder layers have weights of fewer bits, for ``from_pretrained``."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel, TorchAoConfig

from slimvlm.core.errors import ConfigError, ReloadError
from slimvlm.core.files import mark_checkpoint, new_folder, require_free
from slimvlm.evaluation.bench import stored_bytes
from slimvlm.models import load as models
from slimvlm.models.devices import device_named, free_memory
from slimvlm.models.files import alone, unreadable, weight_files
from slimvlm.models.parts import Parts
from slimvlm.pruning.layout import write_processor
from slimvlm.pruning.save import PLAN_FILE, CardFacts, check_reload, plan_of, write_card

Bits = Literal["int8", "int4", "fp8"]
Backend = Literal["auto", "torchao", "bitsandbytes", "compressed-tensors"]
GROUP = 64  # weights of a row that share a scale in int4
AFTERWARDS = "compressed-tensors"  # quantises a loaded model, the others while it is loaded
METHODS: dict[str, tuple[str, ...]] = {
    "int8": ("torchao", "bitsandbytes", AFTERWARDS),
    "int4": ("bitsandbytes", AFTERWARDS),
    "fp8": (AFTERWARDS,),
}
"""Libraries by type, first the one that ``auto`` takes."""
SCHEMES = {"int8": "W8A8", "int4": "W4A16", "fp8": "FP8_DYNAMIC"}
"""compressed-tensors' names of its schemes: bits of weights, bits of activations."""


@dataclass(frozen=True)
class Quantized:
    """Result of `quantize`: type, library, and bytes of all weights with their scales."""

    to: str
    backend: str
    bytes_before: int
    bytes_after: int

    @property
    def saved(self) -> float:
        """Share of the bytes that is saved."""
        return 1 - self.bytes_after / self.bytes_before


def quantize(
    model: str | Path,
    out: str | Path,
    to: Bits = "int8",
    backend: Backend = "auto",
    device: str | torch.device | None = None,
    force: bool = False,
) -> Quantized:
    """Write a checkpoint whose decoder layers have fewer bits, and read it back.

    ``docs/serving.md`` says what each library does, and which one is ``auto``.

    Raises:
        ConfigError: If the model or the machine does not allow it.
        ReloadError: If what was written does not load back to the same model.

    Reference:
        Dettmers et al. 2022, "LLM.int8()", arXiv:2208.07339; Dettmers et al. 2023, "QLoRA" (nf4),
        arXiv:2305.14314, Section 3.
    """
    require_free(out, force)
    target, name = device_named(device), models.resolve(model)
    config = models.load_config(model)
    models.require_buildable(name, config)
    chosen = _backend_for(to, backend)
    if models.is_quantized(config):
        raise ConfigError("model: its weights are quantised already; quantise the original")
    plan, empty = plan_of(model), models.empty_model(config)
    skipped, dtype = _unquantized(empty, to), getattr(config, "dtype", None) or torch.bfloat16
    kind, source = models.class_of(config), models.folder_of(name)
    needed = sum(file.stat().st_size for file in set(weight_files(source).values()))
    if target.type != "cpu" and needed > (free := free_memory(target)):
        told = f"{needed / 2**30:.2f} GiB of weights do not fit into {free / 2**30:.2f} GiB"
        told += " that are free. Give cpu, or a device with more"
        raise ConfigError(f"device {str(target)!r}: {told}")
    with unreadable(name, "weights"), alone(source):
        small: PreTrainedModel = kind.from_pretrained(
            source,
            trust_remote_code=False,
            dtype="auto",
            use_safetensors=True,
            quantization_config=_settings(to, chosen, skipped, dtype),
            device_map={"": str(target)},
        ).eval()
    processor = models.load_processor(name, config)
    with new_folder(out, force) as folder:
        with compressed(small, to, skipped) if chosen == AFTERWARDS else nullcontext():
            _require_types(small)
            small.save_pretrained(folder)
            after = stored_bytes(small)
        if processor is not None:
            write_processor(processor, folder)
        if plan is not None:
            plan.save(folder / PLAN_FILE)
        facts = CardFacts(base=name, name=Path(out).name, format=(to, chosen))
        write_card(folder, empty, plan, facts)
        check_reload(small, processor, folder)
        mark_checkpoint(folder)
    before = sum(p.numel() for p in empty.parameters()) * dtype.itemsize
    return Quantized(to, chosen, before, after)


def _require_types(model: PreTrainedModel) -> None:
    """Check that matrices of units are quantised, and no other ones."""
    owned = {id(linear) for _, _, linear in Parts(model).projections()}
    for place, module in model.named_modules():
        if isinstance(module, nn.Linear):
            weight = getattr(module, "weight", None)  # packed ones have another name
            changed = type(weight) is not nn.Parameter or weight.dtype.itemsize == 1
            if changed != (id(module) in owned):
                raise ReloadError(f"{place!r} was {'' if changed else 'not '}quantised")


def _unquantized(model: PreTrainedModel, to: str) -> list[str]:
    """List the modules that keep their weights: tower, projector, head, matrices outside units."""
    parts, owned = Parts(model), set[int]()
    for _, projection, linear in parts.projections():
        owned.add(id(linear))
        if to == "int4" and linear.in_features % GROUP:
            message = f"rows of {projection.path} have {linear.in_features} weights, which is no"
            message += f" multiple of {GROUP}. Plan with --round-to {GROUP}, or use --to int8"
            raise ConfigError(f"to {to!r}: {message}")
    whole = (parts.family.vision, *parts.family.projector, parts.family.head)
    paths = [path for path in whole if path is not None]
    within = tuple(f"{path}." for path in paths)
    for place, module in model.named_modules():
        is_other = isinstance(module, nn.Linear) and id(module) not in owned
        if is_other and not f"{place}.".startswith(within):
            paths.append(place)
    return paths


def _settings(to: str, backend: str, skipped: list[str], dtype: torch.dtype) -> Any:
    """Make transformers' settings of a library that quantises on loading; None for another."""
    if backend == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=skipped)
    if backend != "bitsandbytes":
        return None
    bits: dict[str, Any] = {"load_in_8bit": True}
    if to == "int4":
        bits = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    return BitsAndBytesConfig(**bits, llm_int8_skip_modules=skipped)


def _backend_for(to: str, backend: str) -> str:
    chosen = METHODS.get(to, (backend,))[0] if backend == "auto" else backend
    if chosen not in METHODS.get(to, ()):
        known = sorted(f"{bits} with {each}" for bits in METHODS for each in METHODS[bits])
        message = f"must be one of: {', '.join(known)}"
        raise ConfigError(f"to {to!r} with backend {backend!r} {message}")
    if find_spec(chosen.replace("-", "_")) is None:
        raise ConfigError(f"backend {chosen!r} is not installed: pip install 'slimvlm[quant]'")
    return chosen


@contextmanager
def compressed(model: PreTrainedModel, to: str, skipped: Sequence[str]) -> Iterator[None]:
    """Quantise matrices of decoder layers inside the block; dequantise them afterwards."""
    from compressed_tensors import quantization
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme = quantization.preset_name_to_scheme(SCHEMES[to], ["Linear"])
    assert scheme.weights is not None
    if scheme.weights.group_size is not None:
        scheme.weights.group_size = GROUP
    # readers differ in the path to a part and share its name
    ignored = set()
    for path in skipped:  # of a layer, the path inside it: others may have the same name
        *outer, inside = re.split(r"\blayers\.\d+\.", path)
        name = f".*{path.rpartition('.')[2]}.*"
        ignored.add("re:" + (rf".*layers\.\d+\.{re.escape(inside)}$" if outer else name))
    groups_of = {"decoder": scheme}
    settings = quantization.QuantizationConfig(config_groups=groups_of, ignore=sorted(ignored))
    quantization.apply_quantization_config(model, settings)
    matrices: list[Any] = [linear for _, _, linear in Parts(model).projections()]
    for module in matrices:
        rows = module.weight.detach().float()
        groups = rows.unflatten(1, (-1, scheme.weights.group_size or rows.shape[1]))
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights)
        module.weight_scale.data.copy_(scale)
        module.weight_zero_point.data.copy_(zero)
        module.quantization_status = quantization.QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    written: dict[str, Any] = json.loads(settings.model_dump_json(exclude_none=True))
    written["quantization_status"] = quantization.QuantizationStatus.COMPRESSED.value
    kind = matrices[0].quantization_scheme.format.value
    written["format"] = written["config_groups"]["decoder"]["format"] = kind
    model.config.quantization_config = written
    yield
    compressor.decompress_model(model)
