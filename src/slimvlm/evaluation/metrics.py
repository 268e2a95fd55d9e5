"""Score a reply, average scores, and estimate the retention of a smaller model."""

import inspect
import math
import re
import sys
import sysconfig
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from numpy.typing import NDArray

from slimvlm.core.errors import ConfigError, raised_as, shortened
from slimvlm.data.samples import Question

MME_FULL_SCORES = {"mme_cognition": 800.0, "mme_perception": 2000.0}
"""Scores that the study rescales to percent before averaging (arXiv:2507.20749, Sec. 4)."""
RESAMPLES = 1000  # bootstrap draws behind an interval


_THOUGHTS = r"(?s).*(?:</think(?:ing)?>|◁/think▷|\[/THINK\])"
THINKING = ("<think>", "<thinking>", "◁think▷", "[THINK]")
"""What a thought begins with."""
_MARKUP = (  # what lays a reply out, and what stays of it
    (r"(?s).*<answer>(.*?)</answer>.*", r"\1"),
    (r"(?s).*\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}.*", r"\1"),
    (r"\\(?:text|textbf|mathrm|mathbf)\{([^{}]*)\}", r"\1"),
    (r"\\([%$&#_])|\\[()\[\]]", r"\1"),
    (r"(?<!\w)(\*\*|__|\*|_|`)(?=\S)(.+?)(?<=\S)\1(?!\w)", r"\2"),
    (r"(?m)^\s*(?:#+|[-*•]|\d+[.)])\s+(?=\S)", ""),
)
_ENCLOSED = r"""["'“‘«„「『] ?([^"“”«»„「」『』]*?) ?["'”’»“」』]|\(([^()]*)\)|\$+([^$]+)\$+"""


def answer_of(reply: str) -> str:
    """Return what follows the thoughts of a reply; nothing if they were cut off."""
    answer = re.sub(_THOUGHTS, "", reply, count=1).strip()
    return "" if answer.startswith(THINKING) else answer


def plain(reply: str) -> str:
    """Take thoughts, Markdown and LaTeX off a reply; unify forms of characters (NFKC)."""
    text = unicodedata.normalize("NFKC", answer_of(reply))
    for pattern, rest in _MARKUP:
        text = re.sub(pattern, rest, text)
    return text


def concluded(text: str) -> str:
    """Return what follows the last ``answer is`` or ``answer:``, or all where nothing does."""
    return re.split(r"(?i)\banswer(?:\s+is\b:?|\s*:)\s*", text)[-1].strip() or text


def normalise(text: str) -> str:
    """Reduce a reply to its `plain` conclusion without case, quotes and stops at the end."""
    text = re.sub(r"\s+", " ", concluded(plain(text)).casefold())
    shorter = re.sub(r"(?<=[^\W\d])!+$", "", text.strip().rstrip(".。 "))
    while (match := re.fullmatch(_ENCLOSED, shorter)) is not None:
        shorter = (match[match.lastindex or 0]).strip().rstrip(".。 ")
    return shorter


def exact_match(reply: str, question: Question) -> float:
    """1 if the normalised reply is one of the answers."""
    return float(normalise(reply) in {normalise(answer) for answer in question.answers})


_LATIN = r"A-Za-z0-9À-ɏ"
# a capital letter alone, which is no article and no pronoun
_ONE = rf"(?<![{_LATIN}])(?<![{_LATIN}]['’])([A-Z])(?![{_LATIN}]|['’]\w|\.\w)"
_ONE += r"(?!(?<=[AI]) (?!(?:is|because|since|as|and|n?or|but)\b)[a-zà-ÿ])"
_RULED_OUT = (
    rf"(?i:\bnot|n't|\bneither|\bnor|\bthan|\binstead of)(?: be)?(?: option)? \(?{_ONE}\)?",
    rf"(?:{_ONE}(?:,? and|,? or|,) )*{_ONE} (?:is|are) (?:wrong|incorrect|false|not)\b",
)
_FIRST = rf"\W*(?:(?:option|choice) )?\W*{_ONE}(?!\s*(?:or|and|/|,|&)\s*\(?[A-Z]\b)"
_FIRST += r"|\W*([a-z])(?:[)\]]|[.:]?(?:\s*$|(?<=[.:])\s))"
_CHOSEN = rf"(?i:\bchoose|\bpick|\bselect|\bgo with|\bsay|\bso|\bit is|\bit's|choice is) \(?{_ONE}"


