"""The options of every stage, each with its meaning and its allowed values in one place."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from slimvlm.core.errors import ConfigError

Axis = Literal["depth", "width", "both"]
Unit = Literal["kv_group", "neuron"]
Allocation = Literal["uniform", "balanced", "protect", "global", "search"]
Gradient = Literal["batch", "per_sample"]
Repair = Literal["none", "width", "depth", "both", "auto"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Train = Literal["projector", "lora", "full"]
HiddenLayers = Literal["final", "mapped"]
TeacherWeights = Literal["auto", "shared", "separate"]
Scheduler = Literal[
    "cosine", "linear", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"
]
LOSS_NAMES = ("sft", "hidden", "cosine", "kl", "rkl", "jsd")
_CHOICES = {
    "kd_on": ("answer", "text", "all"),
    "hidden_layers": get_args(HiddenLayers),
    "teacher_weights": get_args(TeacherWeights),
    "scheduler": get_args(Scheduler),
}
_PRUNE_CHOICES = {
    "axis": (None, *get_args(Axis)),
    "allocation": get_args(Allocation),
    "repair": get_args(Repair),
}
_Range = tuple[Callable[[float], bool], str]
_ABOVE_0: _Range = (lambda value: 0 < value < math.inf, "above 0")
_SHARE: _Range = (lambda value: 0 <= value < 1, "at least 0 and below 1")
_RANGES: dict[str, _Range] = {
    "fraction": (lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "max_steps": (lambda value: value == -1 or value > 0, "above 0, or -1 for no limit"),
    "jsd_beta": (lambda value: 0 < value < 1, "above 0 and below 1"),
    "max_grad_norm": (lambda value: 0 <= value < math.inf, "at least 0"),
    "seed": (lambda value: 0 <= value < 2**32, "at least 0 and below 2**32"),
    **dict.fromkeys(("warmup_ratio", "weight_decay", "lora_dropout", "eval_fraction"), _SHARE),
    **dict.fromkeys(
        (
            *("epochs", "learning_rate", "batch_size", "gradient_accumulation"),
            *("lora_rank", "lora_alpha", "temperature", "top_k"),
            *("eval_steps", "save_steps", "logging_steps"),
        ),
        _ABOVE_0,
    ),
}


def parse_loss(expression: str) -> dict[str, float]:
    """Read a weighted sum of losses: ``sft+hidden`` or ``0.7*sft+0.3*hidden``.

    Terms without a weight share what is left of 1 equally, so ``sft+hidden`` is the study's
    0.5/0.5.

    Raises:
        ConfigError: If a name is unknown or repeated, or a weight is not positive.
    """
    weights: dict[str, float | None] = {}
    for term in expression.replace(" ", "").split("+"):
        match = re.fullmatch(r"(?:(\d+\.?\d*(?:e-?\d+)?)\*)?([a-z]+)", term)
        name = match[2] if match else term
        if match is None or name not in LOSS_NAMES or name in weights:
            raise ConfigError(
                f"loss {expression!r}: term {term!r} must be one of {', '.join(LOSS_NAMES)}, once, "
                "with an optional weight such as 0.5*sft"
            )
        weights[name] = float(match[1]) if match[1] else None
    free = [name for name, weight in weights.items() if weight is None]
    rest = 1.0 - sum(weight for weight in weights.values() if weight is not None)
    if any(weight == 0 for weight in weights.values()):
        raise ConfigError(f"loss {expression!r}: every term needs a weight above 0")
    if free and rest <= 0:
        raise ConfigError(
            f"loss {expression!r}: {free[0]!r} needs a weight; the others leave nothing of 1 for it"
        )
    return {n: rest / len(free) if w is None else w for n, w in weights.items()}


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How to train, whatever learns and from which loss.

    Raises:
        ConfigError: If a value is out of range; the message names the field.
    """

    fraction: float = 1.0
    """Share of the data to use: a seeded subset, recorded with the run."""
    epochs: float = 1.0
    """Passes over that share."""
    max_steps: int = -1
    """Stop after so many optimizer steps; -1 for no limit."""
    learning_rate: float = 2e-4
    """Peak learning rate of AdamW."""
    scheduler: Scheduler = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup_ratio: float = 0.03
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = 0.0
    """AdamW weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 leaves them."""
    batch_size: int = 8
    """Samples in a step on each device."""
    gradient_accumulation: int = 1
    """Steps whose gradients are added before the optimizer moves."""
    group_by_length: bool = False
    """Put samples of similar length into a batch, for less padding."""
    lora_rank: int = 64
    """Rank of the LoRA matrices."""
    lora_alpha: int = 128
    """LoRA scale is alpha / rank."""
    lora_dropout: float = 0.05
    """Dropout before the LoRA matrices."""
    lora_targets: str = ".*"
    """Matrices of a decoder layer that get LoRA: a regular expression, such as self_attn.*"""
    temperature: float = 2.0
    """Temperature of kl, rkl and jsd."""
    jsd_beta: float = 0.5
    """Weight of the teacher in jsd's mixture; towards 0 it acts like kl, towards 1 like rkl."""
    top_k: int | None = None
    """Compare only the teacher's so many likeliest tokens in kl, rkl and jsd; by default all."""
    hidden_layers: HiddenLayers = "final"
    """Where hidden and cosine compare: after the last norm, or also after every kept layer."""
    teacher_weights: TeacherWeights = "auto"
    """Teacher and student in one set of weights, or in two; auto shares where that is exact."""
    student_projector_in_teacher: bool = False
    """Feed the teacher through the student's projector, as the study does; else through its own."""
    kd_on: Literal["answer", "text", "all"] = "answer"
    """Positions that distillation compares: answers, all text, or images too; never padding."""
    paper_exact: bool = False
    """Reduce all losses but sft as the study's trainer does: over every position."""
    bf16: bool | None = None
    """bfloat16 autocast; by default where the device computes it natively."""
    gradient_checkpointing: bool = False
    """Trade time for activation memory."""
    eval_fraction: float = 0.0
    """Share of the data that is held out to measure the loss on, the same for every fraction."""
    eval_steps: int | None = None
    """Steps between measurements of the held-out loss; by default save_steps."""
    load_best: bool = False
    """End with the checkpoint whose held-out loss was lowest, not with the last one."""
    save_steps: int = 200
    """Steps between resumable checkpoints; with load_best there is one at each measurement."""
    logging_steps: int = 10
    """Steps between log lines."""
    report_to: str = "none"
    """Where the Trainer logs to, comma-separated: wandb, tensorboard, trackio, ... or none."""
    seed: int = 0
    """Seed of the data order, the subset and LoRA's initial values."""

    def __post_init__(self) -> None:
        _check_choices(self, _CHOICES)
        try:
            re.compile(self.lora_targets)
        except re.error as error:
            raise ConfigError(f"lora_targets {self.lora_targets!r}: {error}") from error
        for name, (is_legal, meaning) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not is_legal(value):
                raise ConfigError(f"{name} {value} must be {meaning}")
        for name in ("load_best", "eval_steps"):
            if getattr(self, name) and not self.eval_fraction:
                raise ConfigError(f"{name} {getattr(self, name)} needs an eval_fraction above 0")


