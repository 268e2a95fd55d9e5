"""Score a reply, average scores, and estimate the retention of a compressed model."""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from rapidfuzz.distance import Levenshtein

from slimvlm.core.errors import ConfigError, shortened
from slimvlm.core.tables import read_table
from slimvlm.data.samples import Question

MME_FULL_SCORES = {"mme_cognition": 800.0, "mme_perception": 2000.0}
"""Scores that the paper rescales to percent before averaging (arXiv:2507.20749, Sec. 4)."""

_PATTERNS = read_table(__file__, "replies.yaml")
_LETTERS = {k: v.replace("LETTER", _PATTERNS["letter"]) for k, v in _PATTERNS["letters"].items()}
THINKING = tuple(_PATTERNS["thinking"])  # what a thought begins with


def answer_of(reply: str) -> str:
    """Return what follows the thoughts of a reply; nothing if they were cut off."""
    answer = re.split(_PATTERNS["thoughts"], reply)[-1].strip()
    return "" if answer.startswith(THINKING) else answer


def plain(reply: str) -> str:
    """Take thoughts, Markdown and LaTeX off a reply; unify forms of characters (NFKC)."""
    text = re.sub("[⁰¹²³⁴-⁹]+", r"^\g<0>", answer_of(reply))  # 5² is not 52
    text = unicodedata.normalize("NFKC", text)
    begun, end, _ = text.rpartition("</answer>")
    text = begun.rpartition("<answer>")[2] if end and "<answer>" in begun else text
    _, mark, boxed = text.rpartition(r"\boxed{")
    if mark and (match := re.match(r"((?:[^{}]|\{[^{}]*\})*)\}", boxed)):
        text = match[1]
    for pattern, rest in _PATTERNS["markup"]:
        while text != (text := re.sub(pattern, rest, text)):
            pass  # inside one another
    return text


def concluded(text: str) -> str:
    """Return what follows the last ``answer is`` or ``answer:``, or all where nothing does."""
    return re.split(r"(?i)\banswer(?:\s+is\b:?|\s*:)\s*", text)[-1].strip() or text


def normalise(text: str) -> str:
    """Reduce a reply to its `plain` conclusion without case, quotes and stops at the end."""
    text = re.sub(r"\s+", " ", concluded(plain(text)).casefold())
    shorter = re.sub(r"(?<=[^\W\d])!+$", "", text.strip().rstrip(".。 "))
    while (match := re.fullmatch(_PATTERNS["enclosed"], shorter)) is not None:
        shorter = (match[match.lastindex or 0]).strip().rstrip(".。 ")
    return shorter


def _letter_of(reply: str) -> str:
    """Return the letter that a reply chooses: at its beginning, at its end, or alone.

    The last "answer is" or "answer:" begins it. A letter that is ruled out ("not A"), the article
    "A" and the pronoun "I" do not count, and several letters are no answer. Answers may be written
    as replies are: "B. The cat".
    """
    text = re.sub(_LETTERS["negated"], " ", plain(reply))
    text = concluded(re.sub(_LETTERS["wrong"], " ", text))
    alone, listed = (dict.fromkeys(re.findall(_LETTERS[k], text)) for k in ("alone", "listed"))
    first = re.match(_LETTERS["first"], text) if len(listed) < 2 else None
    found = re.findall(_LETTERS["chosen"], text)[-1:] or list(alone)
    said: str = (first[1] or first[2]) if first else found[0] if len(found) == 1 else ""
    return said.lower()


def yes_no(reply: str, question: Question) -> float:
    """1 if the reply, or its conclusion, says the right one of yes and no first, or it alone."""
    return float(any(_said(reply, a) == a for a in map(normalise, question.answers)))


def _said(reply: str, answer: str) -> str:
    """Return the one of yes, no and ``answer`` that a reply says; empty if none or both."""
    text = concluded(re.sub(_PATTERNS["no_reply"], " ", plain(reply).casefold()))
    words, known = re.findall(r"\w+", text), {"yes", "no", answer}
    found = words[:1] if {*words[:1]} & known else {*words} & known
    return found.pop() if len(found) == 1 else ""


def set_f1(reply: str, question: Question) -> float:
    """F1 between the items of the reply and of the answer: lines, or between commas and "and"."""
    text = plain(reply)
    bare = Counter(_items(re.sub(r"^[^,:\n]*:\s+", "", text)))
    whole, pairs = Counter(_items(text)), [(a, Counter(_items(a))) for a in question.answers]
    return max(_f1(whole if ":" in answer else bare, wanted) for answer, wanted in pairs)


