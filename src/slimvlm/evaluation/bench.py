"""Time models in turn, count the bytes of their tensors, and compare a speed-up with the ideal."""

import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from statistics import median
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from slimvlm.core.errors import ConfigError
from slimvlm.core.options import MIN_NEW_TOKENS, Workload
from slimvlm.core.progress import progress
from slimvlm.data import chat
from slimvlm.data.samples import Question
from slimvlm.evaluation.metrics import Estimate
from slimvlm.evaluation.results import Stored, Times
from slimvlm.models.anatomy import Anatomy
from slimvlm.models.cost import (
    decode_flops,
    kv_cache_bytes,
    prefill_flops,
    question_flops,
    slow_widths,
)
from slimvlm.models.hidden import as_inputs, evaluating, hidden_states, require_finite_values
from slimvlm.models.load import anatomy as anatomy_of
from slimvlm.models.parts import Parts, part_at
from slimvlm.models.pictures import usual_picture

REPEATS, NEW_TOKENS = 6, 8  # runs of each model, and new tokens after the first

_ENDS = (0.5, 0.0, 1.0)  # quantiles: median, fastest, slowest
Run = tuple[float, ...]  # milliseconds of a generation: to the first token, then of each other one


def timed_run(model: PreTrainedModel, inputs: Mapping[str, Any], new_tokens: int) -> Run:
    """Generate exactly so many tokens for a batch, at least 2, and time each step."""
    seconds: list[float] = []  # when prompt and tokens come on the CPU, so that a GPU is done too
    clock = SimpleNamespace(put=lambda _: seconds.append(time.perf_counter()), end=lambda: None)
    generator: Any = model
    lengths = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    greedy = {"do_sample": False, "num_beams": 1, "pad_token_id": 0}
    with torch.inference_mode():
        generator.generate(**inputs, **lengths, **greedy, streamer=clock)
    return tuple(1e3 * (b - a) for a, b in pairwise(seconds))


def timed_runs(
    models: Sequence[Any], inputs: Sequence[Mapping[str, Any]], new_tokens: int, repeats: int
) -> list[list[Run]]:
    """Time several models in turn, each with its batch, after one run to warm up."""
    # a machine that is slow for a while then slows all of them, and their ratios do not change
    pairs = list(zip(models, inputs, strict=True))
    for model, batch in pairs:
        timed_run(model, batch, 2)
    return in_turn([partial(timed_run, *pair, new_tokens) for pair in pairs], repeats)


def in_turn(runs: Sequence[Callable[[], Run]], repeats: int) -> list[list[Run]]:
    """Repeat runs, forwards in one round and backwards in the next; return the times of each."""
    found: list[list[Run]] = [[] for _ in runs]
    for repeat in range(repeats):
        for index in range(len(runs))[:: 1 if repeat % 2 == 0 else -1]:
            found[index].append(runs[index]())
    return found


def _by_phase(runs: Sequence[Run]) -> NDArray[np.float64]:
    """Return ``[R, 2]``: the prefill time and the median time of a decoding step of each run."""
    return np.array([[run[0], median(run[1:])] for run in runs])


@dataclass(frozen=True)
class PairedTimes(Stored):
    """Times of an original and a compressed model that ran in turn, and their shares."""

    what: ClassVar = "times"
    original: Times
    pruned: Times
    prefill: Estimate  # of the original's, from pixels to the first token if the model sees
    decode: Estimate
    text: Estimate | None = None  # prefill without the image; None if unknown or the same

    def __str__(self) -> str:
        """Complete a sentence that begins "the compressed model"."""
        read, write = (f"{ms:.1f} ms" for ms in (self.pruned.prefill_ms, self.pruned.decode_ms))
        told = f"prefills in {self.prefill} of the original's time ({read})"
        if self.text is not None:
            told = f"prefills a question with an image in {self.prefill} of the original's time "
            told += f"({read}), without the image in {self.text}"
        return f"{told}, decodes a token in {self.decode} ({write})"


