"""Check a model's shape against the requirements of serving engines: `RULES`, ``serving.yaml``.

Most rules come from an engine's source (vLLM 0.33, SGLang 0.5.23, llama.cpp's converter). A model
is ``ok`` only if a model of the same kind ran in the engine with transformers' answers (`RAN`);
otherwise it is ``unknown``. See ``docs/serving.md``.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, Literal, NamedTuple

from slimvlm.core.errors import ConfigError
from slimvlm.core.tables import read_table
from slimvlm.models.anatomy import FULL_ATTENTION, Anatomy
from slimvlm.models.cost import OFF_ROWS_ADVICE, ROW_MULTIPLE, WIDTH_MULTIPLE

Level = Literal["ok", "warn", "fail", "unknown"]
ENGINES = ("vllm", "sglang", "gguf", "openvino", "onnx", "mlx")
TENSOR_PARALLEL = "tp"


class Ran(NamedTuple):
    """Engine version, and kinds (`Case.kind`) whose greedy replies equalled transformers'."""

    version: str
    kinds: list[str]  # compared were originals and models pruned in depth and in width


_TABLES = read_table(__file__, "serving.yaml")
RAN = {target: Ran(**row) for target, row in _TABLES["ran"].items()}
GGUF_PICTURES: dict[str, str] = _TABLES["gguf_pictures"]
OPENVINO_REFUSES: list[str] = _TABLES["openvino_refuses"]


@dataclass(frozen=True)
class Case:
    """Input of a rule: the shape, GPUs that share every layer (tp), and quantised weights."""

    shape: Anatomy
    tp: int = 1
    is_quantized: bool = False

    @property
    def kind(self) -> str:
        """Type of the model, and of its language model where that is another one."""
        return "/".join(dict.fromkeys((self.shape.model_type, self.shape.text_type)))

    @property
    def head_dim(self) -> int:
        """Channels of a head; layers without attention have none."""
        return max(layer.head_dim for layer in self.shape.layers)

    def off(self, multiple: int) -> bool:
        """Whether some layer's number of neurons is not a multiple."""
        return any(s.intermediate_size % multiple for s in self.shape.layers)

    @property
    def neurons(self) -> str:
        """The numbers of neurons, for a message."""
        return ", ".join(map(str, sorted({s.intermediate_size for s in self.shape.layers})))

    @property
    def heads(self) -> str:
        """Query and KV heads of layers that have KV groups, for a message."""
        pairs = sorted({(s.num_heads, s.num_kv_heads) for s in self.shape.layers if s.num_kv_heads})
        found = ", ".join(f"{heads} query and {kv} KV heads" for heads, kv in pairs)
        return found or "the original's heads"


@dataclass(frozen=True)
class Rule:
    """A requirement of some targets, with the model's value and the remedy for people."""

    name: str
    targets: tuple[str, ...]
    level: Level
    breaks: Callable[[Case], bool]
    what: Callable[[Case], str]
    advice: str
    seen: str = ""  # the engine that failed in a run; empty if its source says so


@dataclass(frozen=True)
class Finding:
    """Result of one rule for a model."""

    target: str
    rule: str
    level: Level  # warn: works, with a loss; unknown: no violation known, no engine confirmed it
    what: str
    advice: str = ""
    seen: str = ""  # the engine that showed it in a run


def _misplaced(case: Case, every: dict[str, int]) -> bool:
    """Whether a layer is of another kind than its position says."""
    step = every.get(case.shape.text_type, 0)
    are_full = [layer.kind == FULL_ATTENTION for layer in case.shape.layers]
    return step > 0 and are_full != [i % step == step - 1 for i in range(len(are_full))]


def _has_other_scale(case: Case, depths: dict[str, int]) -> bool:
    """Whether llama.cpp divides products of queries and keys by the root of another number."""
    shape, scalar = case.shape, case.head_dim
    if shape.num_layers == depths.get(shape.text_type):
        scalar = shape.hidden_size // max(layer.num_heads for layer in shape.layers)
    return shape.query_scalar not in (0, scalar)


def _is_blind_in_gguf(case: Case) -> bool:
    return case.shape.vision_params > 0 and case.shape.model_type not in GGUF_PICTURES


def _kind(target: str, case: Case) -> str:
    is_blind = target == "gguf" and _is_blind_in_gguf(case)
    return f"a {case.kind!r} model{', without pictures' * is_blind}"


def _has_other_width(case: Case, factors: dict[str, int]) -> bool:
    """Whether some layer's neurons are not so many times the hidden size, where the type counts."""
    width = factors.get(case.shape.text_type, 0) * case.shape.hidden_size
    return width > 0 and any(s.intermediate_size != width for s in case.shape.layers)


def _is_of(case: Case, types: Sequence[str]) -> bool:
    """Whether the model, or its language model, is of one of these types."""
    return not {case.shape.model_type, case.shape.text_type}.isdisjoint(types)


def _off_rows(case: Case, multiple: int) -> bool:
    """Whether some matrix has rows that are not a multiple."""
    rows = [s.num_heads * s.head_dim for s in case.shape.layers]
    return case.off(multiple) or any(row % multiple for row in (*rows, case.shape.hidden_size))


def _rows(case: Case) -> str:
    rows = sorted({s.num_heads * s.head_dim for s in case.shape.layers})
    inner = ", ".join(map(str, rows))
    return f"rows of {case.shape.hidden_size} (hidden), {inner} (heads), {case.neurons} (neurons)"


