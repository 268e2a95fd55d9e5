"""Accept a model, or not, by its figures: requirements such as ``agreement >= 95%``.

A requirement is the name of a figure, ``>=`` or ``<=``, and a bound. Figures in percent take the
share ``0.95``, too; ``1.1x`` is a multiple of the baseline's. The figure decides, not its interval.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from slimvlm.core.errors import ConfigError, RegressionError, shortened
from slimvlm.core.progress import Say
from slimvlm.evaluation import metrics
from slimvlm.evaluation.metrics import LIKELIHOODS, MME_FULL_SCORES, Estimate
from slimvlm.evaluation.on_data import DataResult
from slimvlm.evaluation.results import Result

OF_DATA = {"loss": "loss", "perplexity": "perplexity", "increase": "increase"}
OF_DATA |= {"agreement": "agreement", "kl": "divergence"}
"""Fields of `slimvlm.evaluation.on_data.Figures` by their names in requirements."""
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
            names = ", ".join(known) or "those of --tasks, or of --data with unseen samples"
            raise ConfigError(f"{where}: figure {name!r} must be one of: {names}")
        bound, compares = float(number), name in COMPARED
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
    """Say which requirements the last model meets, beside the first; raise those that it misses."""
    found: dict[str, tuple[Estimate, float | None]] = {}  # with the baseline's figure
    tasks = [*results.values()][-1].tasks if results else {}
    known, failed = in_percent(tasks, bool(on_data)), []
    asked = parse(texts, known)
    if asked and results:
        first, last = ([*results.values()][place] for place in (0, -1))
        for name, task in tasks.items():
            spread = metrics.paired_difference([0.0] * len(task.scores), task.scores)
            bounds = () if task.metric in LIKELIHOODS else (spread.low, spread.high)
            other = first.tasks.get(name)
            theirs = other.score if other is not None and other.ids == task.ids else None
            found[name] = Estimate(task.score, *bounds), theirs
        if "avg" in known:
            ours = {name: task.scores for name, task in tasks.items() if task.in_average}
            spread = metrics.average_difference({n: [0.0] * len(s) for n, s in ours.items()}, ours)
            found["avg"] = Estimate(last.average, spread.low, spread.high), first.average
        if any(name == "retention" for name, *_ in asked):
            kept = last.retention(first)
            found["retention"] = Estimate(kept.percent, kept.low, kept.high), None
    if asked and on_data:
        before, after = ([*on_data.values()][place].figures for place in (0, -1))
        for name, field in OF_DATA.items():
            estimate, theirs = getattr(after, field), getattr(before, field)
            if estimate is not None:
                found[name] = estimate, theirs and theirs.value
    for name, sign, bound, unit in asked:
        estimate, theirs = found.get(name, (None, None))
        times = theirs if unit == "x" else 1.0
        if estimate is None or times is None:
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
