"""Which cases run by default and which in the slow tier.

`ARCHETYPES` are the few tiny models that together have every trait of the tables of families.
They stand for all others in the default tier (``make test``); the slow tier (``make test-slow``)
runs every family.
"""

from collections.abc import Callable, Iterable
from typing import Any

import pytest

ARCHETYPES = (
    "llava-llama",  # is retyped, and its heads divide the hidden size
    "phi",  # text alone, two matrices in its MLP, one query head per KV head, biases
    "llava-phi3",  # one matrix for queries, keys and values
    "qwen3_vl_moe",  # experts, pinned layers, neurons in multiples
    "llama4",  # matrices that are transposed, lists of layers in its configuration
    "lfm2",  # layers without attention
    "qwen3_5_text",  # gates in its attention
    "mllama",  # layers that attend to a picture
    "gemma3n_text",  # last layers that read keys of earlier ones
    "gemma4",  # a configuration of each layer, other towers, no attention
    "molmo2",  # lists that live outside the configuration
    "kosmos2_5",  # nothing to cut in its MLP, fixed heads
    "idefics2",  # a fixed number of neurons
)
"""Names in `tiny.CONFIGS`, each with what it alone has."""


def _is_archetype(name: str, *_: Any) -> bool:
    return name in ARCHETYPES


def tiered(cases: Iterable[Any], by_default: Callable[..., bool] = _is_archetype) -> list[Any]:
    """Cases (values, tuples or ``pytest.param``); those not ``by_default`` in the slow tier alone.

    By default run those whose first value is the name of one of the `ARCHETYPES`.
    """
    found = []
    for case in cases:
        if not isinstance(case, type(pytest.param())):
            case = pytest.param(*(case if isinstance(case, tuple) else (case,)))
        marks = () if by_default(*case.values) else (pytest.mark.slow,)
        found.append(pytest.param(*case.values, id=case.id, marks=(*case.marks, *marks)))
    return found