def letter(reply: str, question: Question) -> float:
    """1 if the reply chooses the answer's letter: at its beginning, at its end, or alone.

    The last "answer is" or "answer:" begins it. A letter that is ruled out ("not A"), the article
    "A" and the pronoun "I" do not count, and several letters are no answer.
    """
    text = plain(reply)
    for pattern in _RULED_OUT:
        text = re.sub(pattern, " ", text)
    text = concluded(text)
    listed = set(re.findall(rf"{_ONE}[).:]\s", text))
    first = re.match(_FIRST, text) if len(listed) < 2 else None
    found = re.findall(_CHOSEN, text)[-1:] or list(dict.fromkeys(re.findall(_ONE, text)))
    said = (first[1] or first[2]) if first else found[0] if len(found) == 1 else ""
    return float(said.lower() == normalise(question.answers[0]))


_NO_REPLY = r"\bno (?:idea|way|doubt|problem|information|matter|evidence)\b|\bnot (?:yes|no)\b"
_NO_REPLY += r"|\b(?:yes|no)\s*(?:and|or|/)\s*(?:yes|no)\b"


def yes_no(reply: str, question: Question) -> float:
    """1 if the reply, or its conclusion, says the right one of yes and no first, or it alone."""
    answer = normalise(question.answers[0])
    return float(_said(reply, answer) == answer)


def _said(reply: str, answer: str) -> str:
    """Return the one of yes, no and ``answer`` that a reply says; empty if none or both."""
    text = concluded(re.sub(_NO_REPLY, " ", plain(reply).casefold()))
    words, known = re.findall(r"\w+", text), {"yes", "no", answer}
    found = words[:1] if {*words[:1]} & known else {*words} & known
    return found.pop() if len(found) == 1 else ""


def set_f1(reply: str, question: Question) -> float:
    """F1 between the items of the reply and of the answer: lines, or between commas and "and"."""
    answer = question.answers[0]
    text = plain(reply) if ":" in answer else re.sub(r"^[^,:\n]*:\s+", "", plain(reply))
    found, wanted = _items(text), _items(answer)
    hits = len(found & wanted)
    return 2 * hits / (len(found) + len(wanted)) if hits else 0.0


def _items(text: str) -> set[str]:
    parts = re.split(r"(?i)[,;&、،\n]|\band\b", concluded(plain(text)).strip("[]. "))
    items = (re.sub(r"^(?:an?|the) ", "", normalise(part)) for part in parts)
    return {item for item in items if item}


def anls(reply: str, question: Question) -> float:
    """Levenshtein similarity to the best answer, 0 below one half (arXiv:1905.13648, Eq. 1)."""
    best = max(similarity(normalise(reply), normalise(answer)) for answer in question.answers)
    return best if best >= 0.5 else 0.0


def similarity(a: str, b: str) -> float:
    """One minus the edit distance over the longer length."""
    if not a and not b:
        return 1.0
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return 1 - row[-1] / max(len(a), len(b))


def f1(reply: str, question: Question) -> float:
    """F1 between the words, without articles, of reply and best answer (arXiv:1606.05250, 6.1)."""
    best, found = 0.0, _counted(reply)
    for answer in question.answers:
        wanted = _counted(answer)
        hits = (found & wanted).total()
        best = max(best, 2 * hits / (found.total() + wanted.total()) if hits else 0.0)
    return best


def _counted(text: str) -> Counter[str]:
    words = _words(text, "")
    return Counter([word for word in words if word not in ("a", "an", "the")] or words)


_NO_SPACES = r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]"


def _words(text: str, gap: str) -> list[str]:
    """Split into words, or characters of scripts without spaces; ``gap`` replaces other signs."""
    text = re.sub(_NO_SPACES, r" \g<0> ", plain(text).casefold())
    signs = ((c if c.isspace() or unicodedata.category(c)[0] in "LMN" else gap) for c in text)
    return "".join(signs).split()


def rouge_l(reply: str, question: Question) -> float:
    """ROUGE-L F1 with the best answer (Lin 2004), by the rouge-score package, without stemming."""
    words = SimpleNamespace(tokenize=lambda text: _words(text, " "))  # its own are of English only
    scorer = import_module("rouge_score.rouge_scorer").RougeScorer(["rougeL"], tokenizer=words)
    scores = scorer.score_multi(list(question.answers), reply)
    return float(scores["rougeL"].fmeasure)


