"""Ask engines that serve checkpoints the same as transformers, and time them.

An engine runs in its own interpreter (`ask_engine.py`), either this one or that of its program on
PATH. Used by ``tests/journeys/test_engines.py`` and ``benchmarks/engines.py``.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from math import ceil
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import yaml
from PIL import Image, ImageOps

from slimvlm.core.errors import ConfigError, ReloadError
from slimvlm.core.options import OutType, Workload
from slimvlm.data import chat
from slimvlm.data.samples import Question, open_image
from slimvlm.evaluation.ask import answer
from slimvlm.evaluation.bench import Bench, Run, Side, in_turn, random_prompts, summarised
from slimvlm.export.gguf import export_gguf, write_backbone
from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.cost import BYTES, kv_cache_bytes, weight_bytes
from slimvlm.models.load import empty_model, is_quantized, load, load_config, resolve
from slimvlm.models.parts import context_of, family_of
from slimvlm.models.serving import GGUF_PICTURES

MAX_LENGTH = 2048
"""Tokens of a prompt and its reply that an engine makes room for, if the model can take as many."""
BATCH = 8
GIB = 2**30
GGUF_DTYPES: dict[str, OutType] = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


@dataclass(frozen=True)
class Engine:
    """An engine: the module of its interpreter, its command, and packages for pip, tested on CPUs.

    ``without`` are packages that break it there; ``backbone`` is a language backbone alone.
    """

    title: str
    module: str
    program: str
    packages: tuple[str, ...]
    without: tuple[str, ...] = ()
    reads: Literal["checkpoint", "gguf", "backbone"] = "checkpoint"


ROWS = yaml.safe_load(Path(__file__).with_name("engines.yaml").read_text())
ENGINES = {
    name: Engine(**{k: tuple(v) if isinstance(v, list) else v for k, v in row.items()})
    for name, row in ROWS.items()
}
"""Engines by the target's name in `slimvlm.models.serving`."""


@dataclass(frozen=True)
class Compared:
    """Replies of an engine and of transformers; ``error`` if it did not load the checkpoint.

    ``prompt_tokens`` are counted by the engine, those of pictures included, if it tells.
    """

    model: str
    engine: str
    version: str
    prompts: tuple[str, ...]
    expected: tuple[str, ...]
    found: tuple[str, ...] = ()
    error: str = ""
    prompt_tokens: tuple[int, ...] = ()

    @property
    def same(self) -> int:
        """Count equal replies."""
        return sum(a == b for a, b in zip(self.expected, self.found, strict=False))

    @property
    def is_same(self) -> bool:
        """Whether all replies are equal."""
        return self.expected == self.found

    def summary(self) -> str:
        """Describe the result in one line, and one for each difference."""
        if self.error:
            return f"{self.engine} {self.version} does not load {self.model}: {self.error}"
        lines = [f"{self.engine} {self.version}: {self.same} of {len(self.found)} {self.model}"]
        for prompt, ours, theirs in zip(self.prompts, self.expected, self.found, strict=True):
            if ours != theirs:
                lines.append(f"  {prompt!r}: {ours!r} became {theirs!r}")
        return "\n".join(lines)


def interpreter_of(name: str) -> Path:
    """Find the Python that has an engine: this one, or the one that its program belongs to."""
    engine = ENGINES[name]
    if find_spec(engine.module) is not None:
        return Path(sys.executable)
    program = shutil.which(engine.program)
    if program is not None and (python := Path(program).with_name("python")).exists():
        return python
    raise ConfigError(
        f"engine {name!r}: not found here and no {engine.program!r} on PATH: "
        f"pip install {' '.join(engine.packages)}, in an environment of its own"
    )


def plain_questions(sees: bool) -> list[Question]:
    """Make a few questions about text, and about plain images if the model sees."""
    texts = ["What is the capital of France?", "Count from one to five.", "Say hello."]
    asked = [Question(f"text-{i}", text, ()) for i, text in enumerate(texts)]
    shade = Image.linear_gradient("L").resize((224, 224))
    for i, prompt in enumerate(("What is shown here?", "Which colours are there?") if sees else ()):
        for j, colours in enumerate((("black", "red"), ("blue", "white"))):
            picture = ImageOps.colorize(shade, *colours)
            asked.append(Question(f"picture-{i}-{j}", prompt, (), (picture,)))
    return asked


