"""Run chat templates and tokenizers, which come with a model, in a child process under limits.

A chat template is a program, and a tokenizer a configuration of one. In the child they can neither
fill the memory nor go on for ever nor end this process.
"""

import json
import os
import signal
import string
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import jinja2
import tokenizers

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
        self._lock = threading.Lock()
        self.process = subprocess.Popen(
            [sys.executable, "-I", str(program), str(num_bytes), *places],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
        )
        self.close = weakref.finalize(self, _end, self.process, os.getpid())

    def ask(self, seconds: float, **request: Any) -> str:
        """Return the reply; raise MemoryError or TimeoutError past the limits."""
        process, line = self.process, json.dumps({"seconds": seconds, **request}, default=str)
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


def _end(process: subprocess.Popen[str], owner: int) -> None:
    if os.getpid() == owner:  # and no fork of it
        process.kill()
        process.communicate()


Version = tuple[str, int, int]  # a tokenizer's file, its date and its size
_files: dict[str, Version] = {}  # by the names of the tokenizers
_children: dict[tuple[int, Version | None], Child] = {}
"""By the process that started them, which is not its forks, and the tokenizer, if any."""


def _child(tokenizer: Version | None = None) -> Child:
    """Return this process's child for templates or a tokenizer; of these the last few stay."""
    key = os.getpid(), tokenizer
    if key not in _children or _children[key].process.poll() is not None:
        ours = [each for each in _children if each[0] == key[0] and each[1] is not None]
        for old in ours[:-3]:
            del _children[old]
        _children[key] = Child(TEMPLATE_BYTES if tokenizer is None else TOKENIZER_BYTES)
    return _children[key]


def rendered(template: str, values: dict[str, Any]) -> str:
    """Render a template."""
    mistakes = {
        TimeoutError: f"takes more than {MAX_SECONDS:g} seconds of computing",
        MemoryError: f"needs more than {TEMPLATE_BYTES // 2**20} MiB of memory",
    }
    try:
        return _child().ask(MAX_SECONDS, template=template, values=values)
    except (TimeoutError, MemoryError, SyntaxError) as error:
        told = mistakes.get(type(error), f"is malformed ({error})")
        raise ConfigError(f"model: its chat template {told}") from error
    except ValueError as error:
        raise DataError(f"the chat template refuses the sample ({error})") from error


def check_tokenizer(file: Path, name: str = "") -> None:
    """Raise ValueError for a ``tokenizer.json`` that cannot encode ordinary text under limits."""
    stat = file.stat()
    version = str(file.resolve()), stat.st_mtime_ns, stat.st_size
    _files[name] = version  # with which `check_texts` tries texts later
    if (key := (os.getpid(), version)) not in _children:
        try:
            check_texts(name, _PROBES)
        except ValueError:
            _children.pop(key, None)  # who has a child has passed
            raise


def check_texts(name: str, texts: list[str]) -> None:
    """Raise ValueError for texts that a tokenizer cannot encode under limits."""
    # a template can write what no probe has: a tokenizer may grow or end its process by that alone
    version = _files.get(name)
    if version is None or not Path(version[0]).exists():
        return
    try:
        _child(version).ask(6 * MAX_SECONDS, tokenizer=version[0], texts=texts)
    except TimeoutError as error:
        raise ValueError("its tokenizer takes minutes to encode a text") from error
    except MemoryError as error:
        told = f"needs more than {TOKENIZER_BYTES // 2**30} GiB of memory, or ends its process"
        raise ValueError(f"its tokenizer {told}") from error