def paired_times(
    model: PreTrainedModel,
    processor: Any,
    original: PreTrainedModel,
    original_processor: Any,
    size: tuple[int, int] = chat.USUAL_SIZE,
) -> PairedTimes:
    """Time a compressed model and its original in turn, each with its own processor."""
    pairs = [(original, original_processor), (model, processor)]
    asked = chat.plain_question(original_processor, size)
    questions = [asked, replace(asked, images=())] if asked.images else [asked]
    found = [times_of(pairs, question) for question in questions]
    shares = np.concatenate([ours / theirs for _, (theirs, ours) in found], 1)  # of the same rounds
    prefill, decode, *text = (Estimate(*e) for e in np.quantile(shares, _ENDS, axis=0).T.tolist())
    first, second = found[0][0]
    return PairedTimes(first, second, prefill, decode, text[0] if text else None)


def times_of(
    pairs: Sequence[tuple[PreTrainedModel, Any]], question: Question
) -> tuple[list[Times], list[NDArray[np.float64]]]:
    """Time models with their processors in turn on one question; also return `_by_phase`."""
    models = [model for model, _ in pairs]
    inputs = [as_inputs(m, chat.encode_questions(p, [question])) for m, p in pairs]
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(evaluating(model))
        phases = [*map(_by_phase, timed_runs(models, inputs, 1 + NEW_TOKENS, REPEATS))]
    found = []
    for each in phases:
        middle, low, high = np.quantile(each, _ENDS, axis=0).tolist()
        times = Times(
            prefill_ms=middle[0],
            decode_ms=middle[1],
            prefill_range_ms=(low[0], high[0]),
            decode_range_ms=(low[1], high[1]),
        )
        found.append(times)
    return found, phases


def stored_bytes(*modules: nn.Module) -> int:
    """Count bytes of all weights, and of the scales of quantised ones; shared ones count once."""
    weights = _storages(tensor for each in modules for tensor in each.state_dict().values())
    # offloaded ones have no address
    found = {each.data_ptr() or -i: each.nbytes() for i, each in enumerate(weights)}
    return sum(found.values())


