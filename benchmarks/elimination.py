"""Time and arithmetic of the greedy elimination that `obs` chooses units by.

Command:  .venv/bin/python benchmarks/elimination.py [--channels 4864 --outputs 896]
Expect:   about 10 s and 1 GiB; a quiet machine, or one thread and its CPU seconds.
Goal:     the operations at half the rate of a matrix product, or more.

Inputs are random with correlated channels and a wide spread of scales. The rate is that of a
product of two square float32 matrices, measured before and after. Each time is the least of some
runs, in seconds of the clock and in CPU seconds, and each share is taken of the CPU's: it holds on
a busy machine, too. Rows are JSON lines.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from slimvlm.scoring.obs import removal_order

SIDE = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--channels", type=int, default=4864)
    parser.add_argument("--outputs", type=int, default=896)
    parser.add_argument("--units", type=int, help="default: as many as channels")
    parser.add_argument("--removed", type=float, nargs="+", default=[0.2, 0.3])
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    torch.manual_seed(0)
    matrix, gram = drawn(options.outputs, options.channels)
    units = options.units or options.channels
    square = torch.randn(SIDE, SIDE)
    product = partial(torch.mm, square, square)
    rate = 2 * SIDE**3 / least(product, 10)[1]
    start = least(partial(removal_order, matrix, gram, units, stop=0), options.runs)
    found = [("inverse", 0, start, options.channels**3)]
    for share in options.removed:
        count = int(share * units)
        clock, cpu = least(partial(removal_order, matrix, gram, units, stop=count), options.runs)
        gone = count * options.channels // units
        needed = operations(options.channels, options.outputs, gone)
        found.append(("elimination", count, (clock - start[0], cpu - start[1]), needed))
    rate = max(rate, 2 * SIDE**3 / least(product, 10)[1])
    for what, count, (clock, cpu), needed in found:
        row = {
            "what": what,
            "channels": options.channels,
            "outputs": options.outputs,
            "units": units,
            "removed": count,
            "s": round(clock, 3),
            "cpu_s": round(cpu, 3),
            "gflop": round(needed / 1e9, 1),
            "gflop_per_cpu_s_of_a_product": round(rate / 1e9),
            "share_of_it": round(needed / cpu / rate, 2),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "machine": platform.machine(),
        }
        print(json.dumps(row))


def drawn(outputs: int, channels: int) -> tuple[Tensor, Tensor]:
    """A matrix, and the mean Gram matrix of its inputs."""
    mix = torch.randn(channels, channels) * channels**-0.5
    x = torch.randn(2 * channels, channels) @ mix * torch.rand(channels)
    return torch.randn(outputs, channels), x.T @ x / len(x)


def operations(channels: int, outputs: int, gone: int) -> int:
    """What removals need: of the channels left, a row of both matrices and a refit for each."""
    rows = 4 * outputs * (channels * gone - gone**2 // 2)
    return rows + channels * gone**2 - 2 * gone**3 // 3


def least(run: Callable[[], object], runs: int) -> tuple[float, float]:
    """The shortest of some runs, by the clock and in CPU seconds."""
    clocks, cpus = [], []
    for _ in range(runs):
        clock, cpu = time.perf_counter(), time.process_time()
        run()
        clocks.append(time.perf_counter() - clock)
        cpus.append(time.process_time() - cpu)
    return min(clocks), min(cpus)


if __name__ == "__main__":
    main()
