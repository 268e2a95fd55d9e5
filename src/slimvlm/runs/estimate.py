"""What pruning and recovering a model needs in memory, work and time, before anything is run.

Work is counted in FLOP: two for each weight of the backbone that multiplies, and for each token.
The vision tower is not counted. The constants stand in ``recipes.yaml``, each with its source.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from slimvlm.core.options import CalibrationConfig, PruneConfig, RecoverConfig, Train
from slimvlm.models.anatomy import Anatomy, LayerShape, read_anatomy
from slimvlm.models.classes import empty_model
from slimvlm.models.cost import BYTES, free_memory, weight_bytes
from slimvlm.models.load import computes_bfloat16, default_device, load_config
from slimvlm.models.losses import rows_at_once
from slimvlm.models.parts import family_of, text_config_of
from slimvlm.pruning.walk.distil import PASSES
from slimvlm.pruning.walk.kept_inputs import MOST_BYTES
from slimvlm.pruning.walk.walk import WALKING, states_bytes
from slimvlm.pruning.writers import REPAIRS, SEAM
from slimvlm.runs.recipes import rules
from slimvlm.runs.request import Request, ratio_of
from slimvlm.scoring.criteria import CRITERIA
from slimvlm.scoring.layerwise.stores import StatesPlace

CALIBRATION_BATCH = 4
"""Calibration samples that run at once."""
TRIAL_SHARE = 1 / 6
"""Share of a training that an axis is tried with."""
LOGITS_COPIES = 3
"""Tensors of the size of a chunk's logits that a loss and its gradient hold at one time."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What estimates need to know of a model and its data.

    Attributes:
        shape: The unpruned model.
        tokens: Mean tokens of a conversation, those of its pictures included.
        samples: Conversations that there are to train on.
        calibration: Conversations to calibrate on.
        token_bytes: What the backward pass keeps of a token, all layers together, by the data type
            that it computes in; see `kept_bytes`.
        vocabulary: Tokens that stay in the smaller model; None for all.
    """

    shape: Anatomy
    tokens: float
    samples: int
    calibration: int = CalibrationConfig().samples
    token_bytes: Mapping[str, float] = field(default_factory=dict)
    vocabulary: int | None = None

    @property
    def pass_flops(self) -> float:
        """Work of reading a conversation. Embeddings look up, they do not multiply."""
        looked_up = self.shape.embedding_params if self.shape.head_params else 0
        return 2 * (self.shape.backbone_params - looked_up) * self.tokens

    @property
    def token_share(self) -> float:
        """The share of the backbone that goes with its tokens."""
        gone = self.shape.vocab_size - (self.vocabulary or self.shape.vocab_size)
        return gone * self.shape.token_params / self.shape.backbone_params

    def decoder_share(self, ratio: float) -> float:
        """The share of the decoder layers that goes with a share of the backbone."""
        rest = max(ratio - self.token_share, 0.0) * self.shape.backbone_params
        return min(rest / _decoder_params(self.shape), 1.0)

    def learnt(self, config: RecoverConfig) -> int:
        """Conversations that a training learns from, of those that there are."""
        return max(round(self.samples * config.fraction), 1)

    def training_flops(self, config: RecoverConfig, kept: float) -> float:
        """Work of a training: forward and backward, and the forward pass of a teacher.

        Args:
            config: What learns, from which loss, how long.
            kept: Share of the backbone that the student has.
        """
        learnt = self.learnt(config)
        steps = optimizer_steps(config, learnt, self.decoder_share(1 - kept))
        batches = steps * config.gradient_accumulation
        seen = batches * min(config.batch_size, learnt)
        passes = kept * (2 if config.train == "projector" else 3) + config.needs_teacher
        return self.pass_flops * passes * seen


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a run needs, estimated.

    Attributes:
        calibration_bytes: Peak memory of choosing, cutting, repairing and writing, on the device.
        pruning_hours: Time of that.
        training_bytes: Peak memory of recovery on the device, 0 without.
        training_hours: Time of recovery, 0 without.
        samples: Conversations to train on.
        hidden_states: How much a walk keeps between layers and where; empty without a walk, and
            where the device is not there.
        rests_on: What the estimates assume and where that comes from.
    """

    calibration_bytes: float
    pruning_hours: float = 0.0
    training_bytes: float = 0.0
    training_hours: float = 0.0
    samples: int = 0
    hidden_states: str = ""
    rests_on: tuple[str, ...] = ()