def _items(text: str) -> set[str]:
    parts = re.split(r"(?i)[,;&、،\n]|\band\b", concluded(plain(text)).strip("[]. "))
    items = (re.sub(r"^(?:an?|the) ", "", normalise(part)) for part in parts)
    return {item for item in items if item}


def _bag(text: str) -> Counter[str]:
    """Count words, or characters of scripts without spaces; articles only if all are."""
    text = re.sub(_PATTERNS["no_spaces"], r" \g<0> ", plain(text).casefold())
    words = "".join(c for c in text if c.isspace() or unicodedata.category(c)[0] in "LMN").split()
    return Counter([word for word in words if word not in ("a", "an", "the")] or words)


def _f1(found: Counter[str], wanted: Counter[str]) -> float:
    hits = (found & wanted).total()
    return 2 * hits / (found.total() + wanted.total()) if hits else 0.0


Metric = Callable[[str, Question], float]  # reply and question → a score in [0, 1]


def _best(read: Callable[[str], Any], alike: Callable[[Any, Any], float]) -> Metric:
    """Make a metric: the similarity of the reply to the best answer, both read in one way."""

    def metric(reply: str, question: Question) -> float:
        found = read(reply)
        return max((alike(found, read(answer)) for answer in question.answers), default=0.0)

    return metric


METRICS: dict[str, Metric] = {
    "exact_match": _best(normalise, lambda a, b: float(a == b)),
    "letter": _best(_letter_of, lambda a, b: float(a == b != "")),
    "yes_no": yes_no,
    "set_f1": set_f1,
    # Levenshtein similarity, 0 below one half (arXiv:1905.13648, Eq. 1)
    "anls": _best(
        normalise, lambda a, b: Levenshtein.normalized_similarity(a, b, score_cutoff=0.5)
    ),
    "f1": _best(_bag, _f1),  # of words (arXiv:1606.05250, 6.1)
}
LIKELIHOODS = ("perplexity", "loss")  # of the given answer, without a reply; lower is better


def perplexity(loss: float) -> float:
    """Compute the exponential of a mean loss; above 700 nats it would overflow."""
    return math.exp(min(loss, 700.0))


def metric_named(name: str) -> Metric:
    """Find a metric of replies: one of `METRICS`."""
    if name not in METRICS:
        known = ", ".join((*METRICS, *LIKELIHOODS))
        raise ConfigError(f"metric {shortened(name)} must be one of: {known}")
    return METRICS[name]


def yes_no_details(replies: Sequence[str], questions: Sequence[Question]) -> dict[str, float]:
    """Compute F1 of "yes" and the share of yes replies, in percent, as POPE reports them."""
    found = [_said(reply, "yes") == "yes" for reply in replies]
    true = [normalise(question.answers[0]) == "yes" for question in questions]
    hits = sum(s and t for s, t in zip(found, true, strict=True))
    f1 = 2 * hits / (sum(found) + sum(true)) if hits else 0.0
    return {"f1": 100 * f1, "yes_rate": 100 * sum(found) / max(len(found), 1)}


def average(scores: Mapping[str, float]) -> float:
    """Compute AVG: the mean over tasks, MME's rescaled to percent (arXiv:2507.20749, Sec. 4)."""
    return float(np.mean([s * 100 / MME_FULL_SCORES.get(n, 100.0) for n, s in scores.items()]))


def majority_score(metric: str, questions: Sequence[Question]) -> float:
    """Compute the score of the best constant answer, in percent."""
    accepted = Counter(a for q in questions for a in {normalise(answer) for answer in q.answers})
    frequent = accepted.most_common(8)
    candidates = [answer for i, (answer, count) in enumerate(frequent) if count > 1 or i == 0]
    if metric == "set_f1":
        items = Counter(item for q in questions for item in _items(q.answers[0]))
        common = [item for item, _ in items.most_common(8)]
        candidates += [", ".join(common[:count]) for count in range(1, len(common) + 1)]
    score = metric_named(metric)
    means = [float(np.mean([score(answer, q) for q in questions])) for answer in candidates]
    return 100 * max(means, default=0.0)