Metric = Callable[[str, Question], float]  # reply and question → a score in [0, 1]
_OF_REPLIES = (exact_match, letter, yes_no, set_f1, anls, f1, rouge_l)
METRICS: dict[str, Metric] = {metric.__name__: metric for metric in _OF_REPLIES}
"""Metrics of a generated reply, each in [0, 1]."""
LIKELIHOODS = ("perplexity", "loss")  # of the given answer, without a reply; lower is better


def perplexity(loss: float) -> float:
    """Compute the exponential of a mean loss; above 700 nats it would overflow."""
    return math.exp(min(loss, 700.0))


def metric_named(name: str) -> Metric:
    """Find a metric of replies: one of `METRICS`, or a user's own ``package.module:function``."""
    if ":" in name:
        return _own_metric(name)
    if name not in METRICS:
        known = ", ".join((*METRICS, *LIKELIHOODS))
        raise ConfigError(
            f"metric {shortened(name)} must be one of: {known}; or a function, package:name"
        )
    if name == "rouge_l" and find_spec("rouge_score") is None:
        raise ConfigError("metric 'rouge_l' needs rouge-score: pip install 'slimvlm[rouge]'")
    return METRICS[name]


def _own_metric(name: str) -> Metric:
    """Import a plain function of two arguments, from a module of the user's own."""
    # a task file names it, and must not be able to call a function of an installed package
    module, _, attribute = name.partition(":")
    where = f"metric {shortened(name)}"
    top = module.partition(".")[0]
    with raised_as(ConfigError, Exception, f"{where}: cannot be imported"):
        spec = find_spec(top)
    places = [*(spec.submodule_search_locations or ()), spec.origin or ""] if spec else []
    installed = [str(Path(sysconfig.get_path(name)).resolve()) for name in ("purelib", "platlib")]
    parts = {"site-packages", "dist-packages", *installed}
    if top in {*sys.stdlib_module_names, "slimvlm"} or any(
        parts & {*Path(place).parts, *map(str, Path(place).resolve().parents)} for place in places
    ):
        told = "not of an installed package or of Python's library"
        raise ConfigError(f"{where}: must be a function of a module of your own, {told}")
    with raised_as(ConfigError, Exception, f"{where}: cannot be imported"):  # which runs it
        found = getattr(import_module(module), attribute, None)
    if not inspect.isfunction(found) or found.__module__ != module:
        raise ConfigError(f"{where}: {module} defines no function {attribute!r}")
    if len(inspect.signature(found).parameters) != 2:
        raise ConfigError(f"{where}: must take two arguments, the reply and the question")

    def checked(reply: str, question: Question) -> float:
        where = f"metric {name!r}: failed on question {question.id!r}"
        with raised_as(ConfigError, Exception, where):
            score = found(answer_of(reply), question)
        if not isinstance(score, bool | int | float) or not 0 <= score <= 1:
            raise ConfigError(
                f"metric {name!r}: gave {shortened(repr(score))} for question {question.id!r}, "
                "must give a number from 0 to 1"
            )
        return float(score)

    return checked


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


def majority_score(metric: str, questions: Sequence[Question]) -> float | None:
    """Compute the score of the best constant answer, in percent; None for a user's metric."""
    if ":" in metric:  # each call may take as long as another model's reply
        return None
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
    """A figure and its interval, if it has one."""

    value: float
    low: float | None = None
    high: float | None = None

    def __format__(self, spec: str) -> str:
        """Format figure and interval alike."""
        known = (number for number in (self.value, self.low, self.high) if number is not None)
        value, *ends = (format(number, spec or ".2f") for number in known)
        return f"{value} [{', '.join(ends)}]" if ends else value


