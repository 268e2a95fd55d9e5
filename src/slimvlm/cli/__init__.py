"""The command line: a table of verbs, and what becomes of their errors."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from slimvlm.cli import models, runs, stages
from slimvlm.cli.help import help_text
from slimvlm.core.errors import ConfigError, SlimError, one_line, printable
from slimvlm.core.files import held
from slimvlm.core.processes import num_ranks

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


VERBS: dict[str, Verb] = {
    verb.__name__.replace("_", "-"): _holding_output(verb)
    for verb in (
        models.inspect,
        models.verify,
        stages.score,
        stages.plan,
        stages.prune,
        stages.recover,
        stages.cache_teacher,
        stages.evaluate,
        models.compare,
        models.quantize,
        models.export,
        models.bench,
        stages.compress,
        runs.study,
        runs.report,
        runs.advise,
        models.push,
        models.chat,
        runs.demo,
        models.convert,
    )
}
"""Every verb of the command line."""
GOING_ON = ("recover", "cache-teacher", "compress", "study", "evaluate")
"""Verbs that go on where a stopped one was."""
TOGETHER = ("recover",)
"""Verbs that several processes of ``torchrun`` do together."""


def main(arguments: list[str] | None = None) -> None:
    """Run a verb. Exit code 0: fine; 2: the user's mistake, in one line; 130: Ctrl-C; 1: ours."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars of the libraries, before their import
    for name in ("torchao", "torch.utils._pytree"):  # torchao complains of a machine without GPU
        logging.getLogger(name).setLevel(logging.ERROR)
    verb = next(iter(sys.argv[1:] if arguments is None else arguments), "")
    try:
        if (shown := _asked_for_help(sys.argv[1:] if arguments is None else arguments)) is not None:
            print(shown)
            return
        _require_one_process(verb)
        if verb == "compress":
            from slimvlm.runs.command import with_config

            arguments = with_config(sys.argv[1:] if arguments is None else arguments)
        tyro.extras.subcommand_cli_from_dict(
            VERBS,
            prog="slimvlm",
            description="Make multimodal LLMs smaller: prune, recover, measure, save.",
            args=arguments,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    except SlimError as error:
        print(f"slimvlm: {printable(one_line(error))}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"slimvlm: stopped. {_how_to_go_on(verb)}", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


def _asked_for_help(words: Sequence[str]) -> str | None:
    """The help of a verb, if that is what is asked for; tyro has that of all verbs."""
    everything = "--help-all" in words
    if words[:1] == [] or words[0] not in VERBS or not (everything or {"-h", "--help"} & {*words}):
        return None
    return help_text(words[0], VERBS[words[0]], everything)


def _how_to_go_on(verb: str) -> str:
    if verb in GOING_ON:
        return f"Give the same command again to go on{' (with --log)' * (verb == 'evaluate')}"
    return "What was there before is unchanged"


def _require_one_process(verb: str) -> None:
    """Most verbs write from one process; several would do the same work over each other."""
    if num_ranks() > 1 and verb in VERBS and verb not in TOGETHER:
        raise ConfigError(f"{verb} runs in one process: torchrun is for {' and '.join(TOGETHER)}")