@dataclass(frozen=True)
class Estimate:
    """A figure and its interval, if it has one; a difference of scores is in percentage points."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def significant(self) -> bool:
        """Whether the interval excludes 0."""
        return (self.low or 0.0) > 0 or (self.high or 0.0) < 0

    def as_points(self) -> dict[str, float | None]:
        """Give a difference of scores as plain values."""
        return {"points": self.value, "low": self.low, "high": self.high}

    def __format__(self, spec: str) -> str:
        """Format figure and interval alike."""
        known = (number for number in (self.value, self.low, self.high) if number is not None)
        value, *ends = (format(number, spec or ".2f") for number in known)
        return f"{value} [{', '.join(ends)}]" if ends else value


@dataclass(frozen=True)
class Retention:
    """A model's average over another one's, in percent, with 95 % intervals; NaN is unknown."""

    percent: float  # AVG-%: the ratio of the two averages; NaN if the original has nothing right
    low: float  # the bounds are NaN if the original is not clearly above 0
    high: float
    floor: float  # AVG-% of the floors: without doing the tasks
    # the same ratio with the tasks' chance levels, or floors, subtracted from both averages; NaN if
    # the original is not above them, and the bounds if it is not clearly above them
    above_chance: float
    above_floor: float = float("nan")
    above_floor_low: float = float("nan")
    above_floor_high: float = float("nan")

    def __str__(self) -> str:
        """Format AVG-% and its interval."""
        return kept_text(self.percent, self.low, self.high)

    def as_json(self) -> dict[str, float | None]:
        """Give the figures as plain values, None for NaN."""
        return {name: None if math.isnan(v) else v for name, v in vars(self).items()}


def kept_text(percent: float | None, low: float | None, high: float | None) -> str:
    """Format a retention: a dash for None or NaN, and "no bounds" in place of such bounds."""
    if percent is None or math.isnan(percent):
        return "-"
    if low is None or high is None or math.isnan(low):
        return f"{percent:.1f} [no bounds]"
    return f"{Estimate(percent, low, high):.1f}"


# Intervals: Student's t on a delete-one jackknife over images; wider than a bootstrap's for few.
# Answers are a table with a row for each question: its task, its picture (questions about one are
# no independent evidence), and the scores of models as shares of the full score.

Values = NDArray[np.float64]


def t_quantile(freedom: int) -> float:
    """Compute the 97.5 % quantile of Student's t, from 5 on to 0.3 % (Gaver and Kafadar 1984)."""
    if freedom < 5:
        return (math.inf, 12.706, 4.303, 3.182, 2.776)[freedom]
    return math.sqrt(freedom * math.expm1(3.84146 * (freedom - 1.5) / (freedom - 1) ** 2))


def _by_group(rows: Sequence[Values], groups: Sequence[str]) -> Values:
    """Sum the columns of each group; an empty name is a group of its own."""
    names = [name or f"alone {i}" for i, name in enumerate(groups)]
    _, places = np.unique(names, return_inverse=True)
    return np.stack([np.bincount(places, row) for row in rows])


def _jackknife(sums: Values, sizes: Values, log: bool = False, scale: Any = 1.0) -> Values:
    """Compute the covariance of sums over sizes (CR3 of Cameron and Miller 2015), or of logs."""
    left = (sums.sum(1, keepdims=True) - sums) / (sizes.sum() - sizes)
    left = np.log(left) if log else left
    apart = (left - left.mean(1, keepdims=True)) * scale
    return np.asarray(apart @ apart.T)


def _shares(table: Values, answered: int, parts: int = 1) -> tuple[Values, Values, int]:
    """Estimate means of shares, their covariance and its degrees of freedom; the last row counts.

    Two questions are added on which the first ``answered`` rows differ (Bonett and Price 2012):
    else answers that are all alike would leave no doubt, however few they are. They are divided
    among the ``parts`` of an average, and weigh more where questions share images.
    """
    sums, sizes, scale = table[:-1], table[-1], np.ones(table.shape[1])
    if answered:
        weight = math.sqrt(sizes.mean()) / parts
        added = np.repeat(sums.sum(1, keepdims=True) / sizes.sum(), 2, axis=1)
        added[:answered] = np.eye(2)[:answered]
        sums, sizes = np.hstack([sums, weight * added]), np.append(sizes, [weight] * 2)
        scale = np.append(scale, [math.sqrt(parts)] * 2)
    spread = _jackknife(sums, sizes, scale=scale) if len(sizes) > 1 else np.eye(len(sums))
    return sums.sum(1) / sizes.sum(), spread, table.shape[1] - 1