class PeakMemory(TorchDispatchMode):
    """Track the peak of the bytes that operations allocate, without the weights of ``modules``.

    It sees every tensor on every device, but not a kernel's own memory. Operations are slow
    meanwhile.
    """

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak_bytes: int = 0
        self._alive_bytes = 0
        weights = _storages(tensor for each in modules for tensor in each.state_dict().values())
        self._known: weakref.WeakSet[Any] = weakref.WeakSet(weights)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count its results."""
        result = func(*args, **(kwargs or {}))
        for storage in _storages(tree_leaves(result)):
            if storage not in self._known:
                self._known.add(storage)
                self._count(storage.nbytes())
                weakref.finalize(storage, self._count, -storage.nbytes())
        return result

    def _count(self, num_bytes: int) -> None:
        self._alive_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self._alive_bytes)


def _storages(values: Iterable[Any]) -> Iterator[torch.UntypedStorage]:
    """Find the memory of the tensors among values, and of their inner tensors (such as scales)."""
    for value in values:
        if isinstance(value, Tensor) and is_traceable_wrapper_subclass(value):
            names, _ = value.__tensor_flatten__()
            yield from _storages(getattr(value, name) for name in names)
        elif isinstance(value, Tensor):
            yield value.untyped_storage()


@dataclass(frozen=True)
class Speed:
    """Times of one model at one batch size; medians over the repeats."""

    batch_size: int
    prefill_ms: float  # to the first new token
    decode_ms: float  # of one further token of every answer
    tokens_per_second: float  # new tokens of all answers, prefill included
    peak_bytes: int  # weights and the most that other tensors took at once


@dataclass(frozen=True)
class Footprint:
    """Size, FLOPs and times of one model."""

    model: str  # name or path
    total_params: int
    backbone_params: int
    weight_bytes: int
    prefill_flops: int  # of the backbone, for one prompt
    decode_flops: int  # of the backbone, for one further token after the prompt
    speeds: tuple[Speed, ...]
    warnings: tuple[str, ...]  # widths that are slow on hardware
    image_flops: int | None = None  # of a question about an image of usual size
    image_ms: float | None = None  # likewise, from its pixels to the first token
    image_parts_ms: tuple[float, float, float] | None = None  # of tower, projector and backbone


@dataclass(frozen=True)
class SpeedUp:
    """Speed-up over a baseline at one batch size, and the ideal."""

    batch_size: int
    prefill: float  # median over the repeats of baseline time / model time
    prefill_ideal: float  # ratio of FLOPs
    decode: float
    decode_ideal: float  # ratio of bytes that new tokens read: `Side.bytes_for`
    prefill_share: float  # of the ideal that is reached
    decode_share: float


@dataclass(frozen=True)
class Bench:
    """Times of a model, and of its baseline if there is one."""

    workload: Workload
    device: str
    dtype: str  # of the weights that are not quantised
    threads: int
    model: Footprint
    baseline: Footprint | None = None
    speed_ups: tuple[SpeedUp, ...] = ()  # one for each batch size
    image_speed_up: tuple[float, float] | None = None  # of `image_ms`, and the ratio of FLOPs


@dataclass(frozen=True)
class Side:
    """A model in a benchmark."""

    name: str  # or path
    shape: Anatomy  # of the configuration: quantised weights are packed
    dtype: str  # of keys and values
    weight_bytes: int
    read_bytes: int  # weights that new tokens read: layers, final norm and head, all experts

    def bytes_for(self, tokens: int, context: int) -> float:
        """Count what so many new tokens read at once: keys, values, and the experts they take."""
        idle = sum(
            (1 - self.shape.experts_per_token / n) ** tokens * n * each.expert_params
            for each in self.shape.layers
            if (n := each.num_experts)
        )
        unread = idle * self.weight_bytes / self.shape.total_params
        return self.read_bytes - unread + tokens * kv_cache_bytes(self.shape, context, self.dtype)


def bench(
    model: PreTrainedModel,
    baseline: PreTrainedModel | None = None,
    workload: Workload | None = None,
    names: Sequence[str] = ("model", "baseline"),
    processors: Sequence[Any] = (),
) -> Bench:
    """Time prefill and decoding; with a baseline, both in turn in this process.

    Prompts are random tokens, without an image. With ``processors`` of the model and the baseline,
    which take images, a question about an image of usual size is timed as well: from pixels through
    the vision tower to the first token. Replies have a fixed length. A shared machine that is slow
    for a while slows both models, and a speed-up is the median of the ratios of neighbouring runs.
    ``names`` are those of model and baseline in the result.

    Raises:
        ConfigError: If the workload is out of range or the two are on different devices.
        NumericalError: If a model computes NaN or infinity.
    """
    workload = workload or Workload()
    models = [model] if baseline is None else [model, baseline]
    if len({one.device for one in models}) > 1:
        raise ConfigError(f"baseline is on {models[1].device}, the model on {model.device}")
    dtypes = [str(one.dtype).removeprefix("torch.") for one in models]
    sides = []
    for name, one, dtype in zip(names, models, dtypes, strict=False):
        head: Any = one.get_output_embeddings()
        read = stored_bytes(Parts(one).layers, Parts(one).norm, head)
        sides.append(Side(name, anatomy_of(one.config), dtype, stored_bytes(one), read))

    def batches(batch_size: int) -> list[dict[str, Tensor]]:
        prompts = [random_prompts(side.shape, workload, batch_size) for side in sides]
        ids = [each.to(model.device) for each in prompts]
        return [{"input_ids": each, "attention_mask": torch.ones_like(each)} for each in ids]

    for side, one, batch in zip(sides, models, batches(1), strict=True):
        (hidden,) = hidden_states(one, batch)
        require_finite_values(hidden, f"the hidden states of {side.name!r}")
    peaks: dict[int, list[int]] = {size: [] for size in workload.sizes}
    for size, its in peaks.items():
        for side, one, batch in zip(sides, models, batches(size), strict=True):
            with PeakMemory(one) as memory:
                timed_run(one, batch, min(workload.new_tokens, MIN_NEW_TOKENS))
            its.append(side.weight_bytes + memory.peak_bytes)
    runs = {
        size: timed_runs(models, batches(size), workload.new_tokens, workload.repeats)
        for size in progress(workload.sizes, "bench")
    }
    name_of = getattr(torch.get_device_module(model.device), "get_device_name", str)
    result = summarised(sides, workload, runs, peaks, str(name_of(model.device)), dtypes[0])
    if not processors or not all(map(chat.can_see, processors)):
        return result
    return _with_image(result, list(zip(models, processors, strict=True)), workload.repeats)


def _with_image(result: Bench, pairs: Sequence[tuple[PreTrainedModel, Any]], repeats: int) -> Bench:
    """Add the work and the times of a question about an image to a benchmark."""
    asked = chat.plain_question(pairs[0][1])
    inputs = [as_inputs(m, chat.encode_questions(p, [asked])) for m, p in pairs]
    its, flops = timed_runs([model for model, _ in pairs], inputs, 2, repeats), list[int]()
    for (model, processor), batch in zip(pairs, inputs, strict=True):
        picture = usual_picture(model.config, processor)
        text = batch["input_ids"].shape[1] - picture.tokens
        flops.append(sum(question_flops(anatomy_of(model.config), picture, text)))
    ms, sides = [_by_phase(runs)[:, 0] for runs in its], (result.model, result.baseline)
    apart = (times_of_parts(model, batch) for (model, _), batch in zip(pairs, inputs, strict=True))
    ours, *theirs = (
        replace(side, image_flops=work, image_ms=float(np.median(each)), image_parts_ms=parts)
        for side, work, each, parts in zip(filter(None, sides), flops, ms, apart, strict=True)
    )
    gains = (float(np.median(ms[1] / ms[0])), flops[1] / flops[0]) if theirs else None
    baseline = theirs[0] if theirs else None
    return replace(result, model=ours, baseline=baseline, image_speed_up=gains)


@torch.inference_mode()
def times_of_parts(
    model: PreTrainedModel, inputs: Mapping[str, Any], repeats: int = 3
) -> tuple[float, float, float]:
    """Time vision tower, projector and the rest of a pass, in ms; the fastest of some passes."""
    parts, spent = Parts(model), dict[str, float]()
    tower, projector = parts.family.vision or "", parts.family.projector

    def now() -> float:
        if model.device.type != "cpu":
            torch.get_device_module(model.device).synchronize()
        return time.perf_counter()

    def begin(path: str, *call: Any) -> None:
        spent[path] = spent.get(path, 0.0) - now()

    def end(path: str, *call: Any) -> None:
        spent[path] += now()

    found = []
    with ExitStack() as stack:
        for path in (tower, *projector):
            if isinstance(part := part_at(model, path), nn.Module):
                stack.enter_context(part.register_forward_pre_hook(partial(begin, path)))
                stack.enter_context(part.register_forward_hook(partial(end, path)))
        for _ in range(repeats):
            spent.clear()
            start = now()
            model(**inputs, logits_to_keep=1)
            whole, between = now() - start, sum(spent.get(path, 0.0) for path in projector)
            inside = sum(spent.get(p, 0.0) for p in projector if p.startswith(f"{tower}."))
            of_tower = spent.get(tower, 0.0) - inside
            found.append((whole, of_tower, between, whole - of_tower - between))
    _, *fastest = min(found)
    of_tower, between, rest = (1e3 * seconds for seconds in fastest)
    return of_tower, between, rest


def summarised(
    sides: Sequence[Side],
    workload: Workload,
    runs: Mapping[int, Sequence[Sequence[Run]]],
    peaks: Mapping[int, Sequence[int]],
    device: str,
    dtype: str,
) -> Bench:
    """Summarise each side's runs, in the order of their rounds, and peak bytes, by batch size."""
    measured, speed_ups = [], []
    for i, side in enumerate(sides):
        speeds = []
        for size, its in runs.items():
            whole = [1e3 * size * workload.new_tokens / sum(run) for run in its[i]]
            prefill, decode = np.median(_by_phase(its[i]), 0).tolist()
            speeds.append(Speed(size, prefill, decode, median(whole), peaks[size][i]))
        footprint = Footprint(
            model=side.name,
            total_params=side.shape.total_params,
            backbone_params=side.shape.backbone_params,
            weight_bytes=side.weight_bytes,
            prefill_flops=prefill_flops(side.shape, workload.prompt_tokens),
            decode_flops=decode_flops(side.shape, workload.mean_context),
            speeds=tuple(speeds),
            warnings=tuple(slow_widths(side.shape)),
        )
        measured.append(footprint)
    for size, (fast, slow) in runs.items() if len(sides) > 1 else ():
        read = [prefill_flops(side.shape, workload.prompt_tokens, size) for side in sides]
        written = [side.bytes_for(size, workload.mean_context) for side in sides]
        prefill, decode = np.median(_by_phase(slow) / _by_phase(fast), 0).tolist()
        ideals = read[1] / read[0], written[1] / written[0]
        reached = prefill / ideals[0], decode / ideals[1]
        speed_ups.append(SpeedUp(size, prefill, ideals[0], decode, ideals[1], *reached))
    threads, baseline = torch.get_num_threads(), measured[1] if len(sides) > 1 else None
    return Bench(workload, device, dtype, threads, measured[0], baseline, tuple(speed_ups))