def estimate_cost(
    sizes: Sizes, request: Request, device: torch.device, dtype: str, tried: int = 0
) -> Cost:
    """What a request needs.

    Args:
        sizes: The unpruned model and the data.
        request: What is asked, from `slimvlm.runs.request.resolved`.
        device: Where models are and run; for a CUDA device that this machine lacks, memory is
            taken as unlimited.
        dtype: Data type of the weights.
        tried: Axes that are tried before.
    """
    constants = rules().constants
    speed, timed = _speed(device, dtype)
    usable = 3600 * speed
    about = [
        f"memory of {device}" + ", the process among it" * (device.type == "cpu"),
        f"pruning: the weights, {constants.gram_copies} Gram matrices, hidden states and inputs of "
        "a layer's matrices, what a layer learns with, activations where a criterion reads "
        f"gradients; or both models while they are compared ({constants.walk_source})",
        f"time: {timed}; {sizes.tokens:.0f} tokens a conversation; the vision tower is not counted",
    ]
    brief = replace(request, prune=replace(request.prune, local_steps=0), report_samples=0)
    trials = tried * _pruning_flops(sizes, brief)
    states = _states(sizes, request.prune, device, dtype)
    pruning = Cost(
        calibration_bytes=_pruning_bytes(sizes, request, device, dtype, states),
        pruning_hours=(_pruning_flops(sizes, request) + trials) / usable,
        hidden_states=str(states or "") if _is_there(device) else "",
        rests_on=tuple(about),
    )
    if request.recover is None:
        return pruning
    config, ratio = request.recover, ratio_of(request.prune)
    about.append(
        f"training memory: the weights, {constants.learning_bytes} bytes for each weight that "
        f"learns, {sizes.token_bytes.get(dtype, 0.0) / 1000:.0f} kB kept of each token "
        f"({constants.activation_source}), batches of {config.batch_size}"
    )
    flops = sizes.training_flops(config, 1 - ratio)
    trained = 3600 * _speed(device, "float32" if config.bf16 is False else "bfloat16")[0]
    return replace(
        pruning,
        training_bytes=_training_bytes(sizes, request, config, device, dtype),
        training_hours=(1 + tried * TRIAL_SHARE) * flops / trained,
        samples=sizes.learnt(config),
        rests_on=tuple(about),
    )


def token_bytes(config: PreTrainedConfig, dtype: str) -> dict[str, float]:
    """`kept_bytes` in the data type of the weights, and in that of autocast."""
    return {name: kept_bytes(config, name) for name in {dtype, "bfloat16"}}


