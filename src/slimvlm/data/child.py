"""The program of a child process that runs what comes with a model: its template and tokenizer.

Started as ``python -I child.py``, so that it imports neither slimvlm nor torch. Each line of stdin
is a request in JSON, and each line of stdout its reply. A request that takes more than its memory
or processor time ends the process. `slimvlm.data.templates` is the other side.
"""

import contextlib
import functools
import json
import signal
import sys
from datetime import datetime
from typing import Any

MOST_ADDED = 2**17  # characters of a rendered conversation beyond four times those of its texts


@functools.lru_cache(64)
def compiled(template: str) -> Any:
    """Compile a template with the names that transformers gives to templates."""
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """Read ``{% generation %}``, which marks what an assistant says, as its content."""

        tags = {"generation"}  # noqa: RUF012  (Jinja's type)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    class PlainNamespace(Namespace):
        """A namespace without names that begin with an underscore."""

        def __init__(*values: Any, **named: Any) -> None:
            self, *given = values
            Namespace.__init__(self)
            for name, value in dict(*given, **named).items():
                self[name] = value

        def __setitem__(self, name: str, value: Any) -> None:
            if str(name).startswith("_"):
                raise SecurityError(f"name {name!r} begins with an underscore")
            super().__setitem__(name, value)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, *given: Any, **named: Any) -> str:
        names = ("ensure_ascii", "indent", "separators", "sort_keys")
        how = {"ensure_ascii": False, **dict(zip(names, given, strict=False)), **named}
        return json.dumps(value, **how)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(
        namespace=PlainNamespace,
        raise_exception=raise_exception,
        strftime_now=lambda form: datetime.now().strftime(form),
    )
    environment.globals.pop("lipsum")
    return environment.from_string(template)


def rendered(template: str, values: dict[str, Any]) -> str:
    """Render a chat template."""
    text = str(compiled(template).render(**values))
    if len(text) > 4 * len(json.dumps(values)) + MOST_ADDED:
        raise ValueError(f"it makes {len(text):,} characters of it")
    return text


_loaded: dict[str, Any] = {}  # tokenizers by file


def probed(tokenizer: str, texts: list[str]) -> str:
    """Encode texts with a ``tokenizer.json`` and decode their tokens."""
    from tokenizers import Tokenizer

    if tokenizer not in _loaded:
        _loaded[tokenizer] = Tokenizer.from_file(tokenizer)
    for text in texts:
        _loaded[tokenizer].decode(_loaded[tokenizer].encode(text).ids[:10_000])
    return ""


def main() -> None:
    """Limit memory, and write no file, where the system can; answer requests until stdin ends."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]),) * 2)
        for output in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):
            resource.setrlimit(output, (0, 0))
    sys.path += sys.argv[2:]  # where jinja2 and tokenizers are installed
    has_timer = hasattr(signal, "ITIMER_PROF")  # ends this process after so much computing
    for line in sys.stdin:
        request = json.loads(line)
        seconds = request.pop("seconds")
        if has_timer:
            signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            reply = {"text": (probed if "tokenizer" in request else rendered)(**request)}
        except MemoryError:
            reply = {"error": "memory", "message": ""}
        except BaseException as error:  # a template is a program, and Rust panics
            kind = "syntax" if type(error).__name__ == "TemplateSyntaxError" else "refused"
            reply = {"error": kind, "message": (str(error) or type(error).__name__)[:10_000]}
        line = json.dumps(reply)
        if has_timer:
            signal.setitimer(signal.ITIMER_PROF, 0)
        print(line, flush=True)


if __name__ == "__main__":
    main()