def bench_rows(result: Bench) -> tuple[list[str], list[list[str]]]:
    """Make a row for each figure, and a column for each model, speed-up and ideal."""
    models = [m for m in (result.baseline, result.model) if m is not None]
    pad = [""] * 3 if result.speed_ups else []
    rows = [
        ["all parameters", *(f"{m.total_params / 1e6:.1f} M" for m in models), *pad],
        ["backbone parameters", *(f"{m.backbone_params / 1e6:.1f} M" for m in models), *pad],
        ["weights MiB", *(f"{m.weight_bytes / 2**20:.1f}" for m in models), *pad],
        ["GFLOP of prefill", *(f"{m.prefill_flops / 1e9:.2f}" for m in models), *pad],
        ["GFLOP per decoded token", *(f"{m.decode_flops / 1e9:.3f}" for m in models), *pad],
    ]
    for index, size in enumerate(speed.batch_size for speed in result.model.speeds):
        speeds, read, write = [m.speeds[index] for m in models], pad, pad
        if result.speed_ups:
            s = result.speed_ups[index]
            read = [f"{s.prefill:.2f}x", f"{s.prefill_ideal:.2f}x", f"{s.prefill_share:.2f}"]
            write = [f"{s.decode:.2f}x", f"{s.decode_ideal:.2f}x", f"{s.decode_share:.2f}"]
        at = f"batch {size}: "
        rows += [
            [at + "prefill ms", *(f"{s.prefill_ms:.1f}" for s in speeds), *read],
            [at + "decode ms per token", *(f"{s.decode_ms:.1f}" for s in speeds), *write],
            [at + "new tokens/s", *(f"{s.tokens_per_second:.1f}" for s in speeds), *pad],
            [at + "peak MiB", *(f"{s.peak_bytes / 2**20:.1f}" for s in speeds), *pad],
        ]
    if result.model.image_flops is not None:
        read, name = pad, "question with an image"
        if result.image_speed_up is not None:
            gain, ideal = result.image_speed_up
            read = [f"{gain:.2f}x", f"{ideal:.2f}x", f"{gain / ideal:.2f}"]
        rows += [
            [f"GFLOP of a {name}", *(f"{(m.image_flops or 0) / 1e9:.2f}" for m in models), *pad],
            [f"{name}: prefill ms", *(f"{m.image_ms or 0:.1f}" for m in models), *read],
        ]
        for part, title in enumerate(("vision tower", "projector", "backbone")):
            each = (0.0 if m.image_parts_ms is None else m.image_parts_ms[part] for m in models)
            rows.append([f"  {title} ms", *(f"{ms:.1f}" for ms in each), *pad])
    header = ["", *(m.model for m in models)]
    return header + ["speed-up", "ideal", "share of ideal"] * bool(result.speed_ups), rows


def random_prompts(shape: Anatomy, workload: Workload, batch_size: int) -> Tensor:
    """``[B, T]``: random ordinary tokens; special ones are at the ends of a vocabulary."""
    generator = torch.Generator().manual_seed(0)
    low, high = shape.vocab_size // 4, shape.vocab_size // 2
    return torch.randint(low, high, (batch_size, workload.prompt_tokens), generator=generator)