def compare(
    models: Sequence[str | Path],
    name: str,
    questions: Sequence[Question] | None = None,
    max_new_tokens: int = 16,
    original: str | Path | None = None,
    draft: str | Path | None = None,
) -> list[Compared]:
    """Compare greedy replies of an engine, started once for some checkpoints, with transformers'.

    Both compute in float32, or in bfloat16 if weights are quantised, where replies may differ.
    ``original`` is that of models that lost tokens, for llama.cpp; ``draft`` proposes four tokens
    at a time, in vLLM alone.
    """
    python, engine = interpreter_of(name), ENGINES[name]
    with tempfile.TemporaryDirectory(prefix="slimvlm-engine-") as folder:
        works = [Path(folder) / str(number) for number in range(len(models))]
        tokenizers, asked = [], []
        for model, work in zip(models, works, strict=True):
            work.mkdir()
            dtype = "bfloat16" if is_quantized(load_config(model)) else "float32"
            loaded, processor = load(model, dtype=dtype, device="cpu")
            readable = readable_by(engine, model, dtype, work, original)
            shows = engine.reads == "checkpoint" or "pictures" in readable
            sees = chat.can_see(processor) and shows
            chosen = list(plain_questions(sees) if questions is None else questions)
            request = {
                **readable,
                "dtype": str(loaded.dtype).removeprefix("torch."),
                "max_length": min(context_of(loaded.config) or MAX_LENGTH, MAX_LENGTH),
                "max_new_tokens": max_new_tokens,
                "at_once": 1 if engine.reads == "gguf" else BATCH,
                "sees": any(question.images for question in chosen),
                "picture_text": GGUF_PICTURES.get(loaded.config.model_type),
                "prompts": [_prompt(processor, question, work) for question in chosen],
                "draft": None if draft is None else str(draft),
                "proposed": 4,
            }
            (work / "request.json").write_text(json.dumps(request))
            batches = [chosen[i : i + BATCH] for i in range(0, len(chosen), BATCH)]
            replies = [answer(loaded, processor, batch, max_new_tokens) for batch in batches]
            expected = tuple(reply for batch in replies for reply, _ in batch)
            prompts = tuple(question.prompt for question in chosen)
            asked.append(Compared(str(model), name, "", prompts, expected))
            tokenizers.append(chat.tokenizer_of(processor))
        how = command_of(engine, python, "answer", *works)
        done = subprocess.run(capture_output=True, check=False, **how)
        if done.returncode:
            raise ended_early(engine, done.stderr)
        written = [json.loads((work / "replies.json").read_text()) for work in works]
    return [
        replace(
            one,
            version=found["version"],
            error=found.get("error", ""),
            prompt_tokens=tuple(found.get("prompt_tokens", ())),
            found=tuple(
                (r if isinstance(r, str) else words.decode(r, skip_special_tokens=True)).strip()
                for r in found.get("replies", ())
            ),
        )
        for one, found, words in zip(asked, written, tokenizers, strict=True)
    ]


def readable_by(
    engine: Engine, model: str | Path, dtype: str, work: Path, original: str | Path | None = None
) -> dict[str, str]:
    """Return the path that an engine loads: the checkpoint, or files made of it in a folder."""
    if engine.reads == "gguf":
        written = export_gguf(model, work / "model.gguf", GGUF_DTYPES[dtype], original=original)
        sees = {} if written.pictures is None else {"pictures": str(written.pictures)}
        return {"checkpoint": str(written.text), **sees}
    if engine.reads == "backbone" and family_of(load_config(model).model_type).text_config:
        write_backbone(model, work / "text")
        return {"checkpoint": str(work / "text")}
    return {"checkpoint": str(Path(resolve(model)).resolve())}


def command_of(engine: Engine, python: Path, verb: str, *works: Path) -> dict[str, Any]:
    """Make the arguments of `subprocess.Popen` that start the asking program."""
    script = Path(__file__).with_name("ask_engine.py")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    words = [str(python), str(script), verb, engine.module, *map(str, works)]
    return {"args": words, "env": environment, "text": True}


