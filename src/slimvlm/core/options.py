"""Every option of every stage, declared once: name, type, default, allowed values, meaning.

The command line, Python, studies and recipes read these classes. A field's type says which values
are allowed: any other raises a `ConfigError` that names option, value and what is allowed. The text
below a field is the help of the command line, where a `FILE_ONLY` one has no flag.
"""

import math
import re
from collections.abc import Callable, Container, Mapping
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields
from functools import cache, partial
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from slimvlm.core.errors import ConfigError, shortened
from slimvlm.core.files import beside
from slimvlm.core.tables import read_table

T = TypeVar("T", bound="Options")


@dataclass(frozen=True)
class Range:
    """Numbers that an option may have; stands in its type."""

    holds: Callable[[float], bool]
    meaning: str  # continues "must be"


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
FILE_ONLY = "file only"  # in an option's type: it has no flag on the command line
MOST = 2**53  # numbers below it are exact in every file and every library

_hints = cache(partial(get_type_hints, include_extras=True))


@dataclass(frozen=True, kw_only=True)
class Options:
    """A group of options whose values are checked against their types."""

    def __post_init__(self) -> None:
        kind: Any = type(self)
        for name, declared in _hints(kind).items():
            value, extras = getattr(self, name), getattr(declared, "__metadata__", ())
            ranges = [extra for extra in extras if isinstance(extra, Range)]
            hint = declared.__origin__ if get_origin(declared) is Annotated else declared
            parts = get_args(hint) if get_origin(hint) in (UnionType, Union) else (hint,)
            choices = [one for p in parts if get_origin(p) is Literal for one in get_args(p)]
            is_free = value is None and type(None) in parts
            is_free |= bool(ranges) and isinstance(value, int)
            if choices and value not in choices and not is_free:
                raise ConfigError(f"{name} {value!r} must be one of: {', '.join(choices)}")
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, int) and abs(number) >= MOST:
                    raise ConfigError(f"{name} {shortened(str(number))} must be below 2**53")
            for row in ranges:
                if not isinstance(value, str | None) and not row.holds(value):
                    raise ConfigError(f"{name} {value} must be {row.meaning}")

    def given(self, names: Container[str] | None = None) -> dict[str, Any]:
        """Take those of some options, or of all, that differ from their defaults."""
        found = {}
        for row in fields(self):
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
        return kind(**{row.name: getattr(self, row.name) for row in fields(kind)})


def file_only(kind: Any) -> set[str]:
    """List the options of a class that have no flag on the command line."""
    hints = _hints(kind).items()
    inherited = (vars(each).get("without_flag", ()) for each in kind.__mro__)
    own = {name for name, hint in hints if FILE_ONLY in getattr(hint, "__metadata__", ())}
    return own.union(*inherited)


