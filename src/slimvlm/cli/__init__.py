"""The command line: a table of verbs, and the handling of their errors."""

import argparse
import logging
import os
import re
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from dataclasses import fields, is_dataclass
from inspect import signature
from io import StringIO, TextIOWrapper
from itertools import groupby, takewhile
from pathlib import Path
from typing import Any

from slimvlm.cli import steps, verbs
from slimvlm.cli.options import defaults_from, name_of, parse
from slimvlm.core import errors
from slimvlm.core.errors import ConfigError, SlimError, one_line, printable
from slimvlm.core.files import held, require_free, require_place
from slimvlm.core.options import CompressConfig, RecoverConfig, file_only
from slimvlm.core.progress import current_stage, num_ranks, stage

GROUPS: dict[str, tuple[Callable[..., object], ...]] = {  # every verb, by what it is for
    "Start to end": (verbs.advise, verbs.compress, verbs.report, verbs.study, verbs.demo),
    "Inspect and measure": (verbs.inspect, verbs.chat, steps.evaluate, verbs.compare, verbs.bench),
    "Single steps": (steps.score, steps.plan, steps.prune, steps.recover),
    "Convert and export": (steps.image_tokens, verbs.quantize, verbs.export, verbs.convert),
}
VERBS = {name_of(verb): verb for group in GROUPS.values() for verb in group}
ABOUT = "Make multimodal LLMs smaller: prune, recover, measure, save."
GOING_ON = ("recover", "compress", "study", "evaluate")  # verbs that resume a stopped run
LONGEST_LINE = 2000  # characters of an error that are printed
_BYTES = {"bytes": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def main(arguments: list[str] | None = None) -> None:
    """Run a verb. Exit code 0: fine; 2: a mistake; 3: a regression; 130: Ctrl-C; 1: ours."""
    for number in range(3):  # a file opened later must not take the place of a closed stream
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    with suppress(ValueError):  # another thread than the first
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, _stopped_once)
    out, err = (stream or StringIO() for stream in (sys.stdout, sys.stderr))
    for stream in (out, err):
        if isinstance(stream, TextIOWrapper):  # what its encoding lacks is written out
            stream.reconfigure(errors="backslashreplace")
    if not err.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars of the libraries, before their import
    for name in ("torchao", "bitsandbytes", "torch.utils._pytree"):  # they miss a GPU, or kernels
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.setLogRecordFactory(_printable_record)
    words = sys.argv[1:] if arguments is None else arguments
    verb = next(iter(words), "")
    streams: list[Any] = [errors.PrintableStream(out), errors.PrintableStream(err)]
    with redirect_stdout(streams[0]), redirect_stderr(streams[1]):
        try:
            with errors.panics_raised():
                _run(verb, words)
            sys.stdout.flush()
            return
        except SlimError as error:
            code, told = 3 if isinstance(error, errors.RegressionError) else 2, one_line(error)
        except KeyboardInterrupt:
            resume = f"The same command resumes it{' (with --replies)' * (verb == 'evaluate')}"
            goes_on = verb in GOING_ON or "--low-memory" in words
            told = resume if goes_on else "Existing output is unchanged"
            code, told = 130, f"stopped. {told}"
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            raise SystemExit(1) from None
        except Exception as error:
            if os.environ.get("SLIMVLM_DEBUG") == "1":
                raise
            told = f"{type(error).__name__}: {one_line(error)}"[:500]
            code, told = 1, f"internal error ({told}); SLIMVLM_DEBUG=1 shows all"
        with suppress(SlimError):
            print(f"slimvlm: {printable(told)[:LONGEST_LINE]}", file=sys.stderr, flush=True)
        try:
            sys.stdout.flush()
        except SlimError:  # at its end Python would try again
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise SystemExit(code) from None


