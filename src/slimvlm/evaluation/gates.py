"""Accept a model, or not, by its figures: requirements such as ``agreement >= 95%``.

A requirement is the name of a figure, ``>=`` or ``<=``, and a bound. Figures in percent also
take the share ``0.95``; ``1.1x`` is a multiple of the baseline's. The figure decides, not its
interval.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from slimvlm.core.errors import ConfigError, RegressionError, shortened
from slimvlm.core.progress import Say
from slimvlm.evaluation.metrics import LIKELIHOODS, MME_FULL_SCORES, Estimate
from slimvlm.evaluation.on_data import DataResult
from slimvlm.evaluation.results import Result, average_of, comparable, guessed, task_difference

OF_DATA = ("loss", "perplexity", "increase", "agreement", "kl")  # `Figures`; kl: its divergence
COMPARED = ("increase", "agreement", "kl", "retention")  # compare with a baseline by themselves


def in_percent(tasks: Mapping[str, Any], has_data: bool = False) -> dict[str, bool]:
    """List the figures of tasks, or of their results, and of data: whether each is in percent."""
    found = {n: t.metric not in LIKELIHOODS and n not in MME_FULL_SCORES for n, t in tasks.items()}
    if any(getattr(task, "in_average", True) for task in tasks.values()):
        found |= {"avg": True, "retention": True}
    return found | ({name: name == "agreement" for name in OF_DATA} if has_data else {})


def parse(
    texts: Iterable[str], known: Mapping[str, bool], has_baseline: bool = True
) -> list[tuple[str, str, float, str]]:
    """Read requirements on `in_percent` figures as name, sign, bound and unit (%, x or none)."""
    found = []
    for text in texts:
        where = f"require {shortened(text)}"
        match = re.fullmatch(r"\s*(.+?)\s*(>=|<=)\s*(\d+\.?\d*|\.\d+)([x%]?)\s*", text)
        if match is None:
            raise ConfigError(f"{where} must be as 'agreement >= 95%' or 'loss <= 1.1x'")
        name, sign, number, unit = match.groups()
        if name not in known:
            names = ", ".join(known) or "those of --tasks, or of --data with test samples"
            raise ConfigError(f"{where}: figure {name!r} must be one of: {names}")
        bound, compares = float(number), name in COMPARED
        if bound > 1e9:
            raise ConfigError(f"{where}: bound {shortened(number)} must be at most 1e9")
        if known[name] and not unit and bound <= 1:
            unit, bound = "%", 100 * bound
        if unit != "%" * known[name] and (unit != "x" or compares):
            allowed = "a share up to 1 or a percentage as 95%" if known[name] else "a number"
            allowed += "" if compares else ", or 1.1x for a multiple of the baseline's"
            raise ConfigError(f"{where}: bound {number + unit!r} must be {allowed}")
        if not has_baseline and (unit == "x" or compares):
            raise ConfigError(f"{where} needs a baseline")
        found.append((name, sign, bound, unit))
    return found


def judge(
    texts: Iterable[str], results: Mapping[str, Result], on_data: Mapping[str, DataResult], say: Say
) -> None:
    """Report which requirements the last model meets, against the first; raise those it misses."""
    tasks, data, failed = [*results.values()], [*on_data.values()], list[str]()
    known = in_percent(tasks[-1].tasks if tasks else {}, bool(data))
    for name, sign, bound, unit in parse(texts, known):
        estimate, theirs = (
            _on_data(name, data[-1], data[0])
            if data and name in OF_DATA
            else _on_tasks(name, tasks[-1], tasks[0], unit == "x" or name in COMPARED, say)
        )
        times = theirs if unit == "x" else 1.0
        if estimate is None or not times or not math.isfinite(estimate.value):
            raise ConfigError(f"require {name!r}: the baseline has nothing to compare it with")
        about = f" ({bound:g} times the baseline's {times:.4f})" if unit == "x" else ""
        bound *= times
        told = f"{name}{' in percent' * known[name]} is {estimate:.4f}"
        is_met = estimate.value >= bound if sign == ">=" else estimate.value <= bound
        words = f"{'at least' if sign == '>=' else 'at most'} {bound:.4f}{about}"
        if is_met:
            say(f"accepted: {told}, {words}")
        else:
            failed.append(f"{told}, not {words}")
    if failed:
        raise RegressionError(f"regression: {'; '.join(failed)}")


Found = tuple[Estimate | None, float | None]  # a figure, and the baseline's


def _on_data(name: str, after: DataResult, before: DataResult) -> Found:
    if [sample.id for sample in after.samples] != [sample.id for sample in before.samples]:
        raise ConfigError(f"require {name!r}: the baseline has other samples")
    if after is not before and any(sample.baseline_loss is None for sample in after.samples):
        raise ConfigError(f"require {name!r}: some samples were not compared with the baseline")
    alike = sum(sample.same is not None for sample in after.samples)
    if name in ("agreement", "kl") and 2 * alike < len(after.samples):
        told = f"{alike} of {len(after.samples)} samples have the baseline's tokens"
        raise ConfigError(f"require {name!r}: only {told}; loss and increase compare all")
    field = "divergence" if name == "kl" else name
    theirs = getattr(before.figures, field)
    return getattr(after.figures, field), theirs and theirs.value


def _on_tasks(name: str, last: Result, first: Result, compares: bool, say: Say) -> Found:
    if name in last.tasks:
        if compares:
            comparable(last, first, [name])
        theirs = first.tasks[name].score if name in first.tasks else None
        task, spread = last.tasks[name], task_difference(name, last.tasks[name])
        ends = () if task.metric in LIKELIHOODS else (spread.low, spread.high)
        return Estimate(task.score, *ends), theirs
    counted = {n for result in (last, first) for n, t in result.tasks.items() if t.in_average}
    if compares:
        comparable(last, first, sorted(counted))
    guesses = {} if last is first else guessed(first)
    for guess, told in guesses.items():
        say(f"{name} leaves out {guess!r}: the baseline is not clearly above guessing ({told})")
    last, first = (
        replace(each, tasks={n: t for n, t in each.tasks.items() if n in counted - guesses.keys()})
        for each in (last, first)
    )
    if not last.tasks:
        raise ConfigError(f"require {name!r}: the baseline is clearly above guessing on no task")
    if name == "avg":
        spread = average_of(last.tasks)
        return Estimate(last.average, spread.low, spread.high), first.average
    kept = last.retention(first)
    bounds = () if math.isnan(kept.low) else (kept.low, kept.high)
    return Estimate(kept.percent, *bounds), None