Axis = Literal["depth", "width", "both"]
AxisChoice = Literal["depth", "width", "both", "auto", "chart"]
Unit = Literal["kv_group", "neuron"]
Allocation = Literal["uniform", "balanced", "protect"]
Gradient = Literal["batch", "per_sample"]
OutType = Literal["f32", "f16", "bf16", "q8_0", "q4_k_m", "q5_k_m", "q6_k"]  # of GGUF files
Repair = Literal["none", "width", "depth", "both", "auto"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Attention = Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"]
DeviceMap = Literal["auto", "balanced", "balanced_low_0", "sequential"]
Train = Literal["projector", "lora", "full"]
Positions = Literal["answer", "all"]
TooLong = Literal["refuse", "cut"]

PassedOn = Annotated[Mapping[str, Any], FILE_ONLY]  # options of another library by name

Divergence = Literal["kl", "rkl", "jsd"]
DIVERGENCES = get_args(Divergence)  # losses between next-token distributions
HIDDEN_LOSSES = ("hidden", "cosine")  # losses between hidden states
LOSS_NAMES = ("sft", *HIDDEN_LOSSES, *DIVERGENCES)
SAMPLES_READ, MAX_PASSES = 2200, 4.0
"""Samples that a training reads, were all of the decoder gone, and passes over them at most."""


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


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Options):
    """How to train, whatever learns and from which loss."""

    fraction: Annotated[float, FRACTION] = 1.0
    """Share of the data to use: a seeded subset, recorded with the run."""
    epochs: Annotated[float | None, ABOVE_0] = None
    """Passes over that share. By default one; where full follows the teacher alone, as many as read
    2,200 samples times the share of the decoder that went: one to four."""
    max_steps: Annotated[int, STEPS] = -1
    """Stop after so many optimizer steps; -1 for no limit."""
    learning_rate: Annotated[float | None, ABOVE_0] = None
    """Peak learning rate of AdamW. By default 2e-4; where full trains, 4e-4 times the share of the
    decoder that went, and less the wider the model is."""
    batch_size: Annotated[int, ABOVE_0] = 8
    """Samples in a step on each device."""
    gradient_accumulation: Annotated[int, ABOVE_0, FILE_ONLY] = 1
    """Steps whose gradients are added before the optimizer moves."""
    lora_rank: Annotated[int, ABOVE_0] = 64
    """Rank of the LoRA matrices."""
    paper_exact: bool = False
    """Distil as the study's trainer does: all losses but sft over every position, and the teacher
    reads the student's projector."""
    gradient_checkpointing: bool = False
    """Trade time for activation memory: 11.4 GiB in place of 16.7 for a model of 3B."""
    seed: Annotated[int, SEED] = 0
    """Seed of the data order, the subset and LoRA's initial values."""
    temperature: Annotated[float, ABOVE_0, FILE_ONLY] = 2.0
    """Temperature of kl, rkl and jsd."""
    bf16: Annotated[bool | None, FILE_ONLY] = None
    """bfloat16 autocast; by default where the device computes it natively."""
    trainer: PassedOn = field(default_factory=dict, hash=False)
    """Further arguments of transformers.TrainingArguments, such as {weight_decay: 0.05}."""
    lora: PassedOn = field(default_factory=dict, hash=False)
    """Further arguments of peft.LoraConfig, such as {lora_alpha: 32}."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_passable("trainer", self.trainer)
        _require_passable("lora", self.lora)


PASSED_ON: Mapping[str, Mapping[str, Any]] = read_table(__file__, "passed_on.yaml")
"""Arguments of other libraries, and the values that each may have, by the option with them."""


def _require_passable(option: str, values: Any) -> None:
    """Refuse keys and values that another library would refuse after weights are read, or obey."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{option} {values!r} must map names to values")
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


@dataclass(frozen=True, kw_only=True)
class RecoverConfig(TrainingConfig):
    """How to train after pruning."""

    train: Train = "lora"
    """What learns: the projector, LoRA on the backbone plus the projector, or all but the tower."""
    loss: str = "sft+hidden"
    """Weighted sum of sft, hidden (L2 of hidden states), cosine (their angle), kl, rkl and jsd."""
    keep_adapter: bool = False
    """Keep the LoRA matrices as an adapter beside the merged model."""

    def __post_init__(self) -> None:
        parse_loss(self.loss)
        super().__post_init__()
        if self.keep_adapter and self.train != "lora":
            raise ConfigError(f"keep_adapter True needs train 'lora', not {self.train!r}")

    @property
    def positions(self) -> Positions:
        """The positions that are compared: answers beside sft, all without it; never padding."""
        return "answer" if "sft" in self.loss_weights else "all"

    def passes(self, samples: int, gone: float) -> float:
        """Return the passes over so many samples, after a share ``gone`` of the decoder went."""
        if self.epochs is not None:
            return self.epochs
        if self.train != "full" or "sft" in self.loss_weights:
            return 1.0
        return min(max(SAMPLES_READ * gone / samples, 1.0), MAX_PASSES)

    @property
    def loss_weights(self) -> dict[str, float]:
        """The loss as weights by name."""
        return parse_loss(self.loss)

    @property
    def needs_teacher(self) -> bool:
        """Whether the loss compares with the original model: any but sft alone."""
        return set(self.loss_weights) != {"sft"}


@dataclass(frozen=True, kw_only=True)
class DeviceOptions(Options):
    """Where models run."""

    # decides no result, so configurations that differ in it are equal
    device: str | None = field(default=None, compare=False)
    """Where the model runs, such as cpu, cuda, cuda:1 or mps; by default the accelerator that torch
    finds, else the CPU."""


