"""Compare a results table with the claims of the study that slimvlm implements.

Reference:
    Huang et al. 2025, arXiv:2507.20749, and its journal version, arXiv:2604.24380. The wording of
    each claim is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter
from typing import Any, Literal

import pandas as pd

from slimvlm.core.options import parse_loss

Verdict = Literal["agrees", "does not", "not measured"]
LOW, HIGH = 0.35, 0.40
"""Ratios up to the first are mild, from the second on severe."""
MILDEST, HARSHEST = 0.20, 0.55
"""Ratios up to the first stand for 15 %, from the second on for 60 %."""
JOINT = ("lora", "full")
"""Values of ``train`` that include the backbone."""


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


def claims_of(table: pd.DataFrame) -> list[Claim]:
    """Set every claim against the finished cells of a results table.

    The study repairs nothing; what a claim says of cells without recovery is asked of repaired
    ones, too, and the numbers say which these are. They are means over seeds. "At least" allows
    one standard deviation over seeds where there are several, else half of the wider 95 % interval
    over questions.
    """
    groups, claims = _groups(table[table["status"] == "done"]), []
    for name, (statement, compare) in CLAIMS.items():
        found = list(compare(groups))
        verdict: Verdict = "not measured"
        if found:
            verdict = "agrees" if all(holds for holds, _ in found) else "does not"
        numbers = tuple(("" if holds else "not: ") + words for holds, words in found)
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


_SAME = (
    *("model", "axis", "ratio", "criterion", "allocation", "repair"),
    *("recovery", "train", "loss", "fraction", "options"),
)
_MEASURED = ("avg_percent", "avg_free", "avg_choice", "avg_pictures", "avg_text")
_CELL = ("model", "axis", "ratio", "criterion", "allocation", "repair", "fraction")

Group = Any
"""Cells that differ in their seed only, as a row: the columns that they share, means of what they
measured (NaN if they did not), the ``margin`` by which AVG-% may be off, their ``losses``, and what
the original scores on questions with pictures and without (``whole_pictures``, ``whole_text``)."""
Groups = Sequence[Group]
Findings = Iterable[tuple[bool, str]]
"""Comparisons that a claim rests on: whether each is as claimed, and what was compared."""


def _groups(done: pd.DataFrame) -> list[Group]:
    """Means over seeds."""
    is_original = done["axis"] == "original"
    if is_original.all():
        return []
    done = done.assign(**{name: pd.to_numeric(done[name]) for name in _MEASURED})
    originals = done[is_original].drop_duplicates("model", keep="last").set_index("model")
    cells = done[~is_original]
    cells = cells.assign(
        half=(cells["avg_percent_high"] - cells["avg_percent_low"]) / 2,
        allocation=cells["allocation"].astype(object).fillna(""),  # NaN equals nothing
        losses=[frozenset(parse_loss(x) if x != "none" else ()) for x in cells["loss"]],
        whole_pictures=cells["model"].map(originals["avg_pictures"]),
        whole_text=cells["model"].map(originals["avg_text"]),
    )
    grouped = cells.groupby(list(_SAME), sort=False, dropna=False)
    found = grouped.first().assign(**grouped[list(_MEASURED)].mean())
    found["margin"] = grouped["avg_percent"].std().where(grouped.size() > 1, grouped["half"].mean())
    return list(found.reset_index().itertuples(index=False))


def _trained(groups: Groups, *losses: str, train: Sequence[str] = JOINT) -> list[Group]:
    """Cells trained with exactly these losses."""
    return [g for g in groups if g.losses == frozenset(losses) and g.train in train]


def _untrained(groups: Groups) -> list[Group]:
    return [g for g in groups if g.recovery == "none"]


def _pairs(first: Groups, second: Groups, *shared: str) -> list[tuple[Group, Group]]:
    """All pairs that agree in some columns."""
    agree = attrgetter(*shared)
    return [(a, b) for a in first for b in second if agree(a) == agree(b)]


def _axes(groups: Groups) -> list[tuple[Group, Group]]:
    """Width and depth cells that differ in nothing else that a user chose."""
    width, depth = ([g for g in groups if g.axis == axis] for axis in ("width", "depth"))
    return _pairs(width, depth, "model", "ratio", "recovery", "fraction", "repair")


def _at(group: Group) -> str:
    return f"{group.model} {group.ratio:.0%}{'' if group.repair == 'none' else ', repaired'}"


def _share(group: Group) -> str:
    return f"{group.fraction:.0%} of the data"


def _at_least(a: Group, b: Group) -> tuple[bool, str]:
    """Whether the first keeps as much as the second, and how that is said."""
    margin = max(a.margin, b.margin)
    words = f"{a.avg_percent:.1f} and {b.avg_percent:.1f} ± {margin:.1f}"
    return a.avg_percent >= b.avg_percent - margin, words


def _t1(groups: Groups) -> Findings:
    for width, depth in _axes(_untrained(groups)):
        if width.ratio <= LOW:
            words = f"{_at(width)}: width {width.avg_percent:.1f}, depth {depth.avg_percent:.1f}"
            yield width.avg_percent > depth.avg_percent, words


def _t2(groups: Groups) -> Findings:
    for width, depth in _axes(_untrained(groups)):
        names = ("avg_free", "avg_choice")
        if width.ratio > LOW or not all(getattr(width, name) > 0 for name in names):
            continue
        free, choice = (100 * (1 - getattr(depth, name) / getattr(width, name)) for name in names)
        words = f"{_at(width)}: depth scores {free:.1f} % below width on free answers"
        yield free > choice, f"{words}, {choice:.1f} % on chosen ones"


def _t3(groups: Groups) -> Findings:
    for group in _untrained(groups):
        if group.ratio >= HIGH and group.axis in ("width", "depth"):
            words = f"{_at(group)} {group.axis}: {group.avg_percent:.1f}"
            yield group.avg_percent < 50, words


def _t4(groups: Groups) -> Findings:
    for width, depth in _axes(_trained(groups, "sft")):
        if width.ratio <= LOW:
            holds, words = _at_least(depth, width)
            yield holds, f"{_at(width)}, {_share(width)}: depth and width {words}"


def _t5(groups: Groups) -> Findings:
    for width, depth in _axes(_trained(groups, "sft")):
        if width.ratio >= HIGH:
            holds, words = _at_least(width, depth)
            yield holds, f"{_at(width)}, {_share(width)}: width and depth {words}"


def _t6(groups: Groups) -> Findings:
    projector = _trained(groups, "sft", train=("projector",))
    for alone, joint in _pairs(projector, _trained(groups, "sft"), *_CELL):
        words = f"{_at(alone)} {alone.axis}: projector {alone.avg_percent:.1f}"
        words += f", {joint.train} {joint.avg_percent:.1f}"
        if alone.ratio <= MILDEST:
            yield alone.avg_percent >= 0.95 * joint.avg_percent, words
        elif alone.ratio >= HIGH:
            yield joint.avg_percent - alone.avg_percent > 5, words


def _t7(groups: Groups) -> Findings:
    for group in _untrained(groups):
        if not (group.whole_pictures > 0 and group.whole_text > 0):
            continue
        sight = 100 * (1 - group.avg_pictures / group.whole_pictures)
        text = 100 * (1 - group.avg_text / group.whole_text)
        words = f"{_at(group)} {group.axis}: with pictures -{sight:.1f} %, text -{text:.1f} %"
        if group.ratio <= MILDEST:
            yield sight > text, words
        elif group.ratio >= HIGH:
            yield abs(sight - text) <= 10, words


def _t8(groups: Groups) -> Findings:
    order = ("sft", "rkl", "kl", "hidden")
    for sft in _trained(groups, "sft"):
        same = [b for name in order[1:] for _, b in _pairs([sft], _trained(groups, name), *_CELL)]
        same = [group for group in same if group.train == sft.train]
        ranked = [sft, *same]
        words = f"{_at(sft)} {sft.axis}: " + ", ".join(
            f"{group.loss} {group.avg_percent:.1f}" for group in ranked
        )
        if same and sft.ratio <= MILDEST:
            yield all(abs(g.avg_percent - sft.avg_percent) <= 5 for g in same), words
        elif same and sft.ratio >= HARSHEST:
            falls = all(a.avg_percent >= b.avg_percent for a, b in pairwise(ranked))
            yield falls, words


def _t9(groups: Groups) -> Findings:
    both = _trained(groups, "sft", "hidden")
    for ours, sft in _pairs(both, _trained(groups, "sft"), *_CELL, "train"):
        holds, words = _at_least(ours, sft)
        where = f"{_at(ours)} {ours.axis}, {_share(ours)}"
        yield holds, f"{where}: sft+hidden and sft {words}"
    for besides, words in (
        ((), "sft+hidden is at least sft+kl or sft+rkl"),
        (("hidden",), "a third loss gains nothing"),
    ):
        rivals = [g for kl in ("kl", "rkl") for g in _trained(groups, "sft", *besides, kl)]
        won = [_at_least(a, b)[0] for a, b in _pairs(both, rivals, *_CELL, "train")]
        if won:
            yield 2 * sum(won) > len(won), f"{words} in {sum(won)} of {len(won)} cells"


def _t10(groups: Groups) -> Findings:
    shared = [key for key in (*_CELL, "recovery") if key != "fraction"]
    for whole in [g for g in groups if g.fraction == 1 and g.recovery != "none"]:
        parts = [b for _, b in _pairs([whole], groups, *shared) if b.fraction < 1]
        series = [*sorted(parts, key=lambda g: float(g.fraction)), whole]
        if not parts:
            continue
        words = f"{_at(whole)} {whole.axis} {whole.recovery}: " + ", ".join(
            f"{_share(g)} {g.avg_percent:.1f}" for g in series
        )
        share = series[0].avg_percent / max(whole.avg_percent, 1e-9)
        rises = all(_at_least(b, a)[0] for a, b in pairwise(series))
        if whole.ratio >= HARSHEST:
            yield rises and share < 0.9, words
        else:
            yield rises and share >= 0.9, words


CLAIMS: dict[str, tuple[str, Callable[[Groups], Findings]]] = {
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
