"""Check a model's shape against the requirements of serving engines: `RULES`, ``serving.yaml``.

Most rules come from an engine's source (vLLM 0.33, SGLang 0.5.23, llama.cpp's converter). A model
is ``ok`` only if a model of the same kind ran in the engine with transformers' answers (`RAN`);
otherwise it is ``unknown``. See ``docs/serving.md``.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
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
class Rule:
    """A requirement of some targets, with the remedy for people: a row of ``serving.yaml``."""

    name: str
    targets: Sequence[str]
    level: Level
    when: str  # it is broken, by its name in `_BROKEN`
    shows: str  # the value in the message, by its name in `_shown`
    advice: str
    of: Any = None  # what ``when`` compares with
    seen: str = ""  # the engine that failed in a run; empty if its source says so


RULES: tuple[Rule, ...] = (
    *(
        Rule(
            *("answers", (target,), "unknown", "other kind", f"kind in {target}"),
            advice="no model of this kind was run there: try it before you rely on it",
            of=ran.kinds,
            seen=ran.version,
        )
        for target, ran in RAN.items()
    ),
    *(Rule(**row) for row in _TABLES["rules"]),
)
"""All rules, in the order in which they are reported."""


@dataclass(frozen=True)
class Finding:
    """Result of one rule for a model."""

    target: str
    rule: str
    level: Level  # warn: works, with a loss; unknown: no violation known, no engine confirmed it
    what: str
    advice: str = ""
    seen: str = ""  # the engine that showed it in a run


class Case:
    """The numbers of a model that rules read, and the GPUs that share every layer (``tp``)."""

    def __init__(self, shape: Anatomy, tp: int, is_quantized: bool) -> None:
        self.shape, self.tp, self.is_quantized = shape, tp, is_quantized
        self.text, self.hidden, layers = shape.text_type, shape.hidden_size, shape.layers
        self.types = dict.fromkeys((shape.model_type, self.text))
        self.kind = "/".join(self.types)
        self.is_blind_in_gguf = shape.vision_params > 0 and shape.model_type not in GGUF_PICTURES
        self.head_dims = {s.head_dim for s in layers}  # 0 of a layer without KV groups
        self.heads = sorted({(s.num_heads, s.num_kv_heads) for s in layers})
        self.of_heads = sorted({s.num_heads * s.head_dim for s in layers})  # inputs of o_proj
        self.neurons = sorted({s.intermediate_size for s in layers})
        self.rows = (*self.neurons, *self.of_heads, self.hidden)
        self.tower_layers = () if shape.tower is None else shape.tower.layers
        self.tower_neurons = sorted({s.intermediate_size for s in self.tower_layers})
        kinds = enumerate(layer.kind for layer in self.tower_layers)
        self.full_in_tower = [index for index, kind in kinds if kind == FULL_ATTENTION]


def _off(widths: Iterable[int], multiple: int) -> bool:
    """Whether some width is not a multiple."""
    return any(width % multiple for width in widths)


_BROKEN: dict[str, Callable[[Case, Any], bool]] = {
    "other kind": lambda c, of: c.kind not in of,
    "uneven": lambda c, of: not c.shape.is_uniform,
    "misplaced": lambda c, of: (
        c.text in of
        and any(
            (layer.kind == FULL_ATTENTION) != (index % of[c.text] == of[c.text] - 1)
            for index, layer in enumerate(c.shape.layers)
        )
    ),
    # llama.cpp divides products of queries and keys by the root of another number
    "scale": lambda c, of: (
        c.shape.query_scalar
        not in (
            (0, c.hidden // max(heads for heads, _ in c.heads))
            if c.shape.num_layers == of.get(c.text)
            else (0, max(c.head_dims))
        )
    ),
    "other width": lambda c, of: c.text in of and c.neurons != [of[c.text] * c.hidden],
    "other width, sees": lambda c, of: (
        c.shape.vision_params > 0 and c.text in of and c.neurons != [of[c.text] * c.hidden]
    ),
    "quantised": lambda c, of: c.is_quantized,
    "own head_dim": lambda c, of: not c.types.keys().isdisjoint(of) and c.of_heads != [c.hidden],
    "unknown": lambda c, of: c.text not in of,
    "blind": lambda c, of: c.is_blind_in_gguf,
    "type": lambda c, of: not c.types.keys().isdisjoint(of),
    "kernels": lambda c, of: _off(c.head_dims, 8) or max(c.head_dims) > of,
    "query heads": lambda c, of: any(heads % c.tp for heads, _ in c.heads),
    "KV heads": lambda c, of: any(kv % c.tp and c.tp % kv for _, kv in c.heads),
    "neurons": lambda c, of: _off(c.neurons, c.tp),
    "tower's neurons": lambda c, of: _off(c.tower_neurons, c.tp),
    "tower's kinds": lambda c, of: (
        c.shape.model_type in of and len({b - a for a, b in pairwise((-1, *c.full_in_tower))}) > 1
    ),
    "share": lambda c, of: not _off(c.neurons, c.tp) and _off(c.neurons, WIDTH_MULTIPLE * c.tp),
    "rows": lambda c, of: _off(c.neurons, ROW_MULTIPLE),
    "width": lambda c, of: not _off(c.neurons, ROW_MULTIPLE) and _off(c.neurons, WIDTH_MULTIPLE),
    "blocks": lambda c, of: _off(c.rows, of),
    "K blocks": lambda c, of: not _off(c.rows, of[0]) and _off(c.rows, of[1]),
}
"""When a rule is broken, by `Rule.when`; called with `Rule.of`."""


def _shown(case: Case) -> dict[str, str]:
    """Write what messages say of a model, by `Rule.shows`."""
    shape, model = case.shape, f"a {case.kind!r} model"
    neurons, of_heads = (", ".join(map(str, each)) for each in (case.neurons, case.of_heads))
    heads = ", ".join(f"{heads} query and {kv} KV heads" for heads, kv in case.heads if kv)
    heads, head_dim = heads or "the original's heads", f"head_dim {max(case.head_dims)}"
    runs = [(kind, len(list(run))) for kind, run in groupby(s.kind for s in shape.layers)]
    return {
        **{f"kind in {target}": model for target in RAN},
        "kind in gguf": f"{model}{', without images' * case.is_blind_in_gguf}",
        "tower": f"{shape.vision_params / 1e6:.1f} M vision parameters in {shape.model_type!r}",
        "model": f"model {shape.model_type!r}",
        "language model": f"language model {shape.text_type!r}",
        "neurons": f"{neurons} neurons",
        "tower's neurons": f"{', '.join(map(str, case.tower_neurons))} neurons in the vision tower",
        "tower's kinds": f"{len(case.tower_layers)} layers in the vision tower",
        "heads": heads,
        "kinds": ", ".join(f"{number} x {kind}" for kind, number in runs),
        "rows": f"rows of {case.hidden} (hidden), {of_heads} (heads), {neurons} (neurons)",
        "alike": "all layers alike" if shape.is_uniform else "layers have different widths",
        "stored": f"weights are {'' if case.is_quantized else 'not '}quantised",
        "scale": f"{shape.num_layers} layers, query_pre_attn_scalar {shape.query_scalar:g}",
        "head_dim": head_dim,
        "head_dim and heads": f"{head_dim}, {heads}, hidden size {case.hidden}",
    }


def check(shape: Anatomy, targets: Sequence[str], is_quantized: bool = False) -> list[Finding]:
    """Apply every rule to a model, for each of `ENGINES` or ``tp=N`` (N GPUs) among the targets."""
    found = []
    for target in targets:
        match = re.fullmatch(rf"{TENSOR_PARALLEL}=([1-9]\d*)", target)
        if match is None and target not in ENGINES:
            raise ConfigError(f"check {target!r} must be one of: {', '.join(ENGINES)}, tp=N")
        name, tp = (TENSOR_PARALLEL, int(match[1])) if match else (target, 1)
        case, ran = Case(shape, tp, is_quantized), RAN.get(target)
        shown, was_run = _shown(case), ran is not None and case.kind in ran.kinds
        for rule in (rule for rule in RULES if name in rule.targets):
            level: Level = "ok" if was_run else "unknown"
            advice, seen = "", ran.version if ran is not None and was_run else ""
            if _BROKEN[rule.when](case, rule.of):
                level, seen = rule.level, rule.seen
                listed = ", ".join(map(str, rule.of)) if isinstance(rule.of, list | dict) else ""
                if rule.when == "misplaced":
                    listed = ", ".join(f"{step} layers of {kind}" for kind, step in rule.of.items())
                known = {"width": WIDTH_MULTIPLE, "off_rows": OFF_ROWS_ADVICE, "listed": listed}
                advice = rule.advice.format(of=rule.of, **known)
            found.append(Finding(target, rule.name, level, shown[rule.shows], advice, seen))
    return found
