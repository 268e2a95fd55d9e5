"""What an `Anatomy` costs to hold and to run, counted from its shapes."""

from __future__ import annotations

from slimvlm.geometry import Anatomy

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
"""Bytes of one weight by data type."""


def weight_bytes(anatomy: Anatomy, dtype: str = "bfloat16") -> int:
    """Bytes of all weights of the model."""
    return anatomy.total_params * BYTES[dtype]


def kv_cache_bytes_per_token(anatomy: Anatomy, dtype: str = "bfloat16") -> int:
    """Bytes of keys and values that one token adds to the cache."""
    return sum(2 * s.num_kv_heads * s.head_dim for s in anatomy.layers) * BYTES[dtype]


def flops_per_token(anatomy: Anatomy) -> int:
    """Multiply-adds times two of the backbone's matrices for one token.

    The attention scores, whose cost grows with the context, are left out: they are the same share
    of a layer before and after.
    """
    head = anatomy.hidden_size * anatomy.vocab_size
    return 2 * (head + sum(s.params - s.fixed_params for s in anatomy.layers))


def params_for_memory(memory_bytes: int, dtype: str = "bfloat16") -> int:
    """Largest number of weights that fit into some bytes."""
    return memory_bytes // BYTES[dtype]
