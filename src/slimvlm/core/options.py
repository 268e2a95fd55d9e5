"""Declare every option of every stage once: name, type, default, allowed values, help.

The command line, Python, studies and recipes read these classes. A field's type says which values
are allowed: any other raises a `ConfigError` that names option, value and what is allowed. The text
below a field is the help of the command line, where those in ``without_flag`` have no flag.
"""

import math
import re
from collections.abc import Callable, Container, Mapping
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path, PurePath
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    TypeVar,
    dataclass_transform,
    get_args,
)

from pydantic import BeforeValidator, ConfigDict, GetCoreSchemaHandler, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from slimvlm.core.errors import ConfigError, first_mistake, shortened
from slimvlm.core.files import beside
from slimvlm.core.tables import read_table

T = TypeVar("T", bound="Options")

MOST = 2**53  # numbers below it are exact in every file and every library


@dataclass(frozen=True)
class Range:
    """The numbers that an option may have, as a part of its type."""

    holds: Callable[[float], bool]
    meaning: str  # continues "must be"

    def __get_pydantic_core_schema__(self, kind: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.require, handler(kind))

    def require(self, value: Any) -> Any:
        """Refuse a number outside the range; what is no number passes."""
        if isinstance(value, int) and abs(value) >= MOST:
            raise PydanticCustomError("range", "must be below 2**53")
        if not isinstance(value, str | None) and not self.holds(value):
            raise PydanticCustomError("range", f"must be {self.meaning}")
        return value


ABOVE_0 = Range(lambda value: 0 < value < math.inf, "above 0")
AT_LEAST_0 = Range(lambda value: 0 <= value < math.inf, "at least 0")
AT_LEAST_1 = Range(lambda value: value >= 1, "at least 1")
SHARE = Range(lambda value: 0 <= value < 1, "at least 0 and below 1")
FRACTION = Range(lambda value: 0 < value <= 1, "above 0 and at most 1")
INSIDE = Range(lambda value: 0 < value < 1, "above 0 and below 1")
STEPS = Range(lambda value: value == -1 or value > 0, "above 0, or -1 for no limit")
SEED = Range(lambda value: 0 <= value < 2**32, "at least 0 and below 2**32")
MIN_NEW_TOKENS = 3
ENOUGH_TOKENS = Range(lambda value: value >= MIN_NEW_TOKENS, f"at least {MIN_NEW_TOKENS}")


def listed(value: Any) -> tuple[Any, ...]:
    """Return several values, or a single one, as a tuple."""
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _text(value: Any) -> Any:
    return str(value) if isinstance(value, PurePath) else value


Text = Annotated[str, BeforeValidator(_text)]  # a folder, a file or a hub id
Place = Annotated[Path, BeforeValidator(lambda v: Path(v) if isinstance(v, str) else v)]
Texts = Annotated[tuple[str, ...], BeforeValidator(listed)]


def _plain(value: Any) -> Any:
    """Return numbers of numpy as Python's."""
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    return value.item() if type(value).__module__ == "numpy" and value.ndim == 0 else value


