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
from pathlib import Path
from typing import Literal, NamedTuple

import yaml

from slimvlm.core.errors import ConfigError
from slimvlm.models.anatomy import FULL_ATTENTION, Anatomy
from slimvlm.models.cost import OFF_ROWS_ADVICE, ROW_MULTIPLE, WIDTH_MULTIPLE

Level = Literal["ok", "warn", "fail", "unknown"]
ENGINES = ("vllm", "sglang", "gguf", "openvino", "onnx", "mlx")
TENSOR_PARALLEL = "tp"

GGUF_ROW = 32  # block of the formats Q4_0 and Q8_0 along a row
GGUF_K_ROW = 256  # block of the K formats (Q4_K_M and its like) along a row
MAX_HEAD_DIM = 256


class Ran(NamedTuple):
    """Engine version, and kinds (`Case.kind`) whose greedy replies equalled transformers'."""

    version: str
    kinds: list[str]  # compared were originals and models pruned in depth and in width


_TABLES = yaml.safe_load(Path(__file__).with_name("serving.yaml").read_text(encoding="utf-8"))
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

    @property
    def has_own_head_dim(self) -> bool:
        """Whether ``head_dim`` is not hidden size / heads."""
        layers = self.shape.layers
        return any(s.num_heads * s.head_dim != self.shape.hidden_size for s in layers)

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


def _misplaced(every: dict[str, int], case: Case) -> bool:
    """Whether a layer is of another kind than its position says."""
    step = every.get(case.shape.text_type, 0)
    are_full = [layer.kind == FULL_ATTENTION for layer in case.shape.layers]
    return step > 0 and are_full != [i % step == step - 1 for i in range(len(are_full))]


def _kinds(case: Case) -> str:
    runs = groupby(layer.kind for layer in case.shape.layers)
    return ", ".join(f"{len(list(run))} x {kind}" for kind, run in runs)


def _gguf_scalar(case: Case) -> int:
    """What llama.cpp divides products of queries and keys by the root of."""
    shape = case.shape
    is_27b = shape.num_layers == {"gemma2": 46, "gemma3_text": 62}.get(shape.text_type)
    heads = max(layer.num_heads for layer in shape.layers)
    return shape.hidden_size // heads if is_27b else case.head_dim


def _is_blind_in_gguf(case: Case) -> bool:
    return case.shape.vision_params > 0 and case.shape.model_type not in GGUF_PICTURES


def _kind(target: str, case: Case) -> str:
    is_blind = target == "gguf" and _is_blind_in_gguf(case)
    return f"a {case.kind!r} model{', without pictures' * is_blind}"


def _stored(case: Case) -> str:
    return "weights are quantised" if case.is_quantized else "weights are not quantised"


def _is_of(types: Sequence[str], case: Case) -> bool:
    """Whether the model, or its language model, is of one of these types."""
    return not {case.shape.model_type, case.shape.text_type}.isdisjoint(types)


_SHOWN: dict[str, Callable[[Case], str]] = {
    "tower": lambda c: (
        f"{c.shape.vision_params / 1e6:.1f} M vision parameters in {c.shape.model_type!r}"
    ),
    "model": lambda c: f"model {c.shape.model_type!r}",
    "language model": lambda c: f"language model {c.shape.text_type!r}",
    "neurons": lambda c: f"{c.neurons} neurons",
}
"""What `Rule.what` of ``serving.yaml`` says, by its name there."""


def _off_rows(case: Case, multiple: int) -> bool:
    """Whether some matrix has rows that are not a multiple."""
    rows = [s.num_heads * s.head_dim for s in case.shape.layers]
    return case.off(multiple) or any(row % multiple for row in (*rows, case.shape.hidden_size))


def _rows(case: Case) -> str:
    rows = sorted({s.num_heads * s.head_dim for s in case.shape.layers})
    inner = ", ".join(map(str, rows))
    return f"rows of {case.shape.hidden_size} (hidden), {inner} (heads), {case.neurons} (neurons)"


