"""Count memory and FLOPs of an `Anatomy` from its shapes.

FLOPs are those of the matrix products, two for each multiplication with its addition: weights, and
attention scores and their weighted values, in prefill over the square of all positions. Norms,
softmax, rotary embeddings, the look-up of tokens, convolutions, the scan of linear attention, cross
attention, scores of Gemma 3n and 4 and matrices outside the layers are left out. The head counts
for one position, as in generation. Otherwise this is what `torch.utils.flop_counter` counts;
Hoffmann et al. 2022, arXiv:2203.15556, Appendix F, also count softmax, the look-up and the head at
every position.
"""

import re

import torch

from slimvlm.core.errors import ConfigError
from slimvlm.models.anatomy import Anatomy

_COUNTS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}
_SIZES = {"mib": 2**20, "gib": 2**30, "mb": 10**6, "gb": 10**9}

ROW_MULTIPLE = 8  # weights of a 16-byte row in bfloat16; kernels without it fall back or fail
TILE_MULTIPLE = 64  # width of a tile of common matrix kernels
WIDTH_MULTIPLE = 128  # group of common 4-bit formats and block of fp8 ones
OFF_ROWS_ADVICE = (
    "rows end off a 16-byte boundary, which can cost a third of the speed: plan with "
    f"--round-to {WIDTH_MULTIPLE}"
)

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}  # bytes of one weight by data type


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
    rows, experts = (*anatomy.backbone.attention, *anatomy.backbone.mlp), anatomy.backbone.experts
    if experts is not None:
        rows = tuple(row for row in rows if not row.path.startswith(f"{experts.module}."))
    for shape in anatomy.layers:
        blocks = [shape.block(segment) for row in rows for segment in row.segments]
        channels = sum(count * width for count, width in blocks)
        of_expert = max(shape.expert_params // anatomy.hidden_size - 1, 0)  # but its router's row
        channels += anatomy.experts_per_token * of_expert + shape.num_experts
        flops += tokens * 2 * anatomy.hidden_size * channels  # one side is the hidden size
        flops += tokens * 2 * shape.fixed_weights
        reach = max(tokens, min(context, shape.window or context))
        flops += 4 * tokens * reach * shape.num_heads * shape.head_dim  # scores and values
    return batch_size * flops


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