@dataclass(frozen=True)
class Difference:
    """Mean difference of scores in percentage points, with its 95 % interval."""

    points: float
    low: float
    high: float

    @property
    def significant(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Retention:
    """A model's average over another one's, in percent, with 95 % intervals."""

    percent: float  # AVG-%: the ratio of the two averages (a ratio of means)
    low: float
    high: float
    floor: float  # AVG-% of the floors: without doing the tasks
    # the same ratio with the tasks' chance levels, or floors, subtracted from both averages; NaN if
    # the original is not above them
    above_chance: float
    above_floor: float = float("nan")
    # NaN if the original is above the floor in fewer than 97.5 % of draws: the ratio has no bounds
    above_floor_low: float = float("nan")
    above_floor_high: float = float("nan")

    def __str__(self) -> str:
        """Format AVG-% and its interval."""
        return f"{Estimate(self.percent, self.low, self.high):.1f}"

    def as_json(self) -> dict[str, float | None]:
        """Give the figures as plain values, None for NaN."""
        return {name: None if math.isnan(v) else v for name, v in vars(self).items()}


def retention(
    scores: Mapping[str, Sequence[float]],
    baseline: Mapping[str, Sequence[float]],
    chance: Mapping[str, float],
    floors: Mapping[str, float | Sequence[float]] | None = None,
) -> Retention:
    """Compute AVG-% with a paired bootstrap over questions.

    Per task, ``scores`` and ``baseline`` have one score in [0, 1] for each question; questions are
    drawn within tasks, the same for both models. ``chance`` is in percent. ``floors`` are scores
    without doing the task: in percent, or one for each question, drawn with the models' answers.
    """
    given = floors if floors is not None else chance
    floor_scores: dict[str, Sequence[float]] = {}
    for name in scores:
        level = given[name]
        if isinstance(level, (int, float)):  # on the scale of the task's scores
            level = [level / 100 * MME_FULL_SCORES.get(name, 100.0) / 100] * len(scores[name])
        floor_scores[name] = level
    found = _averages(scores, baseline, floor_scores)
    (ours, mean), (theirs, base), (floor, floor_mean) = found
    guessed = float(np.mean([chance[name] for name in scores]))
    above_chance, above_floor = (
        100 * (mean - level) / (base - level) if base > level else float("nan")
        for level in (guessed, floor_mean)
    )
    low, high = np.percentile(100 * ours / np.maximum(theirs, 1e-9), [2.5, 97.5])
    reached, above_floor_bounds = theirs > floor, list[float]()
    if reached.mean() >= 0.975:
        ratios = 100 * (ours - floor)[reached] / (theirs - floor)[reached]
        above_floor_bounds = np.percentile(ratios, [2.5, 97.5]).tolist()
    percent, floor_percent = (100 * level / max(base, 1e-9) for level in (mean, floor_mean))
    above = (above_chance, above_floor, *above_floor_bounds)
    return Retention(percent, float(low), float(high), floor_percent, *above)


def average_difference(
    a: Mapping[str, Sequence[float]], b: Mapping[str, Sequence[float]]
) -> Difference:
    """Compute AVG of ``b`` minus AVG of ``a``, with a paired bootstrap within each task."""
    (first, first_mean), (second, second_mean) = _averages(a, b)
    low, high = np.percentile(second - first, [2.5, 97.5])
    return Difference(points=second_mean - first_mean, low=float(low), high=float(high))


def _averages(*models: Mapping[str, Sequence[float]]) -> list[tuple[NDArray[np.float64], float]]:
    """Compute AVG of each model in every draw, and on all questions; all share the draws."""
    generator = np.random.default_rng(0)
    drawn = np.zeros((len(models), RESAMPLES))
    for name in models[0]:
        count = len(models[0][name])
        draws = generator.integers(0, count, (RESAMPLES, count))
        scale = 100 * 100 / MME_FULL_SCORES.get(name, 100.0) / len(models[0])
        drawn += scale * np.stack([np.asarray(m[name], float)[draws].mean(1) for m in models])
    means = [average({n: 100 * float(np.mean(m[n])) for n in models[0]}) for m in models]
    return list(zip(drawn, means, strict=True))


def paired_difference(a: Sequence[float], b: Sequence[float]) -> Difference:
    """Compute the mean of ``b - a`` with a paired bootstrap over questions (Koehn 2004, EMNLP).

    Where only a few answers differ, the interval is narrower than it should be: an exact sign test
    needs at least six answers that all changed the same way before it reaches 5 %.
    """
    if len(a) != len(b) or not len(a):
        raise ValueError(f"scores must be of the same questions: {len(a)} and {len(b)} were given")
    return average_difference({"": a}, {"": b})


def signed(value: float) -> str:
    """Format a signed number with one digit; zero has no sign."""
    rounded = round(value, 1)
    return f"{rounded:+.1f}" if rounded else "0.0"