RULES: tuple[Rule, ...] = (
    *(Rule("answers", (target,), "unknown",
           partial(lambda kinds, c: c.kind not in kinds, ran.kinds), partial(_kind, target),
           "no model of this kind was run there: try it before you rely on it", ran.version)
      for target, ran in RAN.items()),
    Rule("even layers", ENGINES, "fail",
         lambda c: not c.shape.is_uniform,
         lambda c: "layers have different widths" if not c.shape.is_uniform else "all layers alike",
         "plan with --allocation uniform"),
    *(Rule("layer kinds", (target,), "fail", partial(_misplaced, every), _kinds,
           "the engine takes a layer's kind from its position, full attention once in "
           + ", ".join(f"{step} layers of {name}" for name, step in every.items())
           + ": remove whole runs of so many, or plan with --axis width")
      for target, every in _TABLES["by_position"].items()),
    Rule("attention scale", ("gguf",), "fail",
         lambda c: c.shape.query_scalar not in (0, _gguf_scalar(c)),
         lambda c: f"{c.shape.num_layers} layers, query_pre_attn_scalar {c.shape.query_scalar:g}",
         "llama.cpp takes hidden size / heads at 46 layers of Gemma 2 and 62 of Gemma 3, head_dim "
         "at other numbers: leave their layers and heads, or plan neurons only"),
    Rule("MLP width", ("vllm",), "fail",
         lambda c: c.shape.text_type == "glm_ocr_text" and c.shape.vision_params > 0
         and any(s.intermediate_size != 3 * c.shape.hidden_size for s in c.shape.layers),
         _SHOWN["neurons"],
         "vLLM gives the vision merger as many, which has 3 x hidden size: leave the neurons"),
    Rule("unquantised", ("gguf",), "fail",
         lambda c: c.is_quantized, _stored,
         "export the checkpoint from before quantize; llama.cpp quantises GGUF files itself"),
    Rule("quantised weights", ("vllm", "sglang"), "warn",
         lambda c: c.is_quantized, _stored,
         "not tried there: load it once before you rely on it"),
    *(Rule("head_dim", (target,), "fail",
           partial(lambda types, c: c.has_own_head_dim and _is_of(types, c), row["types"]),
           lambda c: f"head_dim {c.head_dim}, {c.heads}, hidden size {c.shape.hidden_size}",
           "the engine takes hidden size / heads here: prune neurons or layers and leave the heads",
           row.get("seen", ""))
      for target, row in _TABLES["own_head_dim"].items()),
    Rule("MLP width", ("gguf",), "fail",
         lambda c: c.shape.text_type == "phi"
         and any(s.intermediate_size != 4 * c.shape.hidden_size for s in c.shape.layers),
         _SHOWN["neurons"],
         "the converter takes 4 x hidden size for Phi: prune layers only"),
    Rule("language model", ("gguf",), "fail",
         lambda c: c.shape.text_type not in _TABLES["gguf_types"], _SHOWN["language model"],
         f"the converter knows {', '.join(_TABLES['gguf_types'])}"),
    Rule("vision tower", ("gguf",), "warn",
         _is_blind_in_gguf, _SHOWN["tower"],
         "the file holds the language model only: llama.cpp's converter writes the towers of "
         f"{', '.join(GGUF_PICTURES)}"),
    *(Rule(row["name"], (target,), row["level"], partial(_is_of, row["types"]),
           _SHOWN[row["shows"]], row["advice"], row.get("seen", ""))
      for target, rows in _TABLES["of_types"].items() for row in rows),
    Rule("attention kernels", ("vllm", "sglang"), "fail",
         lambda c: any(s.head_dim % 8 or s.head_dim > MAX_HEAD_DIM for s in c.shape.layers),
         lambda c: f"head_dim {c.head_dim}",
         f"attention kernels want a multiple of 8 up to {MAX_HEAD_DIM}"),
    Rule("query heads", (TENSOR_PARALLEL,), "fail",
         lambda c: any(s.num_heads % c.tp for s in c.shape.layers), lambda c: c.heads,
         "must divide by the number of GPUs: plan with --kv-heads"),
    Rule("KV heads", (TENSOR_PARALLEL,), "fail",
         lambda c: any(s.num_kv_heads % c.tp and c.tp % s.num_kv_heads for s in c.shape.layers),
         lambda c: c.heads,
         "must divide by the number of GPUs, or divide it: plan with --kv-heads"),
    Rule("MLP width", (TENSOR_PARALLEL,), "fail",
         lambda c: c.off(c.tp), _SHOWN["neurons"],
         "must divide by the number of GPUs: plan with --round-to"),
    Rule("MLP share", (TENSOR_PARALLEL,), "warn",
         lambda c: not c.off(c.tp) and c.off(WIDTH_MULTIPLE * c.tp), _SHOWN["neurons"],
         f"each GPU's share should be a multiple of {WIDTH_MULTIPLE}: plan with --round-to"),
    Rule("MLP rows", ("vllm", "sglang"), "warn",
         lambda c: c.off(ROW_MULTIPLE), _SHOWN["neurons"], OFF_ROWS_ADVICE),
    Rule("MLP width", ("vllm", "sglang"), "warn",
         lambda c: not c.off(ROW_MULTIPLE) and c.off(WIDTH_MULTIPLE), _SHOWN["neurons"],
         f"no multiple of {WIDTH_MULTIPLE}, the group of 4-bit formats and the block of fp8 ones: "
         f"plan with --round-to {WIDTH_MULTIPLE}"),
    Rule("block formats", ("gguf",), "warn",
         lambda c: _off_rows(c, GGUF_ROW), _rows,
         f"Q4_0 and Q8_0 need multiples of {GGUF_ROW}; other rows stay in 16 bit"),
    Rule("K formats", ("gguf",), "warn",
         lambda c: not _off_rows(c, GGUF_ROW) and _off_rows(c, GGUF_K_ROW), _rows,
         f"Q4_K_M and its like need multiples of {GGUF_K_ROW}; other rows get a larger format: "
         f"plan with --round-to {GGUF_K_ROW}"),
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