def _stopped_once(*_: Any) -> None:
    """Raise KeyboardInterrupt; further ones would break off what it lets be tidied up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def _printable_record(*values: Any, **named: Any) -> logging.LogRecord:
    """Make a record of a library's log, which may quote a model's files."""
    record = logging.LogRecord(*values, **named)
    with suppress(TypeError, ValueError):  # words that do not fit their format
        record.msg, record.args = printable(record.getMessage()), ()
    return record


def _run(verb: str, words: list[str]) -> None:
    """Run a verb with its options."""
    if verb in ("", "-h", "--help"):
        print(overview(), file=sys.stdout if verb else sys.stderr)
        if not verb:
            raise SystemExit(2)
        return
    if sys.flags.optimize > 1:  # transformers reads docstrings
        raise ConfigError(f"PYTHONOPTIMIZE {sys.flags.optimize} must be at most 1")
    with errors.raised_as(ConfigError, OSError, "the working folder cannot be read"):
        Path.cwd()
    if verb not in VERBS:
        now = " (images is now image-tokens)" if verb == "images" else ""
        raise ConfigError(f"verb {verb!r} must be one of: {', '.join(VERBS)}{now}")
    if num_ranks() > 1 and verb != "recover":
        raise ConfigError(f"{verb} runs in one process: use torchrun with recover only")
    given = parsed(verb, words[1:])
    out = None if verb == "study" else given.get("out")  # whose runs divide the work
    if out is not None:
        require_place(out)
        if out.is_symlink() and out.is_dir():
            require_free(out, force=True)  # before a lock is written next to what it leads to
    with memory_explained(words), held(out) if out is not None else nullcontext():
        VERBS[verb](**given)


def parsed(verb: str, words: list[str]) -> dict[str, Any]:
    """Read the arguments of a verb; the values of ``--config FILE`` are defaults."""
    flags = [word.partition("=")[0] for word in words if word.startswith("--")]
    defaults, options = (
        {},
        {"compress": (CompressConfig, RecoverConfig), "recover": (RecoverConfig,)},
    )
    if verb in options:
        without_flag: set[str] = set().union(*map(file_only, options[verb]))
        for flag in flags:
            if flag.removeprefix("--").replace("-", "_") in without_flag:
                raise ConfigError(f"{flag} is not a flag of {verb}: set it in the file of --config")
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        finder.add_argument("--config", nargs="?")
        finder.add_argument("--train", nargs="?")
        found = finder.parse_known_args(words)[0]
        if found.config is not None:
            defaults = defaults_from(found.config, verb, found.train == "none")
    kinds = [p.annotation for p in signature(VERBS[verb]).parameters.values()]
    groups = [g for k in kinds for g in getattr(k, "groups", {"": k}).values()]
    known = {row.name for group in groups if is_dataclass(group) for row in fields(group)}
    for flag in flags:
        new = errors.WORDS["renamed"].get(flag.removeprefix("--").replace("-", "_"))
        if new in known:
            raise ConfigError(f"{flag} is now --{new.replace('_', '-')}")
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
        # The parts of tyro's error box, each without its explanation. Relies on: parts end at a
        # rule, explanations are indented twice or follow an empty line.
        drawn = box.getvalue().splitlines()
        lines = [line.strip("│").rstrip() for line in drawn if line[:1] not in "╭╰"]
        parts = [
            " ".join(line.strip() for line in takewhile(str.strip, part) if line[:8].strip())
            for is_rule, part in groupby(lines, lambda line: "──" in line)
            if not is_rule
        ]
        skipped = ("Argument helptext:", "For full helptext")
        text = "; ".join(part for part in parts if part and not part.startswith(skipped))
        text = text.removeprefix("Error parsing ").replace("{None}|", "").replace(", 'None'", "")
        raise ConfigError(text) from None
    finally:
        os.environ.pop("COLUMNS", None)
        if columns is not None:
            os.environ["COLUMNS"] = columns


def overview() -> str:
    """List every verb with its purpose, by group."""
    lines = ["usage: slimvlm VERB [options]", "", ABOUT, ""]
    width = min(shutil.get_terminal_size().columns, 100)
    for title, group in GROUPS.items():
        lines += [f"{title}:", ""]
        for verb in group:
            purpose = (verb.__doc__ or "").partition("\n")[0]
            name = f"  {name_of(verb)}".ljust(17)
            lines += textwrap.wrap(purpose, width, initial_indent=name, subsequent_indent=" " * 17)
        lines.append("")
    return "\n".join([*lines, "slimvlm VERB --help explains its options."])


@contextmanager
def memory_explained(words: Sequence[str]) -> Iterator[None]:
    """Turn an out-of-memory error, of a CPU or any accelerator, into a SlimError of one line."""
    with stage(""):  # those of an earlier command do not count
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not errors.is_out_of_memory(error):
                raise
            from slimvlm.runs.tables import size

            def in_bytes(number: str, unit: str) -> str:
                return size(float(number) * _BYTES.get(unit.lower(), 1))

            told = one_line(error)
            kind = re.search(r"(\w+)(?: backend| error:)? out of memory", told)
            kind = kind or re.search(r"(CU)\w+_ALLOC_FAILED", told)
            number = re.search(r"GPU (\d+)", told)
            word = "cpu" if kind is None else kind[1].lower()
            name = {"hip": "cuda", "cu": "cuda"}.get(word, word)
            where = f"{name}:{number[1]}" if number is not None else name
            during = current_stage() or words[0]
            needed = re.search(r"tried to allocate ([\d.]+) (\w+)", told, re.IGNORECASE)
            room = re.search(r"capacity of ([\d.]+) (\w+) of which ([\d.]+) (\w+)", told)
            about = "" if needed is None else f": {in_bytes(*needed.groups())} more was needed"
            if room is not None:
                about += f"{', ' if about else ': '}{in_bytes(room[3], room[4])} of "
                about += f"{in_bytes(room[1], room[2])} was free"
            cures, on_host = errors.WORDS["cures"], "--device cpu uses the memory of the host"
            other = "a smaller model" if name == "cpu" else on_host
            cure = cures.get(during) or cures.get(words[0], other)
            if cure == cures["score"] and "--low-memory" in words:
                cure = "fewer --samples"
            doing = words[0] if during == words[0] else f"{words[0]}, stage {during!r}"
            line = f"out of memory on {where} during {doing}{about}. What helps: {cure}"
            raise SlimError(line) from error