@dataclass(frozen=True, kw_only=True)
class RecoverConfig(TrainingConfig):
    """How to train after pruning.

    Raises:
        ConfigError: If a value is out of range; the message names the field.
    """

    train: Train = "lora"
    """What learns: the projector, LoRA on the backbone plus the projector, or all but the tower."""
    loss: str = "sft+hidden"
    """Weighted sum of sft, hidden (L2 of hidden states), cosine (their angle), kl, rkl and jsd."""
    keep_adapter: bool = False
    """Keep the LoRA matrices as an adapter beside the merged model."""

    def __post_init__(self) -> None:
        parse_loss(self.loss)
        _check_choices(self, {"train": get_args(Train)})
        super().__post_init__()
        if self.keep_adapter and self.train != "lora":
            raise ConfigError(f"keep_adapter True needs train 'lora', not {self.train!r}")

    @property
    def reads_logits(self) -> bool:
        """Whether the loss looks at what the head says."""
        return bool(self.loss_weights.keys() - {"hidden", "cosine"})

    @property
    def loss_weights(self) -> dict[str, float]:
        """The loss as weights by name."""
        return parse_loss(self.loss)

    @property
    def needs_teacher(self) -> bool:
        """Whether the loss compares with the original model: any but sft alone."""
        return set(self.loss_weights) != {"sft"}


