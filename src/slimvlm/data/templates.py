"""Run chat templates and tokenizers, which come with a model, in a child process under limits.

A chat template is a program, and a tokenizer a configuration of one. In the child they can neither
fill the memory nor go on for ever nor end this process.

Relies on: transformers compiles every template with `_compile_jinja_template`. Tried with 5.24.
"""

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
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jinja2
import tokenizers
from transformers.utils import chat_template_utils

from slimvlm.core.errors import ConfigError, DataError, one_line

MAX_SECONDS = 10.0  # processor time of one rendering, which takes a millisecond normally
MAX_WAIT = 60.0  # seconds until a child that computes nothing, or has no processor, is ended
TEMPLATE_BYTES, TOKENIZER_BYTES = 2**29, 2**31  # memory of a child
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
                assert process.stdout is not None
                print(line, file=process.stdin, flush=True)
                answer = process.stdout.readline()
            except BrokenPipeError:
                answer = ""
            except BaseException:  # the next request would read the reply to this one
                self.close()
                raise
            finally:
                clock.cancel()
        if not answer:
            in_time = -process.wait() not in (signal.SIGPROF, signal.SIGKILL, signal.SIGXCPU)
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

    def parsed(template: str) -> Any:
        """Return a tree of a template's variables alone: to parse others computes them."""
        names = rendered(template).split()
        return jinja2.Environment().parse("".join(f"{{{{ {name} }}}}" for name in names))

    module._compile_jinja_template = lambda template: SimpleNamespace(
        render=lambda **values: rendered(template, values=values),
        environment=SimpleNamespace(parse=parsed),
    )
    try:
        yield
    finally:
        module._compile_jinja_template = plain


def rendered(template: str, **values: Any) -> str:
    """Render a template, or without ``values`` list the variables that it reads."""
    if not _children or not _children[-1].is_ours():
        _children[:] = [Child(TEMPLATE_BYTES)]
    mistakes = {
        TimeoutError: f"takes more than {MAX_SECONDS:g} seconds of computing",
        MemoryError: f"needs more than {TEMPLATE_BYTES // 2**20} MiB of memory",
    }
    try:
        return _children[0].ask(MAX_SECONDS, template=template, **values)
    except (TimeoutError, MemoryError, SyntaxError) as error:
        told = mistakes.get(type(error), f"is malformed ({error})")
        raise ConfigError(f"model: its chat template {told}") from error
    except ValueError as error:
        raise DataError(f"the chat template refuses the sample ({error})") from error


Version = tuple[str, int, int]  # a tokenizer's file, its date and its size
_files: dict[str, Version] = {}
_encoders: dict[Version, Child] = {}  # of the last few tokenizers


def check_tokenizer(file: Path, name: str = "") -> None:
    """Raise ValueError for a ``tokenizer.json`` that cannot encode ordinary text under limits."""
    stat = file.stat()
    version = str(file.resolve()), stat.st_mtime_ns, stat.st_size
    _files[name] = version  # with which `check_texts` tries texts later
    if version not in _encoders:
        check_texts(name, _PROBES)


def check_texts(name: str, texts: list[str]) -> None:
    """Raise ValueError for texts that a tokenizer cannot encode under limits."""
    # a template can write what no probe has: a tokenizer may grow or end its process by that alone
    version = _files.get(name)
    if version is None or not Path(version[0]).exists():
        return
    if version not in _encoders or not _encoders[version].is_ours():
        for old in list(_encoders)[:-3]:
            del _encoders[old]
        _encoders[version] = Child(TOKENIZER_BYTES)
    try:
        _encoders[version].ask(6 * MAX_SECONDS, tokenizer=version[0], texts=texts)
    except TimeoutError as error:
        raise ValueError("its tokenizer takes minutes to encode a text") from error
    except MemoryError as error:
        told = f"needs more than {TOKENIZER_BYTES // 2**30} GiB of memory, or ends its process"
        raise ValueError(f"its tokenizer {told}") from error
