"""What a results table says on the claims of the study that slimvlm implements.

Reference:
    Huang et al. 2025, arXiv:2507.20749, and its journal version, arXiv:2604.24380. The wording of
    each claim is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import pandas as pd

from slimvlm.core.options import parse_loss

Verdict = Literal["agrees", "does not", "not measured"]
LOW, HIGH = 0.35, 0.40
"""Ratios up to the first are mild, from the second on severe."""
MILDEST, HARSHEST = 0.20, 0.55
"""Ratios up to the first stand for 15 %, from the second on for 60 %."""
JOINT = ("lora", "full")
"""What trains when not only the projector does."""


@dataclass(frozen=True)
class Claim:
    """One claim against one results table.

    Attributes:
        name: T1 to T10.
        statement: The claim.
        verdict: Whether every comparison that the table allows agrees with it.
        numbers: The comparisons, in words; empty if there are none.
    """

    name: str
    statement: str
    verdict: Verdict
    numbers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """One comparison that a claim rests on.

    Attributes:
        holds: Whether it is as claimed.
        words: What was compared, with the numbers.
    """

    holds: bool
    words: str


def claims_of(table: pd.DataFrame) -> list[Claim]:
    """Set every claim against the finished cells of a results table.

    Numbers are means over seeds. "At least" allows one standard deviation over seeds where there
    are several, else half of the wider 95 % interval over questions.
    """
    done = table[(table["status"] == "done") & (table["axis"] != "original")]
    groups = _groups(done)
    originals = table[(table["axis"] == "original") & (table["status"] == "done")]
    claims = []
    for name, (statement, compare) in CLAIMS.items():
        found = list(compare(groups, originals)) if len(done) else []
        verdict: Verdict = "not measured"
        if found:
            verdict = "agrees" if all(one.holds for one in found) else "does not"
        numbers = tuple(("" if one.holds else "not: ") + one.words for one in found)
        claims.append(Claim(name, statement, verdict, numbers))
    return claims


def claims_text(claims: Sequence[Claim]) -> str:
    """Claims as Markdown."""
    lines = ["| claim | says | here |", "|---|---|---|"]
    lines += [f"| {c.name} | {c.statement} | {c.verdict} |" for c in claims]
    for claim in claims:
        if claim.numbers:
            lines += ["", f"**{claim.name}: {claim.verdict}.**"]
            lines += [f"- {line}" for line in claim.numbers]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Group:
    """The cells that differ in their seed only.

    Attributes:
        row: What they share, and the means of what they measured.
        margin: How far AVG-% may be off.
    """

    row: pd.Series
    margin: float

    @property
    def percent(self) -> float:
        """Mean AVG-%."""
        return float(self.row["avg_percent"])

    @property
    def ratio(self) -> float:
        """The asked ratio."""
        return float(self.row["ratio"])

    def of(self, name: str) -> float:
        """The mean of a column; NaN if it was not measured."""
        return float(self.row[name])

    def is_like(self, **wanted: object) -> bool:
        """Whether columns have these values."""
        return all(self.row[key] == value for key, value in wanted.items())


_SAME = (
    *("model", "axis", "ratio", "criterion", "allocation", "repair"),
    *("recovery", "train", "loss", "fraction", "options"),
)
_MEASURED = ("avg_percent", "avg_free", "avg_choice", "avg_pictures", "avg_text")


def _groups(done: pd.DataFrame) -> list[Group]:
    """Means over seeds."""
    groups = []
    for _, cells in done.groupby(list(_SAME), sort=False, dropna=False):
        row = cells.iloc[0].copy()
        for name in _MEASURED:
            row[name] = pd.to_numeric(cells[name]).mean()
        spread = (cells["avg_percent_high"] - cells["avg_percent_low"]).mean() / 2
        margin = cells["avg_percent"].std() if len(cells) > 1 else spread
        groups.append(Group(row, float(margin)))
    return groups


Groups = Sequence[Group]
Comparisons = Iterable[Comparison]


def _losses(group: Group) -> frozenset[str]:
    loss = str(group.row["loss"])
    return frozenset() if loss == "none" else frozenset(parse_loss(loss))


def _trained(groups: Groups, *losses: str, train: Sequence[str] = JOINT) -> list[Group]:
    """Cells trained with exactly these losses."""
    return [g for g in groups if _losses(g) == frozenset(losses) and g.row["train"] in train]


def _untrained(groups: Groups) -> list[Group]:
    return [g for g in groups if g.is_like(recovery="none", repair="none")]


def _pairs(first: Groups, second: Groups, *shared: str) -> list[tuple[Group, Group]]:
    """All pairs that agree in some columns."""
    return [
        (a, b) for a in first for b in second if all(a.row[key] == b.row[key] for key in shared)
    ]


def _axes(groups: Groups) -> list[tuple[Group, Group]]:
    """Width and depth cells that differ in nothing else that a user chose."""
    width = [g for g in groups if g.is_like(axis="width")]
    depth = [g for g in groups if g.is_like(axis="depth")]
    return _pairs(width, depth, "model", "ratio", "recovery", "fraction", "repair")


def _at(group: Group) -> str:
    return f"{group.row['model']} {group.ratio:.0%}"


def _share(group: Group) -> str:
    return f"{group.row['fraction']:.0%} of the data"


def _at_least(a: Group, b: Group) -> tuple[bool, str]:
    """Whether the first keeps as much as the second, and how that is said."""
    margin = max(a.margin, b.margin)
    return a.percent >= b.percent - margin, f"{a.percent:.1f} and {b.percent:.1f} ± {margin:.1f}"


def _t1(groups: Groups, originals: pd.DataFrame) -> Comparisons:
    for width, depth in _axes(_untrained(groups)):
        if width.ratio <= LOW:
            words = f"{_at(width)}: width {width.percent:.1f}, depth {depth.percent:.1f}"
            yield Comparison(width.percent > depth.percent, words)


def _t2(groups: Groups, originals: pd.DataFrame) -> Comparisons:
    for width, depth in _axes(_untrained(groups)):
        names = ("avg_free", "avg_choice")
        if width.ratio > LOW or not all(width.of(name) > 0 for name in names):
            continue
        free, choice = (100 * (1 - depth.of(name) / width.of(name)) for name in names)
        words = f"{_at(width)}: depth scores {free:.1f} % below width on free answers"
        yield Comparison(bool(free > choice), f"{words}, {choice:.1f} % on chosen ones")


def _t3(groups: Groups, originals: pd.DataFrame) -> Comparisons:
    for group in _untrained(groups):
        if group.ratio >= HIGH and group.row["axis"] in ("width", "depth"):
            words = f"{_at(group)} {group.row['axis']}: {group.percent:.1f}"
            yield Comparison(group.percent < 50, words)


def _t4(groups: Groups, originals: pd.DataFrame) -> Comparisons:
    for width, depth in _axes(_trained(groups, "sft")):
        if width.ratio <= LOW:
            holds, words = _at_least(depth, width)
            yield Comparison(holds, f"{_at(width)}, {_share(width)}: depth and width {words}")


def _t5(groups: Groups, originals: pd.DataFrame) -> Comparisons:
    for width, depth in _axes(_trained(groups, "sft")):
        if width.ratio >= HIGH:
            holds, words = _at_least(width, depth)
            yield Comparison(holds, f"{_at(width)}, {_share(width)}: width and depth {words}")


_CELL = ("model", "axis", "ratio", "criterion", "allocation", "repair", "fraction")


def _t6(groups: Groups, originals: pd.DataFrame) -> Comparisons:
    projector = _trained(groups, "sft", train=("projector",))
    for alone, joint in _pairs(projector, _trained(groups, "sft"), *_CELL):
        words = f"{_at(alone)} {alone.row['axis']}: projector {alone.percent:.1f}"
        words += f", {joint.row['train']} {joint.percent:.1f}"
        if alone.ratio <= MILDEST:
            yield Comparison(alone.percent >= 0.95 * joint.percent, words)
        elif alone.ratio >= HIGH:
            yield Comparison(joint.percent - alone.percent > 5, words)


def _t7(groups: Groups, originals: pd.DataFrame) -> Comparisons:
    names = ("avg_pictures", "avg_text")
    whole = {
        row["model"]: [float(row[name] or 0) for name in names] for _, row in originals.iterrows()
    }
    for group in _untrained(groups):
        bases = whole.get(group.row["model"], [])
        if not bases or not all(base > 0 for base in bases):
            continue
        sight, text = (100 * (1 - group.of(n) / base) for n, base in zip(names, bases, strict=True))
        words = (
            f"{_at(group)} {group.row['axis']}: with pictures -{sight:.1f} %, text -{text:.1f} %"
        )
        if group.ratio <= MILDEST:
            yield Comparison(sight > text, words)
        elif group.ratio >= HIGH:
            yield Comparison(abs(sight - text) <= 10, words)


def _t8(groups: Groups, originals: pd.DataFrame) -> Comparisons:
    order = ("sft", "rkl", "kl", "hidden")
    for sft in _trained(groups, "sft"):
        same = [b for name in order[1:] for _, b in _pairs([sft], _trained(groups, name), *_CELL)]
        same = [group for group in same if group.row["train"] == sft.row["train"]]
        ranked = [sft, *same]
        words = f"{_at(sft)} {sft.row['axis']}: " + ", ".join(
            f"{group.row['loss']} {group.percent:.1f}" for group in ranked
        )
        if same and sft.ratio <= MILDEST:
            yield Comparison(all(abs(g.percent - sft.percent) <= 5 for g in same), words)
        elif same and sft.ratio >= HARSHEST:
            falls = all(a.percent >= b.percent for a, b in pairwise(ranked))
            yield Comparison(falls, words)


def _t9(groups: Groups, originals: pd.DataFrame) -> Comparisons:
    both = _trained(groups, "sft", "hidden")
    for ours, sft in _pairs(both, _trained(groups, "sft"), *_CELL, "train"):
        holds, words = _at_least(ours, sft)
        where = f"{_at(ours)} {ours.row['axis']}, {_share(ours)}"
        yield Comparison(holds, f"{where}: sft+hidden and sft {words}")
    rivals = [g for name in ("kl", "rkl") for g in _trained(groups, "sft", name)]
    won = [_at_least(a, b)[0] for a, b in _pairs(both, rivals, *_CELL, "train")]
    if won:
        words = f"sft+hidden is at least sft+kl or sft+rkl in {sum(won)} of {len(won)} cells"
        yield Comparison(2 * sum(won) > len(won), words)
    threes = [g for name in ("kl", "rkl") for g in _trained(groups, "sft", "hidden", name)]
    kept = [_at_least(a, b)[0] for a, b in _pairs(both, threes, *_CELL, "train")]
    if kept:
        words = f"a third loss gains nothing in {sum(kept)} of {len(kept)} cells"
        yield Comparison(2 * sum(kept) > len(kept), words)


def _t10(groups: Groups, originals: pd.DataFrame) -> Comparisons:
    shared = [key for key in (*_CELL, "recovery") if key != "fraction"]
    for whole in [g for g in groups if g.is_like(fraction=1.0) and g.row["recovery"] != "none"]:
        parts = [b for _, b in _pairs([whole], groups, *shared) if b.row["fraction"] < 1]
        series = [*sorted(parts, key=lambda g: float(g.row["fraction"])), whole]
        if not parts:
            continue
        words = f"{_at(whole)} {whole.row['axis']} {whole.row['recovery']}: " + ", ".join(
            f"{_share(g)} {g.percent:.1f}" for g in series
        )
        share = series[0].percent / max(whole.percent, 1e-9)
        rises = all(_at_least(b, a)[0] for a, b in pairwise(series))
        if whole.ratio >= HARSHEST:
            yield Comparison(rises and share < 0.9, words)
        else:
            yield Comparison(rises and share >= 0.9, words)


CLAIMS: dict[str, tuple[str, Callable[[Groups, pd.DataFrame], Comparisons]]] = {
    "T1": ("without recovery, width keeps more than depth at 15-30 %", _t1),
    "T2": ("that gap is wider on free answers than on chosen ones", _t2),
    "T3": ("without recovery both keep less than 50 % from 45 % on", _t3),
    "T4": ("after SFT of the backbone, depth keeps at least as much up to 30 %", _t4),
    "T5": ("after SFT of the backbone, width keeps at least as much from 45 % on", _t5),
    "T6": ("the projector alone gives 95 % of that at 15 %, over 5 points less from 45 % on", _t6),
    "T7": ("without recovery, answers on pictures suffer more at 15 %, alike from 45 % on", _t7),
    "T8": ("distillation alone equals SFT at 15 %; at 60 % SFT > reverse KL >= KL > hidden", _t8),
    "T9": ("SFT + hidden is at least SFT everywhere, and SFT + KL mostly", _t9),
    "T10": (
        "5 % of the data gives 90 % of all of it up to 45 %, less at 60 %; more is better",
        _t10,
    ),
}
"""Statement of each claim, and the comparisons that it rests on."""
