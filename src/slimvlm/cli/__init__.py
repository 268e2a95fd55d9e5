"""The command line: a table of verbs, and the handling of their errors."""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
import textwrap
from collections.abc import Callable
from contextlib import nullcontext, redirect_stderr
from io import StringIO
from itertools import groupby, takewhile
from typing import Any

import docstring_parser

from slimvlm.cli import models, runs, stages
from slimvlm.cli.memory import memory_explained
from slimvlm.cli.options import parse
from slimvlm.core.errors import ConfigError, SlimError, one_line, printable
from slimvlm.core.files import held
from slimvlm.core.processes import num_ranks
from slimvlm.core.removed import refuse_removed

Verb = Callable[..., None]
GROUPS: dict[str, tuple[Verb, ...]] = {
    "Start to end": (runs.advise, stages.compress, runs.report, runs.study, runs.demo),
    "Look and measure": (
        *(models.inspect, models.chat, stages.evaluate, models.compare, models.bench),
    ),
    "In single steps": (stages.score, stages.plan, stages.prune, stages.recover),
    "Take away": (models.quantize, models.export, models.convert),
}
"""Every verb of the command line, by what it is for."""
VERBS: dict[str, Verb] = {
    verb.__name__.replace("_", "-"): verb for verbs in GROUPS.values() for verb in verbs
}
"""Every verb by its name."""
SHARING_OUTPUT = ("study",)
"""Verbs whose runs may write to one folder at the same time, as they divide the work."""
ABOUT = "Make multimodal LLMs smaller: prune, recover, measure, save."
GOING_ON = ("recover", "compress", "study", "evaluate")
"""Verbs that resume a stopped run."""
TOGETHER = ("recover",)
"""Verbs that several processes of ``torchrun`` do together."""


def main(arguments: list[str] | None = None) -> None:
    """Run a verb. Exit code 0: fine; 2: the user's mistake, in one line; 130: Ctrl-C; 1: ours."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars of the libraries, before their import
    for name in ("torchao", "bitsandbytes", "torch.utils._pytree"):  # they miss a GPU, or kernels
        logging.getLogger(name).setLevel(logging.ERROR)
    words = sys.argv[1:] if arguments is None else arguments
    verb = next(iter(words), "")
    try:
        if verb in ("", "-h", "--help"):
            print(overview(), file=sys.stdout if verb else sys.stderr)
            if not verb:
                raise SystemExit(2)
            return
        refuse_removed(words)
        if verb not in VERBS:
            raise ConfigError(f"verb {verb!r} must be one of: {', '.join(VERBS)}")
        if num_ranks() > 1 and verb not in TOGETHER:
            many = " and ".join(TOGETHER)
            raise ConfigError(f"{verb} runs in one process: torchrun is for {many}")
        given = parsed(verb, words[1:])
        out = None if verb in SHARING_OUTPUT else given.get("out")
        with memory_explained(words), held(out) if out is not None else nullcontext():
            VERBS[verb](**given)
    except SlimError as error:
        print(f"slimvlm: {printable(one_line(error))}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        resume = f"Give the same command again to go on{' (with --log)' * (verb == 'evaluate')}"
        told = resume if verb in GOING_ON else "What was there before is unchanged"
        print(f"slimvlm: stopped. {told}", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


def parsed(verb: str, words: list[str]) -> dict[str, Any]:
    """Read the arguments of a verb; the values of ``--config FILE`` are defaults."""
    defaults = {}
    if verb in ("compress", "recover"):
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        finder.add_argument("--config", nargs="?")
        if (file := finder.parse_known_args(words)[0].config) is not None:
            defaults = stages.defaults_from(file, verb)
    box, columns = StringIO(), os.environ.get("COLUMNS")
    is_help = "-h" in words or "--help" in words
    if not is_help:
        os.environ["COLUMNS"] = "10000"  # no message is broken into lines
    try:
        with redirect_stderr(box):
            return parse(VERBS[verb], words, defaults)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ConfigError(_in_one_line(box.getvalue())) from None
    finally:
        os.environ.pop("COLUMNS", None)
        if columns is not None:
            os.environ["COLUMNS"] = columns


def _in_one_line(box: str) -> str:
    """Join the parts of tyro's error box, each without its explanation.

    Relies on: parts end at a rule, explanations are indented twice or follow an empty line.
    """
    lines = [line.strip("│").rstrip() for line in box.splitlines() if line[:1] not in "╭╰"]
    parts = [
        " ".join(line.strip() for line in takewhile(str.strip, part) if line[:8].strip())
        for is_rule, part in groupby(lines, lambda line: "──" in line)
        if not is_rule
    ]
    skipped = ("Argument helptext:", "For full helptext")
    text = "; ".join(part for part in parts if part and not part.startswith(skipped))
    return text.removeprefix("Error parsing ").replace("{None}|", "").replace(", 'None'", "")


def overview() -> str:
    """List every verb with its purpose, by group."""
    lines = ["usage: slimvlm VERB [options]", "", ABOUT, ""]
    for title, verbs in GROUPS.items():
        lines += [f"{title}:", ""]
        for verb in verbs:
            purpose = docstring_parser.parse(verb.__doc__ or "").short_description or ""
            name = f"  {verb.__name__.replace('_', '-')}".ljust(17)
            width = min(shutil.get_terminal_size().columns, 100)
            lines += textwrap.wrap(purpose, width, initial_indent=name, subsequent_indent=" " * 17)
        lines.append("")
    return "\n".join([*lines, "slimvlm VERB --help explains its options."])
