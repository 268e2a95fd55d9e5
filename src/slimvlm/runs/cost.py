"""Estimate what a recipe needs in memory, work and time, before weights are read.

Work is counted in FLOP: two for each weight of the backbone that multiplies, and for each token;
and for images that of the vision tower and the projector (`slimvlm.models.cost`). Constants come
from ``recipes.yaml``, each with its source.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from slimvlm.core.options import HIDDEN_LOSSES, CalibrationConfig, RecoverConfig, Train
from slimvlm.evaluation.lmms import split_names
from slimvlm.evaluation.tasks import builtin_tasks, find_tasks
from slimvlm.models import load as loading
from slimvlm.models.anatomy import Anatomy, read_anatomy
from slimvlm.models.cost import BYTES, Picture, question_flops, weight_bytes
from slimvlm.models.devices import (
    computes_bfloat16,
    device_named,
    free_memory,
    load_of_others,
    usable_cores,
)
from slimvlm.models.losses import rows_at_once
from slimvlm.models.parts import Parts, text_config_of
from slimvlm.pruning.walk.engine import PASSES, aims_at_original
from slimvlm.pruning.walk.streams import most_kept
from slimvlm.pruning.walk.walk import WALKING, states_bytes
from slimvlm.runs.chart import rules
from slimvlm.runs.recipe import Recipe
from slimvlm.scoring.criteria import CRITERIA
from slimvlm.scoring.stores import StatesPlace

CALIBRATION_BATCH = 4  # calibration samples in a batch
TRIAL_SHARE = 1 / 6  # share of a training that an axis is tried with
LOGITS_COPIES = 3  # tensors as large as a chunk's logits that a loss and its gradient hold at once
_UNLIMITED = 2.0**50  # free bytes of a device that is not here


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of the model and the data, for an estimate."""

    shape: Anatomy  # of the unpruned model
    tokens: float  # mean of a sample, image tokens included
    samples: int  # training samples
    longest: tuple[float, float] = (0.0, 0.0)  # length of those to calibrate and to train on
    calibration: int = CalibrationConfig().samples  # calibration samples
    token_bytes: Mapping[str, float] = field(default_factory=dict)  # `kept_bytes` by data type
    vocabulary: int | None = None  # tokens of the pruned model; None for all
    beside: float = 0.0  # `bytes_of_picture` of a sample's images
    picture: Picture = field(default_factory=Picture)  # a usual image
    images: float = 0.0  # of a sample, on average

    @property
    def pass_flops(self) -> float:
        """FLOP of a sample's forward pass through the whole model."""
        return self.backbone_flops + self.picture_flops

    @property
    def picture_flops(self) -> float:
        """FLOP of tower and projector for a sample's images."""
        return self.images * sum(question_flops(self.shape, self.picture)[:2])

    @property
    def backbone_flops(self) -> float:
        """FLOP of a sample in the backbone; embeddings do not count, as they only look up."""
        looked_up = self.shape.embedding_params if self.shape.head_params else 0
        taken, mixed = self.shape.experts_per_token, (s for s in self.shape.layers if s.num_experts)
        idle = sum((layer.num_experts - taken) * layer.expert_params for layer in mixed)
        return 2 * (self.shape.backbone_params - looked_up - idle) * self.tokens

    @property
    def token_share(self) -> float:
        """Share of the backbone removed with its tokens."""
        gone = self.shape.vocab_size - (self.vocabulary or self.shape.vocab_size)
        return gone * self.shape.token_params / self.shape.backbone_params

    def decoder_share(self, ratio: float) -> float:
        """Share of the decoder layers that is removed with a share of the backbone."""
        rest = max(ratio - self.token_share, 0.0) * self.shape.backbone_params
        return min(rest / sum(layer.params for layer in self.shape.layers), 1.0)

    def learnt(self, config: RecoverConfig) -> int:
        """Count the samples that a training reads."""
        return max(round(self.samples * config.fraction), 1)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Estimated memory and time of a recipe; on a CPU the time is that of an idle one."""

    calibration_bytes: float  # peak of choosing, cutting, repairing and writing, on the device
    pruning_hours: float = 0.0
    training_bytes: float = 0.0  # peak of recovery on the device, 0 without
    training_hours: float = 0.0
    questions_hours: float = 0.0  # of asking both models, 0 without tasks
    samples: int = 0  # training samples
    hidden_states: str = ""  # size and place in a walk; empty where the device is absent
    load: str = ""  # how much longer it takes beside other work; empty if hardly longer
    rests_on: tuple[str, ...] = ()  # assumptions and their sources


def cost(recipe: Recipe, sizes: Sizes, device: torch.device, dtype: str, tried: int = 0) -> Cost:
    """Estimate memory and time of a recipe, in which ``tried`` axes are tried first."""
    known, config = rules(), recipe.recover
    is_cpu, left = device.type == "cpu", 1 - recipe.size
    peak, states = _pruning_bytes(recipe, sizes, device, dtype)
    speed, timed = speed_of(device, dtype)
    shape, on_images = sizes.shape, sizes.picture_flops / max(sizes.pass_flops, 1.0)
    brief = replace(recipe, local_steps=0, test_samples=0)
    work = stage_flops("calibrate", recipe, sizes) + stage_flops("prune", recipe, sizes)
    again = replace(sizes, images=0.0)  # with the same scores and features of images
    work += tried * stage_flops("prune", brief, again)
    asking = 0.0
    if recipe.tasks is not None:
        alone = replace(recipe, floors=False)
        asking = stage_flops("evaluate", recipe, sizes)
        asking += stage_flops("evaluate", alone, sizes, left)
    about = [
        f"memory of {device}" + ", the process among it" * is_cpu,
        known.notes["pruning_memory"].format(constants=known.constants),
        f"time: {timed}; {sizes.tokens:.0f} tokens per sample, images {on_images:.0%} of its work",
    ]
    if shape.vision_params and shape.tower is None:
        about.append(known.notes["tower"])
    training: dict[str, Any] = {}
    if config is not None:
        told = {"kept": sizes.token_bytes.get(dtype, 0.0) / 1000, "batch": config.batch_size}
        about.append(known.notes["training_memory"].format(constants=known.constants, **told))
        flops = stage_flops("recover", recipe, sizes, left)
        learning, _ = speed_of(device, "float32" if config.bf16 is False else "bfloat16")
        training = {
            "training_bytes": _training_bytes(recipe, config, sizes, device, dtype),
            "training_hours": (1 + tried * TRIAL_SHARE) * flops / (3600 * learning),
            "samples": sizes.learnt(config),
        }
    return Cost(
        calibration_bytes=peak,
        pruning_hours=work / (3600 * speed),
        hidden_states=str(states or "") if _is_here(device) else "",
        questions_hours=asking / (3600 * speed),
        load=load_of_others() if is_cpu else "",
        rests_on=tuple(about),
        **training,
    )


def _pruning_bytes(
    recipe: Recipe, sizes: Sizes, device: torch.device, dtype: str
) -> tuple[float, StatesPlace | None]:
    """Estimate the largest of the steps of pruning, up to the written model.

    Also return size and place of the hidden states between the layers of a walk.
    """
    constants, shape = rules().constants, sizes.shape
    ratio, is_cpu, is_here = recipe.size, device.type == "cpu", _is_here(device)
    room = free_memory(device) if is_here else _UNLIMITED
    held = weight_bytes(shape, dtype)
    smaller = held * _left(recipe, shape)
    free = max(room - held, 0.0)
    largest = max(shape.layers, key=lambda layer: layer.params)
    longest = max(sizes.longest[0], sizes.tokens)
    batch = CALIBRATION_BATCH * longest * sizes.token_bytes.get(dtype, 0.0)
    steps: list[float] = [held]
    if is_cpu:
        steps.append(2 * smaller)  # while it is read back
    elif smaller <= free:
        steps.append(held + smaller)  # while both are timed
    states = None
    if recipe.data is not None and _is_walked(recipe):
        aims = aims_at_original(recipe.repair, recipe.local_steps, recipe.axis != "width")
        tokens = sizes.tokens * sizes.calibration
        needed = states_bytes(shape.hidden_size, tokens, BYTES[dtype], aims)
        needed += sizes.calibration * sizes.beside + tokens * longest  # and a mask of each batch
        elsewhere = StatesPlace(needed, device, "device", (0, 0))
        states = StatesPlace.of(needed, device, held) if is_here else elsewhere
        are_here = states.kind == "device" or (is_cpu and states.kind == "host")
        layers = sum(layer.params for layer in shape.layers)
        new = (1 - sizes.decoder_share(ratio)) * layers * BYTES[dtype]
        channels = (largest.num_heads * largest.head_dim, largest.intermediate_size)
        is_walking = WALKING in recipe.criterion
        grams = is_walking * constants.gram_copies * BYTES["float32"] * max(channels) ** 2
        most = most_kept(free) if are_here or is_cpu else 0.0
        read = [tokens * count * BYTES[dtype] for count in channels]
        inputs = sum(each for each in read if each <= most)
        is_learning = recipe.local_steps != 0
        taken = max(shape.experts_per_token, 1) if largest.num_experts else 1
        # activations of a layer for the longest batch while it runs, and its attention scores
        of_layer = 4 * shape.hidden_size + 3 * taken * largest.intermediate_size
        running = (of_layer + largest.num_heads * longest) * CALIBRATION_BATCH * longest
        learning = is_learning * constants.learning_bytes * (1 - ratio) * largest.params
        learning += is_learning * batch / shape.num_layers
        more = max(grams + inputs + running * BYTES[dtype], learning)
        steps.append(held + states.needed * are_here + new * is_cpu + more)
    if any(CRITERIA[name].capture.backward for name in recipe.criterion):
        logits = (
            rows_at_once(device, round(free)) * LOGITS_COPIES * BYTES["float32"] * shape.vocab_size
        )
        steps.append(held + batch + largest.params * BYTES[dtype] + logits)
    return float(constants.process_bytes * is_cpu + max(steps)), states


def _left(recipe: Recipe, shape: Anatomy) -> float:
    """Return the share of a model's parameters that a recipe leaves."""
    gone = recipe.size * shape.backbone_params + recipe.tower_ratio * shape.vision_params
    return 1 - gone / shape.total_params