class _Checked(type):
    """Classes whose construction raises a ConfigError for a wrong value."""

    def __call__(cls, *values: Any, **named: Any) -> Any:
        try:
            return super().__call__(*values, **{name: _plain(v) for name, v in named.items()})
        except ValidationError as error:
            raise ConfigError(first_mistake(cls, error)) from error


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field,))
class Options(metaclass=_Checked):
    """A group of options. Subclasses are frozen dataclasses whose values pydantic checks."""

    flags: ClassVar[Mapping[str, str]] = {}  # of options whose flag has another name

    def __init_subclass__(cls) -> None:
        config = ConfigDict(strict=True, extra="forbid", defer_build=True)
        checked_dataclass(frozen=True, kw_only=True, config=config)(cls)

    def __post_init__(self) -> None:
        """Check options against one another; each class calls those of its bases."""

    def given(self, names: Container[str] | None = None) -> dict[str, Any]:
        """Take those of some options, or of all, that differ from their defaults."""
        found = {}
        for row in fields(self):  # type: ignore[arg-type]
            default = row.default if row.default_factory is MISSING else row.default_factory()
            if (names is None or row.name in names) and getattr(self, row.name) != default:
                found[row.name] = getattr(self, row.name)
        return found

    def refuse(self, names: Container[str], why: str) -> None:
        """Refuse options that differ from their defaults, but for nothing at all: say ``why``."""
        for name, value in self.given(names).items():
            if value not in (0, "none"):
                raise ConfigError(f"{name} {value!r} {why}")

    def part(self, kind: type[T]) -> T:
        """Take the options of a smaller group out of this one."""
        return kind(**{row.name: getattr(self, row.name) for row in fields(kind)})  # type: ignore[arg-type]


def file_only(kind: Any) -> set[str]:
    """List the options of a class that have no flag on the command line."""
    return set().union(*(vars(each).get("without_flag", ()) for each in kind.__mro__))