def ended_early(engine: Engine, log: str) -> ReloadError:
    """Make an error of an engine's last line of output."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    last = ([line for line in lines if "Error" in line] or lines or ["no message"])[-1]
    return ReloadError(f"{engine.module} ended early: {last}")


def _prompt(processor: Any, question: Question, work: Path) -> dict[str, Any]:
    """Give a question as a text, and as token ids with one placeholder for its picture."""
    text = chat.render(processor, chat.question_messages(question), generate=True)
    picture = None
    if question.images:
        picture = str(work / f"{len(list(work.iterdir()))}.png")
        open_image(question.images[0]).save(picture)
    tokenizer = chat.tokenizer_of(processor)
    adds = chat.adds_special_tokens(tokenizer, text)
    ids = tokenizer(text, add_special_tokens=adds).input_ids
    return {"text": text, "adds_special_tokens": adds, "ids": ids, "picture": picture}


def bench_engine(
    name: str,
    model: str,
    baseline: str | None = None,
    workload: Workload | None = None,
    clock: Literal["wall", "cpu"] = "wall",
) -> Bench:
    """Time prefill and decode in an engine; with a baseline, both in turn.

    Each model has its own process, and one computes at a time. Prompts are random tokens, sent as a
    batch; answers have a fixed length. Prefill ends at the first new token, a mean over the batch.
    Peak memory is the whole process's, with the cache that an engine reserves. The clock ``cpu`` is
    for one thread on a core that others use, too.
    """
    workload = workload or Workload()
    python, engine = interpreter_of(name), ENGINES[name]
    names = (model, *((baseline,) if baseline is not None else ()))
    sides = [_side(each) for each in names]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slimvlm-engine-")))
        served = []
        length, at_once = workload.prompt_tokens + workload.new_tokens + 1, max(workload.sizes)
        for number, side in enumerate(sides):
            work = folder / str(number)
            work.mkdir()
            cache = at_once * kv_cache_bytes(side.shape, length, side.dtype)
            request = {
                **readable_by(engine, side.name, side.dtype, work),
                "dtype": side.dtype,
                "max_length": length,
                "at_once": at_once,
                "cache_gib": ceil(1.25 * cache / GIB),
                "sees": side.shape.vision_params > 0,
            }
            (work / "request.json").write_text(json.dumps(request))
            served.append(stack.enter_context(Served(engine, python, work, clock)))
            version = served[-1].read()["version"]
        for one, side in zip(served, sides, strict=True):  # to warm up
            one.time(random_prompts(side.shape, workload, 1).tolist(), 2)
        runs, peaks = {}, {}
        for size in workload.sizes:
            prompts = [random_prompts(side.shape, workload, size).tolist() for side in sides]
            runs[size] = in_turn(
                [
                    partial(one.time, asked, workload.new_tokens)
                    for one, asked in zip(served, prompts, strict=True)
                ],
                workload.repeats,
            )
            peaks[size] = [one.peak_bytes for one in served]
    device = f"{engine.title} {version}"
    return summarised(sides, workload, runs, peaks, device, sides[0].dtype)


def _side(name: str) -> Side:
    """Read a model's shape and bytes from its configuration."""
    config = load_config(name)
    if is_quantized(config):
        raise ConfigError(f"model {name!r} is quantised, and its ideal in an engine is not known")
    dtype = str(getattr(config, "dtype", None) or "bfloat16").removeprefix("torch.")
    shape = read_anatomy(empty_model(config))
    layers = sum(layer.params for layer in shape.layers)
    read = layers + shape.final_norm_params + (shape.head_params or shape.embedding_params)
    return Side(name, shape, dtype, weight_bytes(shape, dtype), read * BYTES[dtype])


class Served:
    """A process of an engine with one loaded checkpoint, that of a folder's ``request.json``."""

    def __init__(self, engine: Engine, python: Path, work: Path, clock: str) -> None:
        self._engine, self._clock, self._log = engine, clock, work / "log"
        with self._log.open("w") as log:
            how, pipe = command_of(engine, python, "time", work), subprocess.PIPE
            self._process = subprocess.Popen(stdin=pipe, stdout=pipe, stderr=log, **how)
        self.peak_bytes = 0

    def read(self) -> dict[str, Any]:
        """Read its next line."""
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            self._process.wait()
            raise ended_early(self._engine, self._log.read_text(errors="replace"))
        found: dict[str, Any] = json.loads(line)
        return found

    def steps(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[float]]:
        """Let it answer a batch; return when each step of each reply came, in seconds."""
        assert self._process.stdin is not None
        request = {"prompts": prompts, "new_tokens": new_tokens, "clock": self._clock}
        print(json.dumps(request), file=self._process.stdin, flush=True)
        came = self.read()
        self.peak_bytes = came["peak_bytes"]
        seconds: list[list[float]] = came["seconds"]
        return seconds

    def time(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Run:
        """Let it answer a batch, one token a step; return the mean of the replies."""
        seconds = self.steps(prompts, new_tokens)
        first, last = (fmean(steps[at] for steps in seconds) for at in (0, -1))
        step = 1e3 * (last - first) / (new_tokens - 1)
        return 1e3 * first, *[step] * (new_tokens - 1)

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, *error: Any) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
