"""The command line: a table of verbs, and what becomes of their errors."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable

import tyro

from slimvlm.errors import SlimError
from slimvlm.verbs import (
    benchmarking,
    converting,
    evaluating,
    inspecting,
    planning,
    pruning,
    recovering,
    reporting,
    running,
    studying,
)

VERBS: dict[str, Callable[..., None]] = {
    verb.__name__.replace("_", "-"): verb
    for verb in (
        inspecting.inspect,
        planning.score,
        planning.plan,
        pruning.prune,
        recovering.recover,
        recovering.cache_teacher,
        evaluating.evaluate,
        evaluating.compare,
        benchmarking.bench,
        running.compress,
        studying.study,
        reporting.report,
        evaluating.chat,
        running.demo,
        converting.convert,
    )
}
"""Every verb of the command line."""


def main(arguments: list[str] | None = None) -> None:
    """Run a verb. Exit code 0: fine; 2: the user's mistake, in one line; 1: ours."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars of the libraries, before their import
    for name in ("torchao", "torch.utils._pytree"):  # torchao complains of a machine without GPU
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        tyro.extras.subcommand_cli_from_dict(
            VERBS,
            prog="slimvlm",
            description="Make multimodal LLMs smaller: prune, recover, measure, save.",
            args=arguments,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    except SlimError as error:
        message = re.sub(r"\s+", " ", str(error))
        print(f"slimvlm: {message}", file=sys.stderr)
        raise SystemExit(2) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
