"""What pruning and recovering a model needs in memory and time, before anything is run."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from slimvlm.core.options import RecoverConfig, Train
from slimvlm.models.anatomy import Anatomy, LayerShape
from slimvlm.models.cost import weight_bytes
from slimvlm.models.load import anatomy, computes_bfloat16, default_device, load_config
from slimvlm.runs.recipes import Recipe, rules

EFFICIENCY = 0.3
"""Share of a plain matrix product's speed that whole stages are taken to reach."""
DEFAULT_IMAGE_TOKENS = 256
"""Tokens of a picture where a configuration does not say."""
_LEARNING_BYTES = 16
"""For each weight that learns: float32 weight and gradient, two float32 moments of AdamW."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a run needs, estimated.

    Attributes:
        calibration_bytes: Peak memory of scoring.
        training_bytes: Peak memory of recovery, 0 without.
        training_hours: Time of recovery, 0 without.
        samples: Conversations to train on.
        rests_on: What the estimates assume and where that comes from.
    """

    calibration_bytes: float
    training_bytes: float = 0.0
    training_hours: float = 0.0
    samples: int = 0
    rests_on: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What training sees: conversations, and the tokens of one."""

    samples: int
    tokens: int


def estimate_cost(
    shape: Anatomy, ratio: float, recipe: Recipe, has_gpu: bool, seen: Seen, dtype: str
) -> Cost:
    """What a recipe needs, from counts of the anatomy and the constants of ``recipes.yaml``.

    Args:
        shape: The unpruned model.
        ratio: Share of its backbone that goes.
        recipe: What is pruned and trained.
        has_gpu: Whether training runs on a GPU.
        seen: The data.
        dtype: Data type of the weights.
    """
    peak = rules()["cost"]["calibration_peak"]
    size = weight_bytes(shape, dtype)
    about = f"scoring: {peak[recipe.axis]:g} x the weights ({peak['source']})"
    if recipe.train is None:
        return Cost(calibration_bytes=peak[recipe.axis] * size, rests_on=(about,))
    hours, about_time = _hours(shape, ratio, recipe, has_gpu, seen)
    activations = rules()["cost"]["activation_bytes"]
    about_memory = (
        f"training memory: the weights once, {_LEARNING_BYTES} bytes for each weight that learns, "
        f"{activations['factor']} bytes for each token, layer and channel "
        f"({activations['source']}), batches of {RecoverConfig().batch_size}"
    )
    return Cost(
        calibration_bytes=peak[recipe.axis] * size,
        training_bytes=_training_bytes(shape, ratio, recipe, size, seen.tokens),
        training_hours=hours,
        samples=seen.samples,
        rests_on=(about, about_memory, about_time),
    )


def _hours(
    shape: Anatomy, ratio: float, recipe: Recipe, has_gpu: bool, seen: Seen
) -> tuple[float, str]:
    """Time of training, and what that rests on. Embeddings look up, they do not multiply."""
    assert recipe.train is not None
    config = RecoverConfig(train=recipe.train, loss=recipe.loss)
    multiplied = shape.backbone_params - (shape.embedding_params if shape.head_params else 0)
    flops = 2 * multiplied * seen.samples * seen.tokens * training_passes(config, 1 - ratio)
    speed, device = _speed(has_gpu)
    about = f"time: {device}, {EFFICIENCY:.0%} of it used; {seen.tokens} tokens a conversation"
    return flops / (EFFICIENCY * speed) / 3600, f"{about}; the vision tower is not counted"


def _training_bytes(shape: Anatomy, ratio: float, recipe: Recipe, size: int, tokens: int) -> float:
    """Weights, what learns, activations. A teacher shares the frozen weights of the student."""
    config = RecoverConfig()
    learning = learning_params(shape, ratio, recipe.train, config.lora_rank)
    kept_layers = shape.num_layers * (1 - ratio) if recipe.axis == "depth" else shape.num_layers
    activations: float = rules()["cost"]["activation_bytes"]["factor"] * tokens * config.batch_size
    return size + _LEARNING_BYTES * learning + activations * shape.hidden_size * kept_layers


def learning_params(shape: Anatomy, ratio: float, train: Train | None, rank: int) -> int:
    """Parameters that learn: the projector, LoRA matrices besides, or all but the vision tower.

    Args:
        shape: The unpruned model.
        ratio: Share of the backbone that goes.
        train: What learns.
        rank: Of the LoRA matrices.
    """
    if train == "full":
        return round((1 - ratio) * shape.backbone_params) + shape.projector_params
    lora = rank * sum(_lora_channels(layer, shape.hidden_size) for layer in shape.layers)
    return shape.projector_params + (round((1 - ratio) * lora) if train == "lora" else 0)


def _lora_channels(layer: LayerShape, hidden: int) -> int:
    """Inputs and outputs of all matrices of a layer, which LoRA's rank multiplies."""
    queries, keys = layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
    matrices = layer.neuron_params // hidden
    return (
        2 * (hidden + queries) + 2 * (hidden + keys) + matrices * (hidden + layer.intermediate_size)
    )


def _speed(has_gpu: bool) -> tuple[float, str]:
    """Floating-point operations a second, and where that number comes from."""
    if has_gpu and not torch.cuda.is_available():
        assumed = rules()["cost"]["gpu"]
        return assumed["flops"], f"{assumed['name']} ({assumed['source']})"
    device = default_device() if has_gpu else torch.device("cpu")
    flops = device_flops(device)
    return flops, f"this {device.type} at {flops / 1e9:,.0f} GFLOP/s, timed just now"


@lru_cache(maxsize=32)
def model_sizes(model: str, trust_remote_code: bool) -> tuple[int, int, int]:
    """Parameters of the backbone and of all, and tokens of a picture."""
    found = anatomy(model)
    config = load_config(model, trust_remote_code)
    return found.backbone_params, found.total_params, _image_tokens(config)


def _image_tokens(config: Any) -> int:
    """Tokens of a picture: patches of the tower, or fewer where a configuration says so."""
    vision = getattr(config, "vision_config", None)
    size, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    side, step = (value[0] if isinstance(value, list | tuple) else value for value in (size, patch))
    patches = (side // step) ** 2 if side and step else DEFAULT_IMAGE_TOKENS
    return min(patches, getattr(config, "image_seq_length", None) or patches)


def training_passes(config: RecoverConfig, kept: float) -> float:
    """Forward passes of the original that one step of training is worth.

    Args:
        config: What learns, from which loss.
        kept: Share of the backbone that the student has.
    """
    return kept * (2 if config.train == "projector" else 3) + config.needs_teacher


@lru_cache(maxsize=2)
def device_flops(device: torch.device) -> float:
    """FLOP/s of a matrix product on a device, measured in a moment."""
    dtype = torch.bfloat16 if computes_bfloat16(device) else torch.float32
    matrix = torch.ones(1024, 1024, device=device, dtype=dtype)
    repeats = 200 if device.type == "cuda" else 10
    matrix @ matrix
    start = time.perf_counter()
    for _ in range(repeats):
        product = matrix @ matrix
    float(product[0, 0])
    return repeats * 2 * 1024**3 / (time.perf_counter() - start)