def _training_bytes(
    recipe: Recipe, config: RecoverConfig, sizes: Sizes, device: torch.device, dtype: str
) -> float:
    """Estimate the peak of training: weights, learning parameters, activations, logits."""
    constants, shape, ratio = rules().constants, sizes.shape, recipe.size
    is_cpu, is_here = device.type == "cpu", _is_here(device)
    is_bfloat16 = config.bf16
    if is_bfloat16 is None:
        is_bfloat16 = not is_here or computes_bfloat16(device)
    held_in = dtype if is_bfloat16 else "float32"
    # on a CPU, attention that keeps its scores makes up for activations in bfloat16
    kept_in = "bfloat16" if is_bfloat16 and not is_cpu else held_in
    held = weight_bytes(shape, held_in)
    smaller = held * _left(recipe, shape)
    # a teacher shares the weights that stay frozen
    models = held + smaller * (config.besides_tower == "full") if config.needs_teacher else smaller
    if config.needs_teacher and (recipe.tower_ratio or config.train != config.besides_tower):
        models += (1 - recipe.tower_ratio) * shape.vision_params * BYTES[held_in]  # of the student
    learn = learning_params(shape, ratio, config.train, config.lora_rank)
    if config.besides_tower == "full":
        models -= learn * BYTES[held_in]  # they are held among those that learn
    of_token = sizes.token_bytes.get(kept_in, 0.0)
    if config.train == "lora":  # keeps its inputs after dropout, and where these fell
        each = BYTES["float32" if is_cpu else kept_in] + 1.0
        of_token += each * sum(
            5 * shape.hidden_size + layer.num_heads * layer.head_dim + layer.intermediate_size
            for layer in shape.layers
        )
    if config.gradient_checkpointing:
        of_token /= shape.num_layers
        of_token += shape.num_layers * shape.hidden_size * BYTES[held_in]
    if config.loss_weights.keys() & set(HIDDEN_LOSSES):  # both models' states, where compared
        compared = 1 if "sft" in config.loss_weights else 1 + shape.num_layers
        of_token += 2 * compared * shape.hidden_size * BYTES[kept_in]
    batch = min(config.batch_size, sizes.learnt(config))
    longest = max(sizes.longest[1], sizes.tokens)
    activations = batch * longest * of_token * (1 - sizes.decoder_share(ratio))
    room = free_memory(device) if is_here else _UNLIMITED
    logits = (
        rows_at_once(device, round(room - models))
        * LOGITS_COPIES
        * BYTES["float32"]
        * shape.vocab_size
    )
    beside = constants.learning_bytes * learn + activations
    return float(constants.process_bytes * is_cpu + models + beside + logits)