@dataclass(frozen=True, kw_only=True)
class LoadConfig(DeviceOptions):
    """How models are read."""

    dtype: Dtype = "auto"
    """Data type of the weights."""
    trust_remote_code: bool = False
    """Run code that lies in the checkpoint."""
    attn_implementation: Attention | None = field(default=None, compare=False)
    """How attention is computed; by default as transformers chooses."""
    device_map: DeviceMap | None = field(default=None, compare=False)
    """Divide the model over all GPUs, then host and disk, instead of a device. Not for training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.device_map is not None and self.device is not None:
            raise ConfigError(f"device_map {self.device_map!r}: there is a device, {self.device!r}")


# options that decide no result, but for rounding
NO_RESULT = tuple(row.name for row in fields(LoadConfig) if not row.compare)


@dataclass(frozen=True, kw_only=True)
class FileLoading(LoadConfig):
    """How models are read by verbs that have many options."""

    without_flag = frozenset({"attn_implementation", "device_map"})


@dataclass(frozen=True, kw_only=True)
class DataConfig(LoadConfig):
    """Which conversations are read, and with which model."""

    data: str | None = None
    """Conversations: demo, LLaVA-format .json, or .jsonl/.parquet/datasets folder with messages."""
    images: str | None = None
    """Folder that image paths in the data start from; by default that of the data."""
    max_bad: Annotated[int, AT_LEAST_0] = 0
    """Broken data rows to skip at most."""
    max_length: Annotated[int | None, AT_LEAST_1] = None
    """Tokens of a sample at most, those of pictures included; by default as many as the model
    reads."""
    too_long: TooLong = "refuse"
    """Longer samples: refuse makes them broken rows; cut drops turns, then an answer's end."""


@dataclass(frozen=True, kw_only=True)
class TrainingData(DataConfig):
    """What is learnt from, and how models are read."""

    data: str = field()  # the base class has a default, which must go


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig(DataConfig):
    """Which conversations a model is shown that is to be scored, and what counts."""

    samples: Annotated[int, AT_LEAST_1] = 192
    """Calibration samples, drawn from the whole of the data."""
    seed: Annotated[int, SEED] = 0
    """Draws the samples for calibration and training, and all else but the final test's."""
    general_text: Annotated[float | None, SHARE] = None
    """Share of general text in calibration, beside the data: descriptions of the packages that
    slimvlm needs. By default 0.2 where weights are repaired, else 0."""
    gradient: Gradient = "per_sample"
    """For taylor: one gradient over all samples, or one for each."""
    token_weights: str | None = None
    """Weight of tokens in calibration by role, such as image=0.1,prompt=1,answer=1."""


@dataclass(frozen=True, kw_only=True)
class RatioOptions(Options):
    """How small a model becomes, as a share."""

    ratio: Annotated[float | None, SHARE] = None
    """Share of the backbone's parameters to remove."""


@dataclass(frozen=True, kw_only=True)
class TargetOptions(RatioOptions):
    """How small a model becomes, as a share or as a size."""

    target_params: str | None = None
    """Instead of a ratio: parameters of the whole smaller model, such as 5B or 90M."""
    target_memory: str | None = None
    """Instead: memory of its weights, such as 8GiB, in --dtype (bfloat16 for auto)."""


@dataclass(frozen=True, kw_only=True)
class LatencyOptions(Options):
    """How fast a model becomes."""

    target_latency: Annotated[float | None, INSIDE] = None
    """Instead of a ratio: time to read a question as a share of the original's. compress counts it
    in the backbone's operations, finds the ratio for each axis that is tried, and measures what
    the share is on this machine."""


