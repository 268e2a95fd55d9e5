"""Store the weights of a finished model in fewer bits."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from slimvlm.verbs.options import Model
from slimvlm.verbs.printing import print_json


def quantize(
    model: Model,
    out: Path,
    to: Literal["int8", "int4"] = "int8",
    backend: Literal["auto", "torchao", "bitsandbytes"] = "auto",
    device: str | None = None,
    force: bool = False,
    json: bool = False,
) -> None:
    """Write a checkpoint whose decoder layers have weights of 8 or 4 bits.

    Tower, projector, embeddings and head stay as they are. Quantise last: the result cannot be
    pruned or trained.

    Args:
        model: Folder, hub id, or demo.
        out: The new checkpoint folder.
        to: Type of the weights.
        backend: Library; auto is torchao, but for int4 on a CPU, which needs bitsandbytes.
        device: Where to quantise, such as cpu or cuda:1; default the first GPU, else the CPU.
        force: Replace an existing folder.
        json: Print JSON.
    """
    from dataclasses import asdict

    from slimvlm.quantization import quantize as run
    from slimvlm.summary import size

    done = run(model, out, to, backend, device, force)
    if json:
        print_json({**asdict(done), "saved": done.saved})
        return
    before, after = size(done.bytes_before), size(done.bytes_after)
    print(f"{done.to} by {done.backend}: weights {before} -> {after} ({done.saved:.1%} less)")
    print(f"checkpoint: {out}; loading it needs {done.backend}")
