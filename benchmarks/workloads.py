"""Options of benchmarks that time reading and writing, and what they ask for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from slimvlm.core.options import Workload


def add_workload(
    parser: argparse.ArgumentParser,
    prompt_tokens: int,
    new_tokens: int,
    batch_sizes: Sequence[int],
    repeats: int,
) -> None:
    """Options for a `Workload`, with these values by default."""
    parser.add_argument("--prompt-tokens", type=int, default=prompt_tokens)
    parser.add_argument("--new-tokens", type=int, default=new_tokens)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=batch_sizes)
    parser.add_argument("--repeats", type=int, default=repeats)


def workload_of(options: argparse.Namespace) -> Workload:
    """The workload that was asked for."""
    return Workload(
        prompt_tokens=options.prompt_tokens,
        new_tokens=options.new_tokens,
        batch_sizes=tuple(options.batch_sizes),
        repeats=options.repeats,
    )