def _averages(
    answers: pd.DataFrame, models: Sequence[str], answered: int
) -> tuple[Values, Values, Values, float]:
    """Compute AVG of each model as a share, its centre and covariance, and the quantile of t."""
    parts, found = answers["task"].nunique(), []
    for _, rows in answers.groupby("task", sort=False):
        scores = rows[models].to_numpy().T
        table = _by_group([*scores, np.ones(len(rows))], rows["picture"].tolist())
        found.append((scores.mean(1), *_shares(table, answered, parts)))
    means, centres, spreads, freedoms = zip(*found, strict=True)
    covariance = np.sum(spreads, 0) / parts**2
    return np.mean(means, 0), np.mean(centres, 0), covariance, t_quantile(sum(freedoms))


def _quotient(centre: Values, covariance: Values, times: float) -> tuple[float, float]:
    """Compute Fieller's interval of the first mean over the second (1954), in percent, or NaN."""
    squares = np.outer(centre, centre) - times**2 * covariance
    if not squares[1, 1] > 0:
        return math.nan, math.nan
    root = math.sqrt(max(squares[0, 1] ** 2 - squares[0, 0] * squares[1, 1], 0.0))
    low, high = (100 * (squares[0, 1] + sign * root) / squares[1, 1] for sign in (-1, 1))
    return float(low), float(high)


def retention(answers: pd.DataFrame) -> Retention:
    """Compute AVG-% with a paired interval.

    Answers have the columns ``ours``, ``theirs``, ``floor`` (scores without doing the task) and
    ``chance``.
    """
    means, centre, covariance, times = _averages(answers, ["ours", "theirs", "floor"], 2)
    ours, base, floor = means.tolist()
    chance = float(answers.groupby("task")["chance"].mean().mean())
    percent, above_chance, above_floor = (  # None is above what it equals up to rounding
        100 * (ours - level) / (base - level)
        if base > level and not math.isclose(base, level)
        else math.nan
        for level in (0.0, chance, floor)
    )
    low, high = _quotient(centre[:2], covariance[:2, :2], times)
    apart, above = np.array([[1, 0, -1], [0, 1, -1]]), (math.nan, math.nan)
    if not math.isnan(above_floor):
        above = _quotient(apart @ centre, apart @ covariance @ apart.T, times)
    return Retention(
        percent=percent,
        low=min(max(low, 0.0), percent),
        high=max(high, percent),
        floor=100 * floor / base if base > 0 else math.nan,
        above_chance=above_chance,
        above_floor=above_floor,
        above_floor_low=min(above[0], above_floor),
        above_floor_high=max(above[1], above_floor),
    )


def average_difference(answers: pd.DataFrame, bounded: bool = True) -> Estimate:
    """Compute AVG of ``ours``, minus ``theirs`` if there; losses are not ``bounded`` by 0 and 1."""
    models = [model for model in ("ours", "theirs") if model in answers]
    sign = np.array([1, -1])[: len(models)]
    means, centre, covariance, times = _averages(answers, models, len(models) * bounded)
    mean, middle, variance = map(float, (sign @ means, sign @ centre, sign @ covariance @ sign))
    reach = times * math.sqrt(variance)
    low, high = min(middle - reach, mean), max(middle + reach, mean)
    if bounded:
        low, high = max(low, 1.0 - len(models)), min(high, 1.0)
    return Estimate(100 * mean, 100 * low, 100 * high)


def share_interval(hits: Values, counts: Values, groups: Sequence[str]) -> Estimate:
    """Compute the share of hits among counts, in percent, and its interval over groups."""
    share = float(hits.sum() / counts.sum())
    (centre,), spread, freedom = _shares(_by_group([hits, counts], groups), 1)
    if not freedom:
        return Estimate(100 * share)
    reach = t_quantile(freedom) * math.sqrt(float(spread.sum()))
    low, high = max(min(centre - reach, share), 0.0), min(max(centre + reach, share), 1.0)
    return Estimate(100 * share, float(100 * low), float(100 * high))


def ratio_interval(
    numbers: Values, counts: Values, groups: Sequence[str], positive: bool = False
) -> Estimate:
    """Divide sums; the interval over groups is one of the logarithm for what is ``positive``."""
    table = _by_group([numbers, counts], groups)
    value = float(numbers.sum() / counts.sum())
    sums, sizes = table[:1], table[1]
    if len(sizes) < 3:
        return Estimate(value)
    is_log = positive and value > 0 and bool((sums.sum() > sums).all())
    # a degree of freedom less than of shares: losses are skewed
    reach = t_quantile(len(sizes) - 2) * math.sqrt(_jackknife(sums, sizes, is_log).sum())
    if is_log:
        return Estimate(value, value * math.exp(-reach), value * math.exp(min(reach, 600.0)))
    return Estimate(value, value - reach, value + reach)