def stage_flops(kind: str, recipe: Recipe, sizes: Sizes, kept: float = 1.0) -> float:
    """Estimate the FLOP of a stage; of a model to train or ask, a share ``kept`` is left."""
    recover, constants = recipe.recover, rules().constants
    if kind == "calibrate":
        passes = float(sum(CRITERIA[name].capture.passes for name in recipe.scored_by))
        seen = sizes.calibration * (passes > 0)  # features are computed once
        return passes * sizes.backbone_flops * sizes.calibration + sizes.picture_flops * seen
    if kind == "prune":
        if recipe.data is None:
            return 0.0
        ratio = recipe.size
        share = sizes.decoder_share(ratio)
        passes = constants.walk_passes if _is_walked(recipe) else 0.0
        if recipe.local_steps is None:
            passes += 3 * PASSES * share
        elif recipe.local_steps:
            passes += 3 * recipe.local_steps / max(sizes.calibration / CALIBRATION_BATCH, 1)
        passes += (2 - ratio) * recipe.test_samples / max(sizes.calibration, 1)
        flops = passes * sizes.backbone_flops * sizes.calibration
        flops += sizes.picture_flops * (sizes.calibration + 2 * recipe.test_samples)
        if recipe.tower_ratio:  # its walk, which the answers to validation samples judge
            flops += constants.walk_passes * sizes.picture_flops * sizes.calibration
            flops += sizes.pass_flops * sizes.calibration / 2
        if WALKING in recipe.criterion:  # eliminates neurons one by one in the Gram matrix
            widths = [shape.intermediate_size for shape in sizes.shape.layers]
            hidden = sizes.shape.hidden_size
            flops += sum(n**3 + share * n * n * (4 * hidden + share * n) for n in widths)
        return flops
    if kind == "recover":
        assert recover is not None
        samples = sizes.learnt(recover)
        steps = optimizer_steps(recover, samples, sizes.decoder_share(1 - kept))
        batches = steps * recover.gradient_accumulation
        seen = batches * min(recover.batch_size, samples)
        passes = kept * (2 if recover.besides_tower == "projector" else 3) + recover.needs_teacher
        of_tower = 1 if recover.train == recover.besides_tower else 3
        towers = (1 - recipe.tower_ratio) * of_tower + recover.needs_teacher
        return (passes * sizes.backbone_flops + towers * sizes.picture_flops) * seen
    assert recipe.tasks is not None
    count = questions_of(recipe.tasks, recipe.limit) * (1 + recipe.floors)
    return count * float(kept * sizes.backbone_flops * constants.reply_passes + sizes.picture_flops)


