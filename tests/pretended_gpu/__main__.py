"""Run a command on a pretended card: ``python -m tests.pretended_gpu slimvlm inspect demo``.

A first argument that ends in ``.py`` is a script. ``PRETENDED_GPU_LIMIT`` is the card's size in
bytes.
"""

from __future__ import annotations

import os
import runpy
import sys

from tests import pretended_gpu


def main() -> None:
    if pretended_gpu.REASON is not None:
        raise SystemExit(pretended_gpu.REASON)
    if size := os.environ.get("PRETENDED_GPU_LIMIT"):
        pretended_gpu.set_limit(int(size), 0)
    sys.argv = sys.argv[1:]
    if sys.argv[0].endswith(".py"):
        runpy.run_path(sys.argv[0], run_name="__main__")
        return
    from slimvlm.cli import main as slimvlm

    sys.argv = sys.argv[sys.argv[0] == "slimvlm" :]
    slimvlm(sys.argv)


if __name__ == "__main__":
    main()