def kept_bytes(config: PreTrainedConfig, dtype: str) -> float:
    """What the backward pass keeps of a token in all decoder layers, without attention scores.

    The layers run once on tensors that have shapes and no values, and what they save is counted.
    Where a family's code looks at values, its widths give an estimate.
    """
    kind = getattr(torch, dtype)
    model = empty_model(config, kind)
    weights = {parameter.untyped_storage() for parameter in model.parameters()}
    kept: dict[torch.UntypedStorage, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if (storage := tensor.untyped_storage()) not in weights:
            kept[storage] = storage.nbytes()
        return tensor

    count = _COUNTED_TOKENS
    hidden = text_config_of(config).hidden_size
    inputs = torch.empty(1, count, hidden, dtype=kind, device="meta", requires_grad=True)
    mask = torch.empty(1, 1, count, count, dtype=torch.bool, device="meta")
    layers = model.get_submodule(family_of(config.model_type).backbone)
    try:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            layers(inputs_embeds=inputs, attention_mask=mask, use_cache=False)
    except (RuntimeError, NotImplementedError):
        return _kept_by_widths(read_anatomy(model), BYTES[dtype])
    return sum(kept.values()) / count


_COUNTED_TOKENS = 2


def _kept_by_widths(shape: Anatomy, size: int) -> float:
    """Twelve values a channel and four a neuron, as Llama and Qwen2 have it."""
    return float(
        sum(12 * shape.hidden_size + 4 * layer.intermediate_size for layer in shape.layers) * size
    )


def _is_there(device: torch.device) -> bool:
    """Whether this machine has a device; advice can be for another machine."""
    return device.type in ("cpu", default_device().type)


def _free(device: torch.device) -> float:
    """Bytes that are free on a device; one that is not there has room for everything."""
    return free_memory(device) if _is_there(device) else float(2**50)


def _own_bytes(device: torch.device) -> float:
    """What a process takes where its models are, before it reads one."""
    return rules().constants.process_bytes if device.type == "cpu" else 0.0


def _is_walked(config: PruneConfig) -> bool:
    return WALKING in config.criterion or config.repair != "none" or config.local_steps != 0


def _states(
    sizes: Sizes, config: PruneConfig, device: torch.device, dtype: str
) -> StatesPlace | None:
    """How much a walk keeps between layers, and where; None without a walk.

    A device that is not there has room for them.
    """
    if config.data is None or not _is_walked(config):
        return None
    aims = config.local_steps != 0 or (config.axis != "width" and SEAM in REPAIRS[config.repair])
    tokens = sizes.tokens * sizes.calibration
    needed = states_bytes(sizes.shape.hidden_size, tokens, BYTES[dtype], aims)
    if not _is_there(device):
        return StatesPlace(needed, device, "device", (0, 0))
    return StatesPlace.of(needed, device, weight_bytes(sizes.shape, dtype))


def _pruning_bytes(
    sizes: Sizes, request: Request, device: torch.device, dtype: str, states: StatesPlace | None
) -> float:
    """Peak of all that happens up to a written smaller model."""
    shape, config = sizes.shape, request.prune
    held = weight_bytes(shape, dtype)
    smaller = held * (1 - ratio_of(config) * shape.backbone_params / shape.total_params)
    on_cpu, free = device.type == "cpu", max(_free(device) - held, 0.0)
    stages: list[float] = [held]
    if on_cpu:
        stages.append(2 * smaller)  # while it is read back
    elif smaller <= free:
        stages.append(held + smaller)  # while both are timed
    if states is not None:
        are_here = states.kind == "device" or (on_cpu and states.kind == "host")
        new = (1 - sizes.decoder_share(ratio_of(config))) * _decoder_params(shape) * BYTES[dtype]
        beside = states.needed * are_here + new * on_cpu
        inputs = min(MOST_BYTES, free / 8) * (are_here or on_cpu)
        stages.append(held + beside + _walk_bytes(sizes, config, dtype, inputs))
    if any(CRITERIA[name].capture.backward for name in config.criterion):
        batch = CALIBRATION_BATCH * sizes.tokens * sizes.token_bytes.get(dtype, 0.0)
        largest = max(layer.params for layer in shape.layers) * BYTES[dtype]
        stages.append(held + batch + largest + _logits_bytes(shape, device, free))
    return _own_bytes(device) + max(stages)


def _walk_bytes(sizes: Sizes, config: PruneConfig, dtype: str, most_inputs: float) -> float:
    """What a walk holds of one layer beside the original's weights.

    Args:
        sizes: The model and the data.
        config: What is done.
        dtype: Data type of the weights.
        most_inputs: Bytes of a matrix's inputs that are kept at most.
    """
    shape, constants, ratio = sizes.shape, rules().constants, ratio_of(config)
    tokens = sizes.tokens * sizes.calibration
    largest = max(shape.layers, key=lambda layer: layer.params)
    channels = (largest.num_heads * largest.head_dim, largest.intermediate_size)
    grams = 0.0
    if WALKING in config.criterion:
        grams = constants.gram_copies * BYTES["float32"] * max(channels) ** 2
    read = [tokens * count * BYTES[dtype] for count in channels]
    inputs = sum(each for each in read if each <= most_inputs)
    learning = 0.0
    if config.local_steps != 0:
        of_layer = sizes.token_bytes.get(dtype, 0.0) / shape.num_layers
        learning = constants.learning_bytes * (1 - ratio) * largest.params
        learning += CALIBRATION_BATCH * sizes.tokens * of_layer
    return max(grams + inputs, learning)


def _training_bytes(
    sizes: Sizes, request: Request, config: RecoverConfig, device: torch.device, dtype: str
) -> float:
    """The weights, what learns, and activations. A teacher shares what stays frozen.

    On a CPU, attention that keeps its scores makes up for activations in bfloat16.
    """
    shape, constants, ratio = sizes.shape, rules().constants, ratio_of(request.prune)
    is_bfloat16 = config.bf16
    if is_bfloat16 is None:
        is_bfloat16 = not _is_there(device) or computes_bfloat16(device)
    dtype = dtype if is_bfloat16 else "float32"
    kept_in = "bfloat16" if is_bfloat16 and device.type != "cpu" else dtype
    held = weight_bytes(shape, dtype)
    smaller = held * (1 - ratio * shape.backbone_params / shape.total_params)
    models = smaller
    if config.needs_teacher:
        models = held + smaller * (config.train == "full")
    learning = learning_params(shape, ratio, config.train, config.lora_rank)
    if config.train == "full":
        models -= learning * BYTES[dtype]  # they are held among those that learn
    kept = 1 - sizes.decoder_share(ratio)
    of_token = sizes.token_bytes.get(kept_in, 0.0)
    if config.train == "lora":
        of_token += _lora_kept(shape, "float32" if device.type == "cpu" else kept_in)
    if config.gradient_checkpointing:
        of_token /= shape.num_layers
        of_token += shape.num_layers * shape.hidden_size * BYTES[dtype]
    batch = min(config.batch_size, sizes.learnt(config))
    activations = batch * sizes.tokens * of_token * kept
    beside = constants.learning_bytes * learning + activations
    logits = _logits_bytes(shape, device, _free(device) - models)
    return _own_bytes(device) + models + beside + logits


def _lora_kept(shape: Anatomy, dtype: str) -> float:
    """What LoRA keeps of a token: its inputs after dropout, and where these fell."""
    inputs = [
        5 * shape.hidden_size + layer.num_heads * layer.head_dim + layer.intermediate_size
        for layer in shape.layers
    ]
    return (BYTES[dtype] + 1.0) * sum(inputs)


def _logits_bytes(shape: Anatomy, device: torch.device, free: float) -> float:
    """The logits of a chunk of positions, and what becomes of them on the way to a loss."""
    rows = rows_at_once(device, round(free))
    return LOGITS_COPIES * BYTES["float32"] * rows * shape.vocab_size


def _pruning_flops(sizes: Sizes, request: Request) -> float:
    """Passes over the calibration samples, and the elimination of units."""
    config, constants = request.prune, rules().constants
    ratio = ratio_of(config)
    if config.data is None:
        return 0.0
    passes = 3.0 * sum(CRITERIA[name].capture.backward for name in config.criterion)
    if WALKING in config.criterion or config.repair != "none":
        passes += constants.walk_passes
    share = sizes.decoder_share(ratio)
    if config.local_steps is None:
        passes += 3 * PASSES * share
    elif config.local_steps:
        batches = max(sizes.calibration / CALIBRATION_BATCH, 1)
        passes += 3 * config.local_steps / batches
    passes += (2 - ratio) * request.report_samples / max(sizes.calibration, 1)
    flops = passes * sizes.pass_flops * sizes.calibration
    if WALKING in config.criterion:
        width = [layer.intermediate_size for layer in sizes.shape.layers]
        flops += sum(
            n**3 + share * n * n * (4 * sizes.shape.hidden_size + share * n) for n in width
        )
    return flops


def _decoder_params(shape: Anatomy) -> int:
    return sum(layer.params for layer in shape.layers)


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


def optimizer_steps(config: RecoverConfig, samples: int, gone: float) -> int:
    """Steps that training on so many samples takes, if such a share of the decoder went."""
    if config.max_steps > 0:
        return config.max_steps
    batches = -(-samples // config.batch_size)
    each = -(-batches // config.gradient_accumulation)
    return math.ceil(config.passes(samples, gone) * each)


def image_tokens(model: str, trust_remote_code: bool = False) -> int:
    """Tokens of a picture: patches of the tower, or fewer where a configuration says so."""
    config = load_config(model, trust_remote_code)
    vision = getattr(config, "vision_config", None)
    size, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    side, step = (value[0] if isinstance(value, list | tuple) else value for value in (size, patch))
    patches = (side // step) ** 2 if side and step else rules().constants.image_tokens
    return min(patches, getattr(config, "image_seq_length", None) or patches)


def seconds_of(flops: float, device: torch.device) -> float:
    """Estimate roughly how long so much work takes on a device."""
    return flops / _usable(device, torch.bfloat16)


def _usable(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that whole stages reach on a device."""
    return _efficiency(device.type) * device_flops(device, dtype)


def _efficiency(kind: str) -> float:
    shares = rules().constants.efficiency
    return shares.get(kind, shares["cuda"])


def _speed(device: torch.device, dtype: str) -> tuple[float, str]:
    """FLOP/s that whole stages reach in a data type, and where that number comes from."""
    constants = rules().constants
    if not _is_there(device):
        share = _efficiency("cuda")
        about = f"{constants.gpu} ({constants.gpu_source})"
        return share * constants.gpu_flops, f"{about}, {share:.0%} of it used"
    kind = getattr(torch, dtype)
    flops = device_flops(device, kind)
    about = f"this {device.type} at {flops / 1e9:,.0f} GFLOP/s in {dtype}, timed just now"
    return _usable(device, kind), f"{about}, {_efficiency(device.type):.0%} of it used"


@lru_cache(maxsize=4)
def device_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the FLOP/s of a matrix product on a device: the best of some tries.

    What else the machine does at times slows single tries. Matrices grow until a product takes a
    millisecond, so that starting it does not count. Where a device has no units for bfloat16, that
    of float32 counts for it.
    """
    if dtype != torch.float32 and not computes_bfloat16(device):
        dtype = torch.float32
    size, seconds = 512, 0.0
    while seconds < 1e-3 and size < 8192:
        size *= 2
        matrix = torch.ones(size, size, device=device, dtype=dtype)
        seconds = min(_seconds_of_product(matrix) for _ in range(_TRIES))
    return 2 * size**3 / seconds


_TRIES = 12


def _seconds_of_product(matrix: Tensor) -> float:
    start = time.perf_counter()
    float((matrix @ matrix)[0, 0])
    return time.perf_counter() - start
