"""Count memory and FLOPs of an `Anatomy` from its shapes.

FLOPs are those of the matrix products, two for each multiplication with its addition: weights, and
attention scores and their weighted values, in prefill over the square of all positions. A question
about an image counts the layers of the vision tower, those that nobody reads as well, which
transformers computes; the projector, by its parameters; and the backbone, whose head counts for
one position, as in generation. Of a tower whose layers are not known (timm) every parameter counts
at every patch.

Norms, softmax, rotary embeddings, the look-up of tokens, convolutions (also of pixels to patches),
the scan of linear attention, cross attention, scores of Gemma 3n and 4, and matrices outside the
layers (such as Mllama's second stack) are left out. Otherwise this is what
`torch.utils.flop_counter` counts; Hoffmann et al. 2022, arXiv:2203.15556, Appendix F, also count
softmax, the look-up and the head at every position.
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

import torch

from slimvlm.core.errors import ConfigError
from slimvlm.models.anatomy import Anatomy, LayerShape

_COUNTS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}
_SIZES = {"mib": 2**20, "gib": 2**30, "mb": 10**6, "gb": 10**9}

ROW_MULTIPLE = 8  # weights of a 16-byte row in bfloat16; kernels without it fall back or fail
TILE_MULTIPLE = 64  # width of a tile of common matrix kernels
WIDTH_MULTIPLE = 128  # group of common 4-bit formats and block of fp8 ones
OFF_ROWS_ADVICE = (
    "rows end off a 16-byte boundary, which can cost a third of the speed: plan with "
    f"--round-to {WIDTH_MULTIPLE}"
)

QUESTION_TOKENS = 64  # of the text of a usual question

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}  # bytes of one weight by data type


@dataclass(frozen=True)
class Picture:
    """Count what a model makes of an image; nothing without one."""

    patches: int = 0  # that the tower reads, of all tiles, class tokens among them
    reach: int = 0  # patches of a tile, which attend to one another
    features: int = 0  # that the projector returns
    tokens: int = 0  # in the prompt, with the marks around them


class Work(NamedTuple):
    """FLOPs of a question about an image, by the part that computes."""

    tower: int
    projector: int
    backbone: int


def weight_bytes(anatomy: Anatomy, dtype: str = "bfloat16") -> int:
    """Count bytes of all weights of the model."""
    return int(anatomy.total_params * getattr(torch, dtype).itemsize)


def kv_cache_bytes(anatomy: Anatomy, tokens: int, dtype: str = "bfloat16") -> int:
    """Count bytes of keys and values of so many tokens; layers with a window hold no more of it."""
    values = sum(
        min(tokens, s.window or tokens) * (2 * s.num_kv_heads * s.head_dim + s.fixed_cache)
        for s in anatomy.layers
    )
    return int(values * getattr(torch, dtype).itemsize)


def prefill_flops(
    anatomy: Anatomy, tokens: int, batch_size: int = 1, context: int | None = None
) -> int:
    """Count FLOPs of the backbone for the first answer token; ``tokens`` includes image tokens.

    ``context`` is the number of tokens that these attend to, themselves too; by default themselves
    alone.
    """
    context = tokens if context is None else context
    flops = 2 * anatomy.hidden_size * anatomy.vocab_size
    for shape in anatomy.layers:
        reach = max(tokens, min(context, shape.window or context))
        scores = 4 * reach * shape.num_heads * shape.head_dim  # and weighted values
        flops += tokens * (_flops_of_weights(anatomy, shape) + scores)
    return batch_size * flops


def _flops_of_weights(anatomy: Anatomy, shape: LayerShape) -> int:
    """Count FLOPs of a layer's matrices for one position."""
    rows, experts = (*anatomy.backbone.attention, *anatomy.backbone.mlp), anatomy.backbone.experts
    if experts is not None:
        rows = tuple(row for row in rows if not row.path.startswith(f"{experts.module}."))
    blocks = [shape.block(segment) for row in rows for segment in row.segments]
    channels = sum(count * width for count, width in blocks)
    of_expert = max(shape.expert_params // anatomy.hidden_size - 1, 0)  # but its router's row
    channels += anatomy.experts_per_token * of_expert + shape.num_experts
    return 2 * (anatomy.hidden_size * channels + shape.fixed_weights)  # one side is the hidden size


def question_flops(anatomy: Anatomy, picture: Picture, text_tokens: int = QUESTION_TOKENS) -> Work:
    """Count FLOPs of a question about an image, from its pixels to the first answer token."""
    of_patch = 2 * anatomy.vision_params
    if (tower := anatomy.tower) is not None:
        of_patch = 0
        for shape in tower.layers:
            width = shape.fixed_weights // (4 * tower.hidden_size)  # four matrices, alike
            reach = min(picture.reach, shape.window or picture.reach)
            of_patch += _flops_of_weights(tower, shape) + 4 * reach * width
    projector = 2 * anatomy.projector_params * picture.features
    backbone = prefill_flops(anatomy, picture.tokens + text_tokens)
    return Work(picture.patches * of_patch, projector, backbone)


def decode_flops(anatomy: Anatomy, context: int, batch_size: int = 1) -> int:
    """Count FLOPs of the backbone for one more token that attends to ``context``, itself too."""
    return prefill_flops(anatomy, 1, batch_size, context)


def slow_widths(anatomy: Anatomy) -> list[str]:
    """Describe the widths that hardware is slow with; empty if there are none."""
    widths = sorted({layer.intermediate_size for layer in anatomy.layers})
    advice = f"no multiple of {TILE_MULTIPLE}, the tile of matrix kernels: plan with "
    advice += f"--round-to {WIDTH_MULTIPLE}"
    if any(width % ROW_MULTIPLE for width in widths):
        advice = OFF_ROWS_ADVICE
    elif not any(width % TILE_MULTIPLE for width in widths):
        return []
    return [f"{', '.join(map(str, widths))} neurons: {advice}"]


def params_of_target(params: str | None, memory: str | None, dtype: str) -> int | None:
    """Return the parameters of a target: ``params`` as ``5B``, or else ``memory`` as ``8GiB``."""
    text, name, units, size = params, "target_params", _COUNTS, 1
    allowed = "a number such as 5B, 90M or 1200000"
    if text is None:
        text, name, units, size = memory, "target_memory", _SIZES, BYTES[dtype]
        allowed = "a size such as 8GiB or 500MB"
    if text is None:
        return None
    match = re.fullmatch(rf"(\d+\.?\d*)\s*({'|'.join(units)})", text.strip().lower())
    if match is None:
        raise ConfigError(f"{name} {text!r} must be {allowed}")
    return round(float(match[1]) * units[match[2]]) // size