Axis = Literal["depth", "width", "both"]
AxisChoice = Literal["depth", "width", "both", "auto", "chart"]
Unit = Literal["kv_group", "neuron"]
Allocation = Literal["uniform", "balanced", "protect"]
Gradient = Literal["batch", "per_sample"]
OutType = Literal["f32", "f16", "bf16", "q8_0"]  # of GGUF files
Repair = Literal["none", "width", "depth", "both", "auto"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Attention = Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"]
DeviceMap = Literal["auto", "balanced", "balanced_low_0", "sequential"]
Train = Literal["projector", "lora", "full", "projector+tower", "full+tower"]
TrainOrNot = Literal["projector", "lora", "full", "projector+tower", "full+tower", "none"]
Positions = Literal["answer", "all"]
TooLong = Literal["error", "truncate"]

Divergence = Literal["kl", "rkl", "jsd"]
DIVERGENCES = get_args(Divergence)  # losses between next-token distributions
HIDDEN_LOSSES = ("hidden", "cosine")  # losses between hidden states
LOSS_NAMES = ("sft", *HIDDEN_LOSSES, *DIVERGENCES)
SAMPLES_READ, MAX_EPOCHS = 2200, 4.0
"""Samples that a training reads per removed share of the decoder, and epochs at most."""


def parse_loss(expression: str) -> dict[str, float]:
    """Read ``0.7*sft+0.3*hidden``; terms without a weight share what is left of 1 equally."""
    weights: dict[str, float | None] = {}
    for term in expression.replace(" ", "").split("+"):
        match = re.fullmatch(r"(?:(\d+\.?\d*(?:e-?\d+)?)\*)?([a-z]+)", term)
        name = match[2] if match else term
        if match is None or name not in LOSS_NAMES or name in weights:
            told = f"loss {expression!r}: term {term!r} must be one of {', '.join(LOSS_NAMES)}"
            raise ConfigError(f"{told}, once, with an optional weight such as 0.5*sft")
        weights[name] = float(match[1]) if match[1] else None
    free = [name for name, weight in weights.items() if weight is None]
    rest = 1.0 - sum(weight for weight in weights.values() if weight is not None)
    if any(weight == 0 for weight in weights.values()):
        raise ConfigError(f"loss {expression!r}: every term needs a weight above 0")
    if free and rest <= 0:
        told = f"loss {expression!r}: {free[0]!r} needs a weight"
        raise ConfigError(f"{told}; the others leave nothing of 1 for it")
    return {n: rest / len(free) if w is None else w for n, w in weights.items()}


class TrainingConfig(Options):
    """Training; the extended paper's decision chart gives what is left out."""

    without_flag = frozenset({"gradient_accumulation", "temperature", "bf16", "trainer", "lora"})
    train: TrainOrNot | None = None
    """Weights to train: the projector; LoRA on the backbone, plus the projector; full, all but the
    vision tower; projector or full with the tower; or none."""
    loss: str | None = None
    """Weighted sum of losses: sft, hidden (L2 distance of the final hidden states), cosine (their
    angle), kl, rkl, jsd."""
    fraction: Annotated[float, FRACTION] = 1.0
    """Share of the training data to use: a seeded subset, recorded with the run."""
    epochs: Annotated[float | None, ABOVE_0] = None
    """Training epochs. Default: 1; for --train full without sft in the loss, 2,200 samples times
    the removed share of the decoder, divided by the training samples: 1 to 4."""
    max_steps: Annotated[int, STEPS] = -1
    """Maximum number of optimizer steps; -1 for no limit."""
    learning_rate: Annotated[float | None, ABOVE_0] = None
    """Peak AdamW learning rate. Default: 2e-4; for --train full, 4e-4 times the removed share of
    the decoder, lower for wide models."""
    batch_size: Annotated[int, ABOVE_0] = 8
    """Samples per step and device."""
    gradient_accumulation: Annotated[int, ABOVE_0] = 1
    """Number of batches whose gradients are summed for one optimizer step."""
    lora_rank: Annotated[int, ABOVE_0] = 64
    """LoRA rank."""
    paper_exact: bool = False
    """Distil as the paper's trainer does: all losses but sft over every position, and the teacher
    uses the student's projector."""
    gradient_checkpointing: bool = False
    """Save activation memory at the cost of time: 11.4 instead of 16.7 GiB for a 3B model."""
    seed: Annotated[int, SEED] = 0
    """Random seed of the data order, the subset and LoRA's initial values."""
    temperature: Annotated[float, ABOVE_0] = 2.0
    """Softmax temperature of kl, rkl and jsd."""
    bf16: bool | None = None
    """bfloat16 autocast. Default: where the device supports it natively."""
    trainer: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Further arguments of transformers.TrainingArguments, such as {weight_decay: 0.05}."""
    lora: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Further arguments of peft.LoraConfig, such as {lora_alpha: 32}."""

    def __post_init__(self) -> None:
        if self.loss is not None:
            parse_loss(self.loss)
        _require_passable("trainer", self.trainer)
        _require_passable("lora", self.lora)


PASSED_ON: Mapping[str, Mapping[str, Any]] = read_table(__file__, "passed_on.yaml")
"""Arguments of other libraries, and the values that each may have, by the option with them."""


def _require_passable(option: str, values: Mapping[str, Any]) -> None:
    """Refuse keys and values that another library would refuse after weights are read, or obey."""
    known, ranges = PASSED_ON[option], {each.meaning: each for each in (ABOVE_0, AT_LEAST_0, SHARE)}
    for key, value in values.items():
        told, allowed = f"{option}: {shortened(str(key))[1:-1]} {shortened(value)}", known.get(key)
        if key not in known:
            raise ConfigError(f"{told} cannot be given. Known: {', '.join(known)}")
        if isinstance(allowed, str):
            fits = type(value) in (int, float) and value < 10**9 and ranges[allowed].holds(value)
            meaning = f"a number {allowed}, in YAML like 1.0e-2"
        elif allowed is not None:
            fits = value in allowed and type(value) in map(type, allowed)
            meaning = f"one of: {', '.join(map(str, allowed))}"
        else:
            meaning, fits = "names, or a regular expression", False
            with suppress(TypeError, re.error, RecursionError, OverflowError):
                fits = all(map(re.compile, [value] if isinstance(value, str) else value))
        if not fits:
            raise ConfigError(f"{told} must be {meaning}")


class RecoverConfig(TrainingConfig):
    """Recovery: what is trained after pruning, and on which loss."""

    train: Train = "lora"
    """Weights to train: the projector; LoRA on the backbone, plus the projector; full, all but the
    vision tower; or projector or full with the tower."""
    loss: str = "sft+hidden"
    keep_adapter: bool = False
    """Also keep the LoRA matrices as an adapter, next to the merged model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep_adapter and self.train != "lora":
            raise ConfigError(f"keep_adapter True needs train 'lora', not {self.train!r}")

    @property
    def besides_tower(self) -> str:
        """What is trained beside the vision tower."""
        return self.train.removesuffix("+tower")

    @property
    def positions(self) -> Positions:
        """The positions to compare: answers with sft in the loss, else all but padding."""
        return "answer" if "sft" in self.loss_weights else "all"

    def epochs_over(self, samples: int, removed: float) -> float:
        """Compute the epochs over so many samples, with a ``removed`` share of the decoder."""
        if self.epochs is not None:
            return self.epochs
        if self.besides_tower != "full" or "sft" in self.loss_weights:
            return 1.0
        return min(max(SAMPLES_READ * removed / samples, 1.0), MAX_EPOCHS)

    @property
    def loss_weights(self) -> dict[str, float]:
        """The loss as weights by name."""
        return parse_loss(self.loss)

    @property
    def needs_teacher(self) -> bool:
        """Whether the loss compares with the original model: any but sft alone."""
        return set(self.loss_weights) != {"sft"}


class DeviceOptions(Options):
    """Where models run."""

    # changes no result, so configurations that differ in it are equal
    device: str | None = field(default=None, compare=False)
    """Device to run on, such as cpu, cuda, cuda:1 or mps. Default: the accelerator that torch
    finds, else the CPU."""


class LoadConfig(DeviceOptions):
    """Model loading."""

    dtype: Dtype = "auto"
    """Data type of the weights."""
    trust_remote_code: bool = False
    """Run Python code from the checkpoint."""
    attn_implementation: Attention | None = field(default=None, compare=False)
    """Attention implementation. Default: the one that transformers chooses."""
    device_map: DeviceMap | None = field(default=None, compare=False)
    """Instead of a device: distribute the model over all GPUs, then host memory and disk. Not for
    training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.device_map is not None and self.device is not None:
            told = f"device_map {self.device_map!r} conflicts with device {self.device!r}"
            raise ConfigError(f"{told}: leave one of them out")


# options that change no result beyond rounding
NO_RESULT = tuple(row.name for row in fields(LoadConfig) if not row.compare)


class DataConfig(LoadConfig):
    """Data, and model loading."""

    data: Text | None = None
    """Training and calibration data: demo, .json (LLaVA), .jsonl, .parquet, a saved dataset folder
    or a Hub dataset id."""
    images: Text | None = None
    """Folder of the data's relative image paths. Default: the folder of the data."""
    max_bad_rows: Annotated[int, AT_LEAST_0] = 0
    """Maximum number of malformed rows to skip."""
    max_length: Annotated[int | None, AT_LEAST_1] = None
    """Maximum tokens per sample, image tokens included. Default: the model's context length."""
    too_long: TooLong = "error"
    """How to handle samples over the limit: error (count as bad rows) or truncate (drop final
    turns, then truncate the last answer; the number is reported)."""


class TrainingData(DataConfig):
    """Training data, and model loading."""

    data: Text = field()  # replaces the default of the base class


class RecoverData(TrainingData):
    """Training data, and model loading."""

    without_flag = frozenset({"attn_implementation", "device_map"})


class CalibrationConfig(DataConfig):
    """Calibration data, and how scores weigh it."""

    samples: Annotated[int, AT_LEAST_1] = 192
    """Number of calibration samples, drawn at random from the data."""
    seed: Annotated[int, SEED] = 0
    """Random seed of the calibration samples, random scores and training. The test samples are the
    same for all seeds."""
    general_text: Annotated[float | None, SHARE] = None
    """Share of general text in the calibration set: descriptions of the packages that slimvlm
    depends on. Default: 0.2 where weights are repaired, else 0."""
    gradient: Gradient = "per_sample"
    """For taylor: one gradient per batch or per sample."""
    token_weights: str | None = None
    """Token weights in calibration by role, such as image=0.1,prompt=1,answer=1."""


class RatioOptions(Options):
    """Target size as a ratio."""

    ratio: Annotated[float | None, SHARE] = None
    """Share of the backbone's parameters to remove."""


class TargetOptions(RatioOptions):
    """Target size."""

    target_params: str | None = None
    """Instead of a ratio: total parameters of the compressed model, such as 5B or 90M."""
    target_memory: str | None = None
    """Instead of a ratio: memory of the compressed model's weights, such as 8GiB, in --dtype
    (bfloat16 for auto)."""


class LatencyOptions(Options):
    """Target prefill time."""

    target_latency: Annotated[float | None, INSIDE] = None
    """Instead of a ratio: target prefill time as a share of the original's. The ratio is derived
    from the FLOPs of a question with an image, for each axis; compress also measures the share."""


class BudgetOptions(TargetOptions, LatencyOptions):
    """Target size or prefill time."""


class SizeOptions(RatioOptions):
    """Target size, and which units may be removed."""

    vocab_size: Annotated[int | Literal["auto", "all"] | None, AT_LEAST_1] = None
    """Vocabulary tokens to keep: a number, auto (as many as the data needs) or all. Special tokens,
    bytes and single characters always stay. Removed rows count towards --ratio. Default: all; where
    --axis is auto and the vocabulary is a large share of the model, a third of it is also tried."""
    vocab_text: Text | None = None
    """Text file, or a folder of text files, whose tokens count in addition to those of the data."""
    experts: Annotated[float, SHARE] = 0.0
    """Share of each layer's experts to remove. Removed experts count towards --ratio."""
    tower_ratio: Annotated[float, SHARE] = 0.0
    """Share of the vision tower's parameters to remove, in addition to --ratio: layers that nobody
    reads, then MLP neurons. With --target-latency and data, several shares are tried."""
    units: Annotated[tuple[Unit, ...], BeforeValidator(listed)] = ("kv_group", "neuron")
    """Units that the axis width may remove."""
    protect: Annotated[
        tuple[Annotated[int, AT_LEAST_0], Annotated[int, AT_LEAST_0]], BeforeValidator(listed)
    ] = (0, 0)
    """Number of first and last layers to leave unpruned."""
    round_to: Annotated[int | None, AT_LEAST_1] = None
    """Round the number of neurons to a multiple of this. Default: 128, less for small models."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vocab_text is not None and not self.trims_vocabulary:
            raise ConfigError(f"vocab_text {self.vocab_text!r} needs vocab_size, a number or auto")
        if not self.units:
            raise ConfigError(f"units {self.units} must be of: {', '.join(get_args(Unit))}")

    @property
    def trims_vocabulary(self) -> bool:
        """Whether vocabulary tokens are removed."""
        return self.vocab_size not in (None, "all")

    @property
    def tokens_first(self) -> bool:
        """Whether tokens, experts or parts of the tower are removed whatever the ratio."""
        return self.trims_vocabulary or self.experts > 0 or self.tower_ratio > 0

    @property
    def of_units(self) -> dict[str, Any]:
        """The options of units, by their names in `make_plan`."""
        names = ("units", "protect", "round_to", "experts", "tower_ratio")
        return {name: getattr(self, name) for name in names}


class PlanConfig(TargetOptions, SizeOptions, DeviceOptions):
    """How much to remove, and what."""

    dtype: Dtype = "auto"
    """Data type in which --target-memory counts."""
    axis: Axis = "width"
    """What to remove: depth (layers), width (KV groups, neurons) or both."""
    allocation: Literal["uniform", "protect"] = "uniform"
    """How layers share the ratio: uniform (equal widths), or protect (first and last layers stay
    unpruned; the checkpoint then contains code)."""
    kv_heads: Annotated[int | None, AT_LEAST_1] = None
    """KV groups to keep in every layer; neurons make up the rest of the ratio."""


class PruneConfig(CalibrationConfig, SizeOptions):
    """What to remove, how to choose it, and how to repair the rest."""

    axis: AxisChoice | None = None
    """What to remove: depth (layers), width (KV groups, neurons) or both. auto tries all three and
    takes the lowest validation loss; chart follows the extended paper: width without training.
    Default: auto in compress with training, else chart."""
    allocation: Allocation | None = None
    """How widths share the ratio: uniform (equal widths in every layer, KV groups and neurons in
    proportion), balanced (equal widths, KV groups against neurons by the error of a few layers) or
    protect (first and last layers stay unpruned; the checkpoint then contains code). Default:
    balanced with the criterion obs, else uniform."""
    criterion: Texts = ()
    """Scoring criteria, one per kind of unit. Default: those with the best measured results."""
    repair: Repair = "auto"
    """Least-squares update of the remaining weights: width, depth (the layer before each removed
    block), both, none, or auto (both, discarded if validation loss rises)."""
    local_steps: Annotated[int | None, AT_LEAST_0] = None
    """Distillation steps per layer, towards the original's output. Default with repair auto: ten
    epochs times the removed share of the decoder. 0 is faster but retains less."""


class MemoryOptions(Options):
    """Memory."""

    low_memory: bool = False
    """For models larger than memory: load one layer at a time, keep activations on disk, write the
    checkpoint piece by piece. The same command resumes a stopped run."""
    scratch: Place | None = None
    """Folder for these activations. Default: next to OUT."""

    def scratch_beside(self, out: Path) -> Path:
        """Return the folder for activations."""
        return self.scratch or beside(out, "scratch")


class Questions(Options):
    """Evaluation tasks."""

    tasks: str = "demo"
    """Comma-separated tasks: built-in ones (demo for all), your own YAML files, or the paper's
    benchmarks mme, pope, gqa, scienceqa_img, mmmu_val, ai2d, mathvista, docvqa (need
    slimvlm[eval])."""
    task_folder: Text | None = None
    """Folder with local copies of the benchmarks' task files."""
    limit: Annotated[int | None, AT_LEAST_1] = None
    """Maximum number of questions per task."""
    batch_size: Annotated[int, AT_LEAST_1] = 16
    """Questions per batch."""
    floors: bool = False
    """Also evaluate the original (without --baseline, this model) with the images of other
    questions: tables then show each task's blind floor and retention above it."""


class QuestionFlags(Questions):
    """Evaluation tasks."""

    tasks: str | None = None  # type: ignore[assignment]
    """Comma-separated tasks: built-in ones (demo for all, the default without --data), your own
    YAML files, or the paper's benchmarks mme, pope, gqa, scienceqa_img, mmmu_val, ai2d, mathvista,
    docvqa (need slimvlm[eval])."""
    replies: Place | None = None
    """Folder that stores replies as they come, so that a stopped evaluation can resume."""


class FinalEvaluation(Options):
    """Final evaluation on test samples."""

    test_samples: Annotated[int | None, AT_LEAST_0] = None
    """Test samples for the final evaluation, never calibrated or trained on, the same for all
    seeds; at most a fifth of the data. 0 skips it. Default: same as --samples, at most 64."""

    def most_test_samples(self, calibration: int) -> int:
        """Return the maximum number of test samples beside so many calibration samples."""
        return min(calibration, 64) if self.test_samples is None else self.test_samples


class TrainingShare(Options):
    """Training data."""

    training_samples: Annotated[int | None, AT_LEAST_1] = None
    """Maximum number of training samples, those outside the calibration set first. Default: all of
    these."""


class RunPruning(PruneConfig):
    """What to remove, and how. Without data, nothing is trained."""

    without_flag = frozenset({"attn_implementation", "device_map", "gradient"})


class RunTraining(TrainingConfig):
    """Training; the extended paper's decision chart gives what is left out."""

    without_flag = frozenset({"seed", "paper_exact"})
    seed: Annotated[int | None, SEED] = None  # type: ignore[assignment]
    """The run's seed, if given."""


UNTRAINED = RunTraining(train="none")


class RunOptions(LatencyOptions, FinalEvaluation, TrainingShare, Questions):
    """Evaluation, image tokens and training data."""

    without_flag = frozenset({"task_folder", "floors", "baseline", "require"})
    flags: ClassVar = {"batch_size": "task_batch_size"}
    image_tokens: Annotated[float | None, INSIDE] = None
    """Share of the image tokens to keep: the compressed model uses so many from calibration on, the
    original is evaluated with all. See docs/images-budget.md."""
    tasks: str | None = None  # type: ignore[assignment]
    """Tasks on which the original, pruned and trained models are evaluated; demo for the built-in
    ones."""
    batch_size: Annotated[int, AT_LEAST_1] = 16
    """Questions per batch."""
    baseline: Text | None = None
    """Result file of the original, so that it is not evaluated again."""
    require: Texts = ()
    """Conditions on the result, such as agreement >= 95%; else slimvlm compress exits with 3."""


def _training(value: Any) -> RunTraining:
    """Read training options from one word, a mapping, other options, or None for no training."""
    if isinstance(value, RunTraining):
        return value
    if isinstance(value, TrainingConfig):  # whose seed 0 need not be meant
        value = dict(vars(value), seed=value.seed or None)
    if value is None or isinstance(value, str):
        value = {"train": "none" if value is None else value}
    if not isinstance(value, Mapping):
        told = f"{shortened(value)} must be options by name, a value of train, or None"
        raise ConfigError(told)
    given = dict(value)
    if given.pop("keep_adapter", False):
        raise ConfigError("keep_adapter True: compress writes merged weights only; use recover")
    return RunTraining(**given)


class CompressConfig(RunOptions, RunPruning):
    """All options of a run."""

    groups: ClassVar = {"pruning": RunPruning, "training": RunTraining, "evaluation": RunOptions}
    recover: Annotated[TrainingConfig, BeforeValidator(_training)] = RunTraining()
    """Training after pruning: options by name, a value of train, or none. What is left out follows
    the extended paper's decision chart. Its seed is the run's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_latency is not None:
            for name, value in self.given(("ratio", "image_tokens")).items():
                told = f"target_latency {self.target_latency} conflicts with {name} {value}"
                raise ConfigError(f"{told}: leave one of them out")
        if (seed := self.recover.seed) not in (None, self.seed):
            raise ConfigError(f"seed {self.seed} conflicts with recover.seed {seed}")


class Workload(Options):
    """Timed prompts and answers."""

    prompt_tokens: Annotated[int, AT_LEAST_1] = 512
    """Tokens per prompt, image tokens included."""
    new_tokens: Annotated[int, ENOUGH_TOKENS] = 32
    """Tokens per answer."""
    batch_sizes: Annotated[tuple[Annotated[int, AT_LEAST_1], ...], BeforeValidator(listed)] = (
        1,
        16,
    )
    """Batch sizes to time."""
    repeats: Annotated[int, AT_LEAST_1] = 5
    """Timed repetitions per model and batch size, after one warm-up."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.batch_sizes:
            raise ConfigError("batch_sizes must be at least one number")

    @property
    def sizes(self) -> tuple[int, ...]:
        """The batch sizes, each once."""
        return tuple(dict.fromkeys(self.batch_sizes))

    @property
    def mean_context(self) -> int:
        """Tokens that a new token attends to, halfway through the answer."""
        return self.prompt_tokens + self.new_tokens // 2
