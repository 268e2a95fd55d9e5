"""Time and memory of one closed-form repair, at the size of a 7B model's widest matrix.

Command:  OMP_NUM_THREADS=2 .venv/bin/python benchmarks/repair_cost.py
Expect:   under 60 s and under 3 GiB for a 4096 x 11008 matrix of which 30 % of the columns go.

The inputs are random with correlated channels and a wide spread of scales. Memory is the peak of
the whole process minus what it held before the sums over tokens were made; the sums themselves are
part of it. The residual says how well the solution satisfies its own equations.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import time

import torch
from torch import Tensor

from slimvlm.pruning.repair import refit
from slimvlm.scoring.moments import Moments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--outputs", type=int, default=4096)
    parser.add_argument("--channels", type=int, default=11008)
    parser.add_argument("--removed", type=float, default=0.3)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--ridge", type=float, default=1e-2)
    parser.add_argument("--bias", action="store_true", help="fit a bias too")
    options = parser.parse_args()
    torch.manual_seed(0)
    weight = torch.randn(options.outputs, options.channels, dtype=torch.bfloat16)
    bias = torch.randn(options.outputs) if options.bias else None
    keep = torch.randperm(options.channels)[int(options.removed * options.channels) :].sort()[0]
    inputs = Inputs(options.channels)
    before = peak_bytes()
    start = time.perf_counter()
    moments = Moments.zero(options.channels)
    for _ in range(0, options.tokens, 1024):
        moments.add(inputs.draw(1024), torch.ones(1024))
    gathered, cpu = time.perf_counter(), time.process_time()
    fit = refit(weight, bias, moments, keep, options.ridge)
    solved, cpu = time.perf_counter(), time.process_time() - cpu
    peak = peak_bytes() - before
    row = {
        "outputs": options.outputs,
        "channels": options.channels,
        "kept": len(keep),
        "tokens": options.tokens,
        "gather_s": round(gathered - start, 1),
        "solve_s": round(solved - gathered, 1),
        "solve_cpu_s": round(cpu, 1),
        "peak_gib": round(peak / 2**30, 2),
        "sliced_error": round(fit.sliced_error, 5),
        "repaired_error": round(fit.repaired_error, 5),
        "residual": residual(weight, moments, keep, fit.weight, options),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    print(json.dumps(row))


class Inputs:
    """Random inputs of rank far below their width plus noise, as activations have."""

    def __init__(self, channels: int) -> None:
        self.mixing = torch.randn(256, channels) / 16
        self.scale = torch.exp(torch.randn(channels))

    def draw(self, tokens: int) -> Tensor:
        """Inputs of so many tokens."""
        mixed = torch.randn(tokens, len(self.mixing)) @ self.mixing
        return (mixed + 0.5 * torch.randn_like(mixed)) * self.scale


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def residual(
    weight: Tensor, moments: Moments, keep: Tensor, new: Tensor, options: argparse.Namespace
) -> float:
    """Largest error of the normal equations in 16 rows, as a share of their right-hand side."""
    rows = slice(0, 16)
    is_kept = torch.zeros(weight.shape[1], dtype=torch.bool)
    is_kept[keep] = True
    remove = (~is_kept).nonzero()[:, 0]
    change = new[rows] - weight[rows][:, keep].double()
    gram = moments.block(keep, keep, options.bias)
    penalty = options.ridge * gram.diagonal().mean()
    lost = weight[rows][:, remove].double() @ moments.block(remove, keep, options.bias)
    error = change @ gram + penalty * change - lost
    return float(error.abs().max() / lost.abs().max())


if __name__ == "__main__":
    main()