def _check_choices(config: object, choices: Mapping[str, tuple[str | None, ...]]) -> None:
    for name, allowed in choices.items():
        value = getattr(config, name)
        if value not in allowed:
            names = ", ".join(choice for choice in allowed if choice is not None)
            raise ConfigError(f"{name} {value!r} must be one of: {names}")


def _require_at_least_1(config: object, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise ConfigError(f"{name} {getattr(config, name)} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class LoadConfig:
    """How models are read."""

    dtype: Dtype = "auto"
    """Data type of the weights."""
    trust_remote_code: bool = False
    """Run code that lies in the checkpoint."""


@dataclass(frozen=True, kw_only=True)
class DataConfig(LoadConfig):
    """Which conversations are read, and with which model."""

    data: str | None = None
    """Conversations: demo, LLaVA-format .json, or .jsonl/.parquet/datasets folder with messages."""
    images: str | None = None
    """Folder that image paths in the data start from."""
    max_bad: int = 0
    """Broken data rows to skip at most."""
    max_length: int | None = None
    """Tokens of a sample at most, those of pictures included; longer ones are broken rows."""

    @property
    def reading(self) -> dict[str, Any]:
        """These options alone, without those of a configuration that has more."""
        return {field.name: getattr(self, field.name) for field in fields(DataConfig)}


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig(DataConfig):
    """What is shown to a model that is to be scored.

    Raises:
        ConfigError: If a value is out of range; the message names the field.
    """

    samples: int = 64
    """Calibration samples, the first ones of the data."""
    gradient: Gradient = "per_sample"
    """For taylor: one gradient over all samples, or one for each."""
    token_weights: str | None = None
    """Weight of tokens in calibration by role, such as image=0.1,prompt=1,answer=1."""

    def __post_init__(self) -> None:
        _check_choices(self, {"gradient": get_args(Gradient), "dtype": get_args(Dtype)})
        _require_at_least_1(self, "samples")


@dataclass(frozen=True, kw_only=True)
class PruneConfig(CalibrationConfig):
    """What to remove, and how to choose and to mend.

    Raises:
        ConfigError: If a value is out of range; the message names the field.
    """

    ratio: float | None = None
    """Share of the backbone's parameters to remove."""
    axis: Axis | None = None
    """Remove layers, KV groups and neurons, or both."""
    criterion: tuple[str, ...] = ()
    """How to score, one criterion for each kind of unit; by default what measured best."""
    allocation: Allocation = "balanced"
    """How widths share the ratio: the same in every layer, with KV groups and neurons in
    proportion (uniform) or as measured (balanced); first and last layers whole (protect); by one
    ranking (global) or a search over layers. The last two give files with code."""
    units: tuple[Unit, ...] = ("kv_group", "neuron")
    """What width may remove."""
    protect: tuple[int, int] = (0, 0)
    """First and last layers to leave whole."""
    steps: int = 1
    """Score, remove a part, and repeat so many times."""
    search_passes: int = 200
    """Plans that a search measures at most; each is one pass over held-out samples."""
    repair: Repair = "none"
    """Fit the remaining weights in closed form: widths, seams of removed layers, both, or auto,
    which keeps what helps on held-out answers."""
    pad: bool = False
    """Fill layers of different widths up with zeros: loads without code, as large as the widest."""
    compat: bool = False
    """Write files that transformers 4.57 and 5.0 load right, too."""
    round_to: int | None = None
    """Multiple for the number of neurons; default 128, smaller for small models."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_choices(self, _PRUNE_CHOICES)
        _require_at_least_1(self, "steps", "search_passes")
        if not self.units or set(self.units) - set(get_args(Unit)):
            raise ConfigError(f"units {self.units} must be of: {', '.join(get_args(Unit))}")
        if self.steps > 1 and self.allocation == "search":
            raise ConfigError(f"steps {self.steps} cannot be combined with allocation 'search'")

    @property
    def trains(self) -> bool:
        """Whether training is to follow: pruning alone leaves that open where there is data."""
        return self.data is not None

    @property
    def needs_held_out(self) -> bool:
        """Whether some calibration samples are set aside to judge plans and repairs on."""
        return self.allocation in ("balanced", "search") or self.repair == "auto"


@dataclass(frozen=True, kw_only=True)
class CompressConfig(PruneConfig):
    """Everything a run depends on; written into the run folder and compared when it goes on."""

    repair: Repair = "auto"
    """Fit the remaining weights in closed form: widths, seams of removed layers, both, or auto,
    which keeps what helps on held-out answers and does nothing without data."""
    training_samples: int | None = None
    """Use only so many further samples of the data for recovery."""
    recover: RecoverConfig | None = None
    """Recovery options; None for no recovery."""

    tasks: str | None = None
    """Tasks to evaluate on, comma-separated; none if not given."""
    limit: int | None = None
    """Only the first so many questions of each task."""
    baseline: str | None = None
    """Result file of the original model, to save asking it again."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recover is not None and self.recover.keep_adapter:
            raise ConfigError(
                "keep_adapter True: compress writes merged weights alone; use recover"
            )

    @property
    def trains(self) -> bool:
        """Whether training follows."""
        return self.data is not None and self.recover is not None


MIN_NEW_TOKENS = 3


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is timed.

    Raises:
        ConfigError: If a value is out of range; the message names the field.
    """

    prompt_tokens: int = 512
    """Length of every prompt; a picture counts with the tokens that it takes."""
    new_tokens: int = 32
    """Length of every answer."""
    batch_sizes: tuple[int, ...] = (1, 16)
    """Prompts that are answered at once; each number is timed."""
    repeats: int = 5
    """Measured runs of each model at each batch size, after one to warm up."""

    def __post_init__(self) -> None:
        lowest = {"prompt_tokens": 1, "new_tokens": MIN_NEW_TOKENS, "repeats": 1}
        for name, least in lowest.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{name} {getattr(self, name)} must be at least {least}")
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ConfigError(f"batch_sizes {self.batch_sizes} must be numbers of at least 1")


def compress_command(model: str, config: CompressConfig, out: str | Path) -> str:
    """The ``slimvlm compress`` command for a run.

    Options with their default values are left out, but for those that the recipe of the ratio
    chooses: a later recipe must not change what the command does.

    Args:
        model: Folder, hub id or ``demo``.
        config: The run's configuration.
        out: Its folder.
    """
    words = ["slimvlm", "compress", model, *_options(config, RECIPE)]
    if config.recover is not None:
        words += _options(config.recover, RECIPE)
    elif config.data is not None:
        words += ["--train", "none"]
    return shlex.join([*words, "--out", str(out)])


RECIPE = ("axis", "train", "loss")
"""Options that a recipe chooses when they are not given."""


def _options(config: Any, always: tuple[str, ...]) -> Iterator[str]:
    for field in fields(config):
        value = getattr(config, field.name)
        if value is None or isinstance(value, RecoverConfig):
            continue
        if value == field.default and field.name not in always:
            continue
        yield f"--{field.name.replace('_', '-')}"
        if value is True and field.default is False:
            continue
        values = value if isinstance(value, tuple) else (value,)
        yield from map(str, values)