_SHOWN: dict[str, Callable[[Case], str]] = {
    "tower": lambda c: (
        f"{c.shape.vision_params / 1e6:.1f} M vision parameters in {c.shape.model_type!r}"
    ),
    "model": lambda c: f"model {c.shape.model_type!r}",
    "language model": lambda c: f"language model {c.shape.text_type!r}",
    "neurons": lambda c: f"{c.neurons} neurons",
    "heads": lambda c: c.heads,
    "kinds": lambda c: ", ".join(
        f"{len(list(run))} x {kind}" for kind, run in groupby(s.kind for s in c.shape.layers)
    ),
    "rows": _rows,
    "alike": lambda c: "all layers alike" if c.shape.is_uniform else "layers have different widths",
    "stored": lambda c: f"weights are {'' if c.is_quantized else 'not '}quantised",
    "scale": lambda c: (
        f"{c.shape.num_layers} layers, query_pre_attn_scalar {c.shape.query_scalar:g}"
    ),
    "head_dim": lambda c: f"head_dim {c.head_dim}",
    "head_dim and heads": lambda c: (
        f"head_dim {c.head_dim}, {c.heads}, hidden size {c.shape.hidden_size}"
    ),
}
"""What `Rule.what` of ``serving.yaml`` says, by its name there."""

_BREAKS: dict[str, Callable[[Case, Any], bool]] = {
    "uneven": lambda c, of: not c.shape.is_uniform,
    "misplaced": _misplaced,
    "scale": _has_other_scale,
    "other width": _has_other_width,
    "other width, sees": lambda c, of: c.shape.vision_params > 0 and _has_other_width(c, of),
    "quantised": lambda c, of: c.is_quantized,
    "own head_dim": lambda c, of: (
        _is_of(c, of)
        and any(s.num_heads * s.head_dim != c.shape.hidden_size for s in c.shape.layers)
    ),
    "unknown": lambda c, of: c.shape.text_type not in of,
    "blind": lambda c, of: _is_blind_in_gguf(c),
    "type": _is_of,
    "kernels": lambda c, of: any(s.head_dim % 8 or s.head_dim > of for s in c.shape.layers),
    "query heads": lambda c, of: any(s.num_heads % c.tp for s in c.shape.layers),
    "KV heads": lambda c, of: any(
        s.num_kv_heads % c.tp and c.tp % s.num_kv_heads for s in c.shape.layers
    ),
    "neurons": lambda c, of: c.off(c.tp),
    "share": lambda c, of: not c.off(c.tp) and c.off(WIDTH_MULTIPLE * c.tp),
    "rows": lambda c, of: c.off(ROW_MULTIPLE),
    "width": lambda c, of: not c.off(ROW_MULTIPLE) and c.off(WIDTH_MULTIPLE),
    "blocks": _off_rows,
    "K blocks": lambda c, of: not _off_rows(c, of[0]) and _off_rows(c, of[1]),
}
"""When a rule of ``serving.yaml`` is broken, by its name there; with the rule's ``of``."""


def _rule(row: dict[str, Any]) -> Rule:
    """Read a rule of ``serving.yaml``."""
    of: Any = row.get("of")
    known = {"width": WIDTH_MULTIPLE, "off_rows": OFF_ROWS_ADVICE}
    if row["if"] == "misplaced":
        known["listed"] = ", ".join(f"{number} layers of {name}" for name, number in of.items())
    elif isinstance(of, list | dict):
        known["listed"] = ", ".join(map(str, of))
    breaks, advice = _BREAKS[row["if"]], row["advice"].format(of=of, **known)
    targets, shown, seen = tuple(row["targets"]), _SHOWN[row["shows"]], row.get("seen", "")
    return Rule(row["name"], targets, row["level"], lambda c: breaks(c, of), shown, advice, seen)


RULES: tuple[Rule, ...] = (
    *(Rule("answers", (target,), "unknown",
           partial(lambda kinds, c: c.kind not in kinds, ran.kinds), partial(_kind, target),
           "no model of this kind was run there: try it before you rely on it", ran.version)
      for target, ran in RAN.items()),
    *map(_rule, _TABLES["rules"]),
)  # fmt: skip
"""All rules, in the order in which they are reported."""


def check(shape: Anatomy, targets: Sequence[str], is_quantized: bool = False) -> list[Finding]:
    """Apply every rule to a model, for each of `ENGINES` or ``tp=N`` (N GPUs) among the targets."""
    found = []
    for target in targets:
        match = re.fullmatch(rf"{TENSOR_PARALLEL}=([1-9]\d*)", target)
        if match is None and target not in ENGINES:
            raise ConfigError(f"check {target!r} must be one of: {', '.join(ENGINES)}, tp=N")
        name, tp = (TENSOR_PARALLEL, int(match[1])) if match else (target, 1)
        case, ran = Case(shape, tp, is_quantized), RAN.get(target)
        was_run = ran is not None and case.kind in ran.kinds
        for rule in RULES:
            if name not in rule.targets:
                continue
            level: Level = "ok" if was_run else "unknown"
            advice, seen = "", ran.version if ran is not None and was_run else ""
            if rule.breaks(case):
                level, advice, seen = rule.level, rule.advice, rule.seen
            found.append(Finding(target, rule.name, level, rule.what(case), advice, seen))
    return found