@dataclass(frozen=True, kw_only=True)
class SizeOptions(RatioOptions):
    """How small a model becomes, and which units may go."""

    vocab_size: Annotated[int | Literal["auto", "all"] | None, AT_LEAST_1] = None
    """Tokens to keep: those that the data has most, then by the model's own ranks; special ones,
    bytes and single characters stay. auto keeps as many as the data needs. The ratio counts their
    rows, and the axis gives the rest. By default all tokens stay, but where axis auto tries things
    and tokens weigh much, a third of them is tried, too; all forbids that."""
    vocab_text: str | None = None
    """A text file, or a folder of them, whose tokens count beside those of the data."""
    experts: Annotated[float, SHARE] = 0.0
    """Share of the experts of every layer that goes. The ratio counts them, and the axis gives the
    rest."""
    units: tuple[Unit, ...] = ("kv_group", "neuron")
    """What width may remove."""
    protect: tuple[int, int] = (0, 0)
    """First and last layers to leave whole."""
    round_to: Annotated[int | None, AT_LEAST_1] = None
    """Multiple for the number of neurons; default 128, smaller for small models."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vocab_text is not None and not self.loses_tokens:
            raise ConfigError(f"vocab_text {self.vocab_text!r} needs vocab_size, a number or auto")
        if not self.units or set(self.units) - set(get_args(Unit)):
            raise ConfigError(f"units {self.units} must be of: {', '.join(get_args(Unit))}")

    @property
    def loses_tokens(self) -> bool:
        """Whether tokens are to go, whatever else goes."""
        return self.vocab_size not in (None, "all")

    @property
    def tokens_first(self) -> bool:
        """Whether tokens or experts go before the axis gives the rest of the ratio."""
        return self.loses_tokens or self.experts > 0

    @property
    def of_units(self) -> dict[str, Any]:
        """The options of units, by the names that `make_plan` gives them."""
        return {name: getattr(self, name) for name in ("units", "protect", "round_to", "experts")}


@dataclass(frozen=True, kw_only=True)
class PlanConfig(TargetOptions, SizeOptions, DeviceOptions):
    """How much may go and what, where scores are given."""

    dtype: Dtype = "auto"
    """Data type that --target-memory is counted in."""
    axis: Axis = "width"
    """Remove layers, KV groups and neurons, or both."""
    allocation: Literal["uniform", "protect"] = "uniform"
    """The same widths in every layer, or first and last layers whole, which writes files with
    code."""
    kv_heads: Annotated[int | None, AT_LEAST_1] = None
    """KV groups to keep in every layer; neurons give the rest."""


@dataclass(frozen=True, kw_only=True)
class PruneConfig(CalibrationConfig, SizeOptions):
    """What to remove, and how to choose and to mend."""

    axis: AxisChoice | None = None
    """Remove layers, KV groups and neurons, or both; auto, what compress does before training,
    tries the three and lets held-out answers choose; chart, the default elsewhere, follows the
    study's decision chart: width, where nothing is trained."""
    allocation: Allocation | None = None
    """How widths share the ratio: the same in every layer, with KV groups and neurons in
    proportion (uniform) or as costs a few layers least (balanced); or first and last layers whole
    (protect), which gives files with code. By default balanced where obs chooses, else uniform."""
    criterion: tuple[str, ...] = ()
    """How to score, one criterion for each kind of unit; by default what measured best."""
    repair: Repair = "auto"
    """Fit the remaining weights in closed form: widths, seams of removed layers, both, or auto,
    which keeps what helps on held-out answers and does nothing without data."""
    local_steps: Annotated[int | None, AT_LEAST_0] = None
    """Optimizer steps on each layer alone, towards what the original gives there. By default, with
    repair auto, a pass over the calibration samples for each tenth of the decoder that goes; 0 is
    faster and keeps less."""


@dataclass(frozen=True, kw_only=True)
class MemoryOptions(Options):
    """How much of a model is in memory."""

    low_memory: bool = False
    """For models larger than the memory: one layer is read at a time, activations lie on disk, and
    a checkpoint is written piece by piece. A stopped run goes on where it was when the same command
    is given again."""
    scratch: Path | None = None
    """Folder for these activations; by default beside OUT."""

    def scratch_beside(self, out: Path) -> Path:
        """Return the folder for activations."""
        return self.scratch or beside(out, "scratch")


@dataclass(frozen=True, kw_only=True)
class Questions(Options):
    """What models are asked."""

    tasks: str = "demo"
    """Comma-separated names: built-in tasks (demo for all), YAML files of your own, or the study's
    benchmarks mme, pope, gqa, scienceqa_img, mmmu_val, ai2d, mathvista, docvqa (needs
    slimvlm[eval])."""
    task_folder: str | None = None
    """Folder with local copies of the benchmarks' task files."""
    limit: Annotated[int | None, AT_LEAST_1] = None
    """Only the first so many questions of each task."""
    batch_size: Annotated[int, AT_LEAST_1] = 16
    """Questions answered at once."""
    template_args: tuple[str, ...] = ()
    """Arguments of the chat template for questions, as name=value: enable_thinking=false."""
    floors: bool = False
    """Ask the original model (without --baseline, this one) a second time, blind, so that tables
    show each task's blind floor and retention above the floors."""