@lru_cache(maxsize=64)
def questions_of(tasks: str, limit: int | None) -> int:
    """Count the questions of tasks: those of a file, of others the usual number."""
    constants, ours, (own, theirs) = rules().constants, builtin_tasks(), split_names(tasks)
    counts = [constants.benchmark_questions] * len(theirs)
    for task in find_tasks(own) if own else ():
        counts.append(constants.own_questions if task.name in ours else len(task.load(limit)))
    return sum(min(limit or count, count) for count in counts)


def optimizer_steps(config: RecoverConfig, samples: int, gone: float) -> int:
    """Count the optimizer steps of a training; ``gone`` is the share of the decoder removed."""
    if config.max_steps > 0:
        return config.max_steps
    batches = -(-samples // config.batch_size)
    each = -(-batches // config.gradient_accumulation)
    return math.ceil(config.epochs_over(samples, gone) * each)


def _is_here(device: torch.device) -> bool:
    """Whether this machine has a device; advice can be for another machine."""
    return device.type in ("cpu", device_named().type)


def _is_walked(recipe: Recipe) -> bool:
    return WALKING in recipe.criterion or recipe.repair != "none" or recipe.local_steps != 0


def learning_params(shape: Anatomy, ratio: float, train: Train, rank: int) -> int:
    """Count the parameters that learn, after a share ``ratio`` of the backbone was removed."""
    tower, part = shape.vision_params * train.endswith("+tower"), train.removesuffix("+tower")
    if part == "projector":
        return tower + shape.projector_params
    if part == "full":
        return tower + round((1 - ratio) * shape.backbone_params) + shape.projector_params
    channels, hidden = 0, shape.hidden_size  # inputs and outputs of all matrices
    for layer in shape.layers:
        queries, keys = layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
        channels += 2 * (hidden + queries) + 2 * (hidden + keys)
        channels += layer.neuron_params // hidden * (hidden + layer.intermediate_size)
    return shape.projector_params + round((1 - ratio) * rank * channels)


def kept_bytes(config: PreTrainedConfig, dtype: str) -> float:
    """Count the bytes that a backward pass keeps of a token, but for attention, on meta tensors."""
    kind, count = getattr(torch, dtype), 2
    model = loading.empty_model(config, kind)
    weights = {parameter.untyped_storage() for parameter in model.parameters()}
    kept: dict[torch.UntypedStorage, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if (storage := tensor.untyped_storage()) not in weights:
            kept[storage] = storage.nbytes()
        return tensor

    hidden = text_config_of(config).hidden_size
    inputs = torch.empty(1, count, hidden, dtype=kind, device="meta", requires_grad=True)
    mask = torch.empty(1, 1, count, count, dtype=torch.bool, device="meta")
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            Parts(model).text_model(inputs_embeds=inputs, attention_mask=mask, use_cache=False)
    # a family's code reads values: 12 values a channel, 4 a neuron, as Llama and Qwen2 keep
    except (RuntimeError, NotImplementedError):
        widths = [layer.intermediate_size for layer in read_anatomy(model).layers]
        return float(sum(12 * hidden + 4 * width for width in widths) * BYTES[dtype])
    return sum(kept.values()) / count


def bytes_of_picture(config: PreTrainedConfig, tokens: float, dtype: str) -> float:
    """Count the bytes that a walk keeps of a picture of so many tokens, beside hidden states."""
    vision, text = getattr(config, "vision_config", None), text_config_of(config)
    channels = text.hidden_size * BYTES[dtype]
    added = len(getattr(vision, "deepstack_visual_indexes", None) or ())  # and the tokens' places
    found: float = added * tokens * (channels + torch.int64.itemsize)
    if getattr(text, "cross_attention_layers", None) and vision is not None:
        patches = (vision.image_size // vision.patch_size) ** 2 + 1
        found += vision.max_num_tiles * patches * channels
    return found


def speed_of(device: torch.device, dtype: str) -> tuple[float, str]:
    """Estimate the FLOP/s that whole stages reach in a data type, and say what that rests on."""
    constants, shares = rules().constants, rules().constants.efficiency
    share = shares.get(device.type, shares["cuda"])
    if _is_here(device):
        flops = device_flops(device, getattr(torch, dtype))
        clock = "its processor time" if device.type == "cpu" else "a clock"
        about = f"this {device.type} at {flops / 1e9:,.0f} GFLOP/s in {dtype}, by {clock} just now"
    else:
        share, flops = shares["cuda"], constants.gpu_flops
        about = f"{constants.gpu} ({constants.gpu_source})"
    return share * flops, f"{about}, {share:.0%} of it used"


@lru_cache(maxsize=4)
def device_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the FLOP/s of a matrix product: the best of 12, as other work slows some."""
    # On a CPU it is that of one core in seconds of its own work, times the cores. So a busy machine
    # counts as an idle one, and no thread counts that waits for another one.
    if dtype != torch.float32 and not computes_bfloat16(device):
        dtype = torch.float32
    is_cpu, threads = device.type == "cpu", torch.get_num_threads()
    clock, cores = (time.thread_time, usable_cores()) if is_cpu else (time.perf_counter, 1.0)
    enough = 1e-2 if is_cpu else 1e-3  # seconds, so that a launch or an interrupt counts little
    size, seconds = 512, 0.0
    try:
        torch.set_num_threads(1 if is_cpu else threads)
        while seconds < enough and size < 8192:
            size *= 2
            matrix, seconds = torch.ones(size, size, device=device, dtype=dtype), math.inf
            for _ in range(12):
                start = clock()
                float((matrix @ matrix)[0, 0])  # reading a value waits for the device
                seconds = min(seconds, clock() - start)
    finally:
        torch.set_num_threads(threads)
    return cores * 2 * size**3 / seconds
