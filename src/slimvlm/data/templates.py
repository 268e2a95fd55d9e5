"""Run chat templates and tokenizers, which come with a model, in a child process under limits.

A chat template is a program, and a tokenizer a configuration of one. In the child they can neither
fill the memory nor go on for ever nor end this process.

Relies on: transformers compiles every template with `_compile_jinja_template`. Tried with 5.24.
"""

from __future__ import annotations

import json
import os
import signal
import string
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
from transformers.utils import chat_template_utils

from slimvlm.core.errors import ConfigError, DataError, one_line

MAX_SECONDS = 10.0
"""Processor time of one rendering, which takes a millisecond normally."""
MAX_WAIT = 60.0
"""Seconds until a child that computes nothing, or has no processor, is ended."""
TEMPLATE_BYTES, TOKENIZER_BYTES = 2**29, 2**31
"""Memory of a child."""

_PROBES = [
    f"{string.printable} \u00e4\u00df\u4e2d\u6587 \U0001f600 \u0645\u0631 " * 4,
    "a" * 4096,
    " ".join(["word"] * 1024),
    "",
]


class Child:
    """A process that answers requests one at a time; it ends with this one."""

    def __init__(self, num_bytes: int) -> None:
        program = Path(__file__).with_name("child.py")
        places = {str(Path(each.__file__ or "").parents[1]) for each in (jinja2, tokenizers)}
        self.owner, self._lock = os.getpid(), threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(program), str(num_bytes), *places],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
        )
        self.close = weakref.finalize(self, _ended, self._process, self.owner)

    def ask(self, seconds: float, **request: Any) -> str:
        """Return the reply; raise MemoryError or TimeoutError past the limits."""
        process, line = self._process, json.dumps({"seconds": seconds, **request}, default=str)
        clock = threading.Timer(MAX_WAIT, process.kill)
        with self._lock:
            clock.start()
            try:
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write(line + "\n")
                process.stdin.flush()
                answer = process.stdout.readline()
            except BrokenPipeError:
                answer = ""
            finally:
                clock.cancel()
        if not answer:
            ended = -process.wait()
            in_time = ended not in (signal.SIGPROF, signal.SIGKILL, signal.SIGXCPU)
            raise MemoryError if in_time else TimeoutError
        reply: dict[str, str] = json.loads(answer)
        if reply.get("error") == "memory":
            raise MemoryError
        if "error" in reply:
            message = one_line(ValueError(reply["message"]))
            raise SyntaxError(message) if reply["error"] == "syntax" else ValueError(message)
        return reply["text"]

    def is_ours(self) -> bool:
        """Whether this process started it, and it runs."""
        return self.owner == os.getpid() and self._process.poll() is None


def _ended(process: subprocess.Popen[str], owner: int) -> None:
    """End a child, unless this process is a fork of its owner."""
    if os.getpid() == owner:
        process.kill()
        process.communicate()


_children: list[Child] = []


@contextmanager
def limited() -> Iterator[None]:
    """Let transformers render chat templates in the child process."""
    module: Any = chat_template_utils
    plain = module._compile_jinja_template

    class InChild:
        """What transformers asks of a compiled template."""

        def __init__(self, template: str) -> None:
            self.template = template
            self.environment = _environment(plain)

        def render(self, **values: Any) -> str:
            return rendered(self.template, values)

    module._compile_jinja_template = InChild
    try:
        yield
    finally:
        module._compile_jinja_template = plain


@lru_cache(1)
def _environment(compile_plain: Any) -> Any:
    """Return transformers' environment, which parses templates to find their variables."""
    return compile_plain("").environment


def rendered(template: str, values: dict[str, Any]) -> str:
    """Render a template; raise ConfigError past a limit, DataError if it refuses the values."""
    if not _children or not _children[-1].is_ours():
        _children[:] = [Child(TEMPLATE_BYTES)]
    try:
        return _children[0].ask(MAX_SECONDS, template=template, values=values)
    except TimeoutError as error:
        told = f"takes more than {MAX_SECONDS:g} seconds of computing"
        raise ConfigError(f"model: its chat template {told}") from error
    except MemoryError as error:
        told = f"needs more than {TEMPLATE_BYTES // 2**20} MiB of memory"
        raise ConfigError(f"model: its chat template {told}") from error
    except SyntaxError as error:
        raise ConfigError(f"model: its chat template is malformed ({error.msg})") from error
    except ValueError as error:
        raise DataError(f"the chat template refuses the conversation ({error})") from error


def check_tokenizer(file: Path) -> None:
    """Raise ValueError for a ``tokenizer.json`` that cannot encode ordinary text under limits."""
    stat = file.stat()
    _probe(str(file.resolve()), stat.st_mtime_ns, stat.st_size)


@lru_cache(64)
def _probe(file: str, *version: int) -> None:
    child = Child(TOKENIZER_BYTES)
    try:
        child.ask(6 * MAX_SECONDS, tokenizer=file, texts=_PROBES)
    except TimeoutError as error:
        raise ValueError("it takes minutes to encode a line") from error
    except MemoryError as error:
        told = f"it needs more than {TOKENIZER_BYTES // 2**30} GiB of memory, or ends its process"
        raise ValueError(told) from error
    finally:
        child.close()