@dataclass(frozen=True, kw_only=True)
class QuestionFlags(Questions):
    """What models are asked, and how."""

    tasks: str | None = None  # type: ignore[assignment]
    """Comma-separated names: built-in tasks (demo for all, the default without --data), YAML files
    of your own, or the study's benchmarks mme, pope, gqa, scienceqa_img, mmmu_val, ai2d, mathvista,
    docvqa (needs slimvlm[eval])."""
    blind: bool = False
    """Show the pictures of other questions: the floor of a model that cannot see."""
    log: Path | None = None
    """Folder that keeps replies as they come; a stopped evaluation goes on there."""


TASK_BATCH_SIZE = "task_batch_size"  # flag of `Questions.batch_size` beside that of a training


@dataclass(frozen=True, kw_only=True)
class ReportOptions(Options):
    """How many samples judge a finished model."""

    report_samples: Annotated[int | None, AT_LEAST_0] = None
    """Samples from which nothing is learnt, the same for all seeds: on them the end says what was
    kept. At most a fifth of the data; 0 for none. By default as many as calibrate, up to 64."""

    def unseen(self, calibration: int) -> int:
        """Count held-out samples at most; by default as many as calibrate, as both take as long."""
        return min(calibration, 64) if self.report_samples is None else self.report_samples


@dataclass(frozen=True, kw_only=True)
class TrainingShare(Options):
    """How much a run trains on."""

    training_samples: Annotated[int | None, AT_LEAST_1] = None
    """Samples to train on at most, those first that did not calibrate. By default all of these."""


@dataclass(frozen=True, kw_only=True)
class RunOptions(LatencyOptions, ReportOptions, TrainingShare, Questions):
    """What models are asked and shown, and how much is trained on."""

    without_flag = frozenset({"task_folder", "template_args", "floors"})
    image_tokens: Annotated[float | None, INSIDE] = None
    """Share of the tokens that the data's pictures take now; the smaller model sees them with so
    many from calibration on, the original in reports with all. See docs/images-budget.md."""
    tasks: str | None = None  # type: ignore[assignment]
    """Evaluate on these tasks before, between and after; demo for the built-in ones."""
    baseline: Annotated[str | None, FILE_ONLY] = None
    """Result file of the original model, to save asking it again."""
    require: Annotated[tuple[str, ...], FILE_ONLY] = ()
    """What the result must keep, such as agreement >= 95%; else slimvlm compress exits with 3."""


@dataclass(frozen=True, kw_only=True)
class RunPruning(FileLoading, PruneConfig):
    """What to remove, and how to choose and to mend."""

    without_flag = frozenset({"gradient"})


@dataclass(frozen=True, kw_only=True)
class CompressConfig(RunOptions, RunPruning):
    """Everything a run depends on; written into the run folder and compared when it goes on."""

    recover: RecoverConfig | None = None
    """Recovery options; None for no recovery. Its seed is the run's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_latency is not None:
            for name, value in self.given(("ratio", "image_tokens")).items():
                told = f"target_latency {self.target_latency}: it does not go with"
                raise ConfigError(f"{told} {name} {value}")
        if self.recover is None:
            return
        if self.device_map is not None:
            raise ConfigError(f"device_map {self.device_map!r}: a model that is trained is whole")
        if self.recover.keep_adapter:
            raise ConfigError(
                "keep_adapter True: compress writes merged weights alone; use recover"
            )
        if (seed := self.recover.seed) not in (0, self.seed):
            raise ConfigError(f"seed {self.seed}: a run has one, and recover has {seed}")


@dataclass(frozen=True, kw_only=True)
class Workload(Options):
    """What is timed."""

    prompt_tokens: Annotated[int, AT_LEAST_1] = 512
    """Length of every prompt; a picture counts with the tokens that it takes."""
    new_tokens: Annotated[int, ENOUGH_TOKENS] = 32
    """Length of every answer."""
    batch_sizes: tuple[int, ...] = (1, 16)
    """Prompts that are answered at once; each number is timed."""
    repeats: Annotated[int, AT_LEAST_1] = 5
    """Measured runs of each model at each batch size, after one to warm up."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ConfigError(f"batch_sizes {self.batch_sizes} must be numbers of at least 1")

    @property
    def sizes(self) -> tuple[int, ...]:
        """The batch sizes, each once."""
        return tuple(dict.fromkeys(self.batch_sizes))

    @property
    def mean_context(self) -> int:
        """Tokens that a new one attends to, halfway through the answer."""
        return self.prompt_tokens + self.new_tokens // 2
