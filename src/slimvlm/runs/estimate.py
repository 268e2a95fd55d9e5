"""What pruning and recovering a model needs in memory, work and time, before anything is run.

Work is counted in FLOP: two for each weight of the backbone that multiplies, and for each token.
The vision tower is not counted. The constants stand in ``recipes.yaml``, each with its source.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import lru_cache

import torch

from slimvlm.core.options import CalibrationConfig, RecoverConfig, Train
from slimvlm.models.anatomy import Anatomy, LayerShape
from slimvlm.models.cost import BYTES, weight_bytes
from slimvlm.models.load import computes_bfloat16, default_device, load_config
from slimvlm.pruning.walk.kept_inputs import MOST_BYTES
from slimvlm.runs.recipes import Recipe, rules


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What estimates need to know of a model and its data.

    Attributes:
        shape: The unpruned model.
        tokens: Mean tokens of a conversation, those of its pictures included.
        samples: Conversations to train on.
    """

    shape: Anatomy
    tokens: float
    samples: int

    @property
    def pass_flops(self) -> float:
        """Work of reading a conversation. Embeddings look up, they do not multiply."""
        looked_up = self.shape.embedding_params if self.shape.head_params else 0
        return 2 * (self.shape.backbone_params - looked_up) * self.tokens

    def training_flops(self, config: RecoverConfig, kept: float, seen: float) -> float:
        """Work of a training: forward and backward, and the forward pass of a teacher.

        Args:
            config: What learns, from which loss.
            kept: Share of the backbone that the student has.
            seen: Conversations, each as often as it is seen.
        """
        passes = kept * (2 if config.train == "projector" else 3) + config.needs_teacher
        return self.pass_flops * passes * seen


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a run needs, estimated.

    Attributes:
        calibration_bytes: Peak memory of choosing, cutting and repairing.
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


def estimate_cost(sizes: Sizes, ratio: float, recipe: Recipe, has_gpu: bool, dtype: str) -> Cost:
    """What a recipe needs.

    Args:
        sizes: The unpruned model and the data.
        ratio: Share of its backbone that goes.
        recipe: What is pruned and trained.
        has_gpu: Whether training runs on a GPU.
        dtype: Data type of the weights.
    """
    constants = rules().constants
    held = weight_bytes(sizes.shape, dtype)
    walked = held + _walk_bytes(sizes, ratio, dtype)
    about = [
        f"walk: the process, the weights, the new weights, {constants.gram_copies} Gram matrices, "
        f"inputs of a layer's matrices, and what a layer learns with ({constants.walk_source})"
    ]
    if recipe.train is None:
        return Cost(calibration_bytes=walked, rests_on=tuple(about))
    config = RecoverConfig(train=recipe.train, loss=recipe.loss)
    flops = sizes.training_flops(config, 1 - ratio, sizes.samples)
    speed, device = _speed(has_gpu)
    about += [
        f"training memory: the weights once, {constants.learning_bytes} bytes for each weight that "
        f"learns, {constants.activation_bytes} bytes for each token, layer and channel "
        f"({constants.activation_source}), batches of {config.batch_size}",
        f"time: {device}, {constants.efficiency:.0%} of it used; {sizes.tokens:.0f} tokens a "
        "conversation; the vision tower is not counted",
    ]
    return Cost(
        calibration_bytes=walked,
        training_bytes=held + _bytes_beside_weights(sizes, ratio, recipe, config),
        training_hours=flops / (constants.efficiency * speed) / 3600,
        samples=sizes.samples,
        rests_on=tuple(about),
    )


def _walk_bytes(sizes: Sizes, ratio: float, dtype: str) -> float:
    """What a walk with local steps holds beside the original's weights."""
    shape, constants = sizes.shape, rules().constants
    tokens = sizes.tokens * CalibrationConfig().samples
    largest = max(shape.layers, key=lambda layer: layer.params)
    channels = (largest.num_heads * largest.head_dim, largest.intermediate_size)
    new = (1 - ratio) * sum(layer.params for layer in shape.layers) * BYTES[dtype]
    grams = constants.gram_copies * BYTES["float32"] * max(channels) ** 2
    inputs = sum(min(MOST_BYTES, tokens * count * BYTES[dtype]) for count in channels)
    learning = constants.learning_bytes * (1 - ratio) * largest.params
    return constants.process_bytes + new + max(grams + inputs, learning)


def _bytes_beside_weights(
    sizes: Sizes, ratio: float, recipe: Recipe, config: RecoverConfig
) -> float:
    """What learns, and activations. A teacher shares the frozen weights of the student."""
    shape, constants = sizes.shape, rules().constants
    learning = learning_params(shape, ratio, config.train, config.lora_rank)
    kept_layers = shape.num_layers * (1 - ratio) if recipe.axis == "depth" else shape.num_layers
    channels = sizes.tokens * config.batch_size * shape.hidden_size * kept_layers
    return constants.learning_bytes * learning + constants.activation_bytes * channels


def learning_params(shape: Anatomy, ratio: float, train: Train, rank: int) -> int:
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


def optimizer_steps(config: RecoverConfig, samples: int) -> int:
    """Steps that training on so many samples takes."""
    if config.max_steps > 0:
        return config.max_steps
    batches = -(-samples // config.batch_size)
    return math.ceil(config.epochs * -(-batches // config.gradient_accumulation))


def image_tokens(model: str, trust_remote_code: bool = False) -> int:
    """Tokens of a picture: patches of the tower, or fewer where a configuration says so."""
    config = load_config(model, trust_remote_code)
    vision = getattr(config, "vision_config", None)
    size, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    side, step = (value[0] if isinstance(value, list | tuple) else value for value in (size, patch))
    patches = (side // step) ** 2 if side and step else rules().constants.image_tokens
    return min(patches, getattr(config, "image_seq_length", None) or patches)


def seconds_of(flops: float) -> float:
    """Rough time of so much work on this machine."""
    return flops / (rules().constants.efficiency * device_flops(default_device()))


def _speed(has_gpu: bool) -> tuple[float, str]:
    """Floating-point operations a second, and where that number comes from."""
    if has_gpu and not torch.cuda.is_available():
        constants = rules().constants
        return constants.gpu_flops, f"{constants.gpu} ({constants.gpu_source})"
    device = default_device() if has_gpu else torch.device("cpu")
    flops = device_flops(device)
    return flops, f"this {device.type} at {flops / 1e9:,.0f} GFLOP/s, timed just now"


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
