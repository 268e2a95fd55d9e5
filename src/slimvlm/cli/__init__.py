"""The command line: a table of verbs, and what becomes of their errors."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from itertools import groupby, takewhile
from typing import Any

import tyro

from slimvlm.cli import models, runs, stages
from slimvlm.cli.help import help_text, overview
from slimvlm.cli.memory import memory_explained
from slimvlm.cli.options import TYPES
from slimvlm.core.errors import ConfigError, SlimError, one_line, printable
from slimvlm.core.files import held
from slimvlm.core.processes import num_ranks
from slimvlm.core.removed import refuse_removed

Verb = Callable[..., None]
SHARING_OUTPUT: tuple[Verb, ...] = (runs.study,)
"""Verbs whose runs work in one folder at a time and agree on who does what."""


def _holding_output(verb: Verb) -> Verb:
    """The same verb, which lets no other run write to its ``out`` meanwhile."""
    if "out" not in inspect.signature(verb).parameters or verb in SHARING_OUTPUT:
        return verb

    @functools.wraps(verb)
    def holding(*args: Any, **kwargs: Any) -> None:
        out = inspect.signature(verb).bind(*args, **kwargs).arguments.get("out")
        if out is None:
            verb(*args, **kwargs)
        else:
            with held(out):
                verb(*args, **kwargs)

    return holding


GROUPS: dict[str, tuple[Verb, ...]] = {
    "Start to end": (runs.advise, stages.compress, runs.report, runs.study, runs.demo),
    "Look and measure": (
        *(models.inspect, models.chat, stages.evaluate, models.compare, models.bench),
    ),
    "In single steps": (
        *(stages.score, stages.plan, stages.prune, stages.recover, stages.cache_teacher),
    ),
    "Take away": (models.quantize, models.export, models.push, models.verify, models.convert),
}
"""Every verb of the command line, by what it is for."""
VERBS: dict[str, Verb] = {
    verb.__name__.replace("_", "-"): _holding_output(verb)
    for verbs in GROUPS.values()
    for verb in verbs
}
"""Every verb by its name."""
ABOUT = "Make multimodal LLMs smaller: prune, recover, measure, save."
GOING_ON = ("recover", "cache-teacher", "compress", "study", "evaluate")
"""Verbs that go on where a stopped one was."""
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
        if (shown := _asked_for_help(words)) is not None:
            print(shown, file=sys.stdout if verb else sys.stderr)
            if not verb:
                raise SystemExit(2)
            return
        refuse_removed(words)
        _require_one_process(verb)
        _require_no_data_file(words)
        if verb == "compress":
            from slimvlm.runs.command import with_config

            words = with_config(words)
        with memory_explained(words):
            _asked(words)()
    except SlimError as error:
        print(f"slimvlm: {printable(one_line(error))}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"slimvlm: stopped. {_how_to_go_on(verb)}", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


def _asked(words: Sequence[str] | None) -> Callable[[], None]:
    """What the words ask for, ready to be called.

    Raises:
        ConfigError: If they are no verb with its options.
    """
    box = StringIO()
    try:
        with redirect_stderr(box), _wide_terminal():
            call: Callable[[], None] = tyro.extras.subcommand_cli_from_dict(
                {name: _later(verb) for name, verb in VERBS.items()},
                prog="slimvlm",
                description=ABOUT,
                args=words,
                config=(tyro.conf.FlagCreatePairsOff,),
                registry=TYPES,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ConfigError(_out_of(box.getvalue())) from None
    return call


@contextmanager
def _wide_terminal() -> Iterator[None]:
    """Inside, nothing that is said is broken into lines."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "10000"
    try:
        yield
    finally:
        os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before


def _later(verb: Verb) -> Callable[..., Callable[[], None]]:
    """A function with a verb's arguments that only binds them."""

    @functools.wraps(verb)
    def bound(*args: Any, **kwargs: Any) -> Callable[[], None]:
        return functools.partial(verb, *args, **kwargs)

    return bound


def _out_of(box: str) -> str:
    """What tyro says in a box, in one line: of each part what comes before its explanations.

    Relies on: parts end at a rule, explanations are indented twice or follow an empty line.
    """
    lines = [line.strip("│").rstrip() for line in box.splitlines() if line[:1] not in "╭╰"]
    parts = [
        [line.strip() for line in takewhile(str.strip, part) if not line.startswith(" " * 8)]
        for is_rule, part in groupby(lines, lambda line: "──" in line)
        if not is_rule
    ]
    told = (" ".join(part) for part in parts)
    text = "; ".join(each for each in told if each and not each.startswith(_EXPLANATIONS))
    return text.removeprefix("Error parsing ").replace("{None}|", "")


_EXPLANATIONS = ("Argument helptext:", "For full helptext")


def _asked_for_help(words: Sequence[str]) -> str | None:
    """The help of a verb, or about all of them, if that is what is asked for."""
    first = words[0] if words else "--help"
    if first in _HELP:
        groups = {
            title: {verb.__name__.replace("_", "-"): verb for verb in verbs}
            for title, verbs in GROUPS.items()
        }
        return overview(ABOUT, groups)
    if first not in VERBS or not {*_HELP} & {*words}:
        return None
    return help_text(first, VERBS[first], everything="--help-all" in words)


_HELP = ("-h", "--help", "--help-all")


def _how_to_go_on(verb: str) -> str:
    if verb in GOING_ON:
        return f"Give the same command again to go on{' (with --log)' * (verb == 'evaluate')}"
    return "What was there before is unchanged"


def _require_no_data_file(words: Sequence[str]) -> None:
    """Elsewhere ``--data`` takes a file; ``advise`` is only told whether there is one."""
    behind = words[words.index("--data") + 1 :] if "--data" in words else []
    if words[:1] == ["advise"] and behind and not behind[0].startswith("-"):
        raise ConfigError(
            f"data {behind[0]!r}: advise reads no data. Say how much there is with --samples, "
            "or let compress --dry-run count it"
        )


def _require_one_process(verb: str) -> None:
    """Most verbs write from one process; several would do the same work over each other."""
    if num_ranks() > 1 and verb in VERBS and verb not in TOGETHER:
        raise ConfigError(f"{verb} runs in one process: torchrun is for {' and '.join(TOGETHER)}")
