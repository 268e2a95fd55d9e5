"""What an `Anatomy` costs to hold and to run, counted from its shapes."""

from __future__ import annotations

import re

from slimvlm.errors import ConfigError
from slimvlm.geometry import Anatomy

_COUNTS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}
_SIZES = {"mib": 2**20, "gib": 2**30, "mb": 10**6, "gb": 10**9}

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
"""Bytes of one weight by data type."""


def weight_bytes(anatomy: Anatomy, dtype: str = "bfloat16") -> int:
    """Bytes of all weights of the model."""
    return anatomy.total_params * BYTES[dtype]


def kv_cache_bytes_per_token(anatomy: Anatomy, dtype: str = "bfloat16") -> int:
    """Bytes of keys and values that one token adds to the cache."""
    return sum(2 * s.num_kv_heads * s.head_dim for s in anatomy.layers) * BYTES[dtype]


def params_for_memory(memory_bytes: int, dtype: str = "bfloat16") -> int:
    """Largest number of weights that fit into some bytes."""
    return memory_bytes // BYTES[dtype]


def parse_count(text: str) -> int:
    """``5B``, ``90M`` or a plain number of parameters.

    Raises:
        ConfigError: If it is none of these.
    """
    match = re.fullmatch(r"(\d+\.?\d*)([kmbg]?)", text.strip().lower())
    if match is None:
        raise ConfigError(f"target_params {text!r} must be a number such as 5B, 90M or 1200000")
    return round(float(match[1]) * _COUNTS[match[2]])


def parse_bytes(text: str) -> int:
    """``8GiB``, ``500MB``.

    Raises:
        ConfigError: If it is not a number with one of these units.
    """
    match = re.fullmatch(r"(\d+\.?\d*)\s*(mib|gib|mb|gb)", text.strip().lower())
    if match is None:
        raise ConfigError(f"target_memory {text!r} must be a size such as 8GiB or 500MB")
    return round(float(match[1]) * _SIZES[match[2]])
