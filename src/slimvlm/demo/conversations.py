"""Make training conversations: pictures with all their questions, and a share of text alone.

``--data demo`` gives them for calibration and recovery, and the demo model was trained on them.
They share no composition, digit picture or text question with the benchmarks in
:mod:`slimvlm.demo.tasks`.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np

from slimvlm.data.samples import Message, Sample
from slimvlm.demo import questions as q
from slimvlm.demo.scenes import SCENE_KINDS, Scene, SceneKind, make_scene, render

KIND_SHARES = (0.20, 0.32, 0.14, 0.16, 0.18)
"""Share of the pictures of each of `SCENE_KINDS`."""
TEXT_SHARE = 0.16
"""Share of conversations without a picture."""
PASSAGE_SHARE = 0.35
"""Share of those that are passages of English."""
PASSAGE_CHARS = 420
PASSAGE_MODULES = (
    "argparse", "asyncio/events", "asyncio/streams", "asyncio/tasks", "bdb", "calendar", "cmd",
    "codecs", "collections/__init__", "configparser", "contextlib", "copy", "csv", "datetime",
    "difflib", "doctest", "email/message", "enum", "fractions", "ftplib", "functools", "gettext",
    "glob", "gzip", "heapq", "http/client", "http/cookiejar", "imaplib", "inspect", "ipaddress",
    "logging/__init__", "logging/handlers", "mailbox", "mimetypes", "multiprocessing/pool",
    "optparse", "os", "pathlib", "pickle", "pickletools", "pprint", "queue", "random", "sched",
    "selectors", "shutil", "smtplib", "socket", "socketserver", "ssl", "statistics", "string",
    "subprocess", "tarfile", "tempfile", "textwrap", "threading", "timeit", "tokenize", "trace",
    "traceback", "turtle", "types", "typing", "unittest/case", "unittest/mock", "urllib/parse",
    "urllib/request", "uuid", "warnings", "weakref", "xml/dom/minidom", "zipfile",
)  # fmt: skip


@dataclass(frozen=True)
class Conversation:
    """Independent (prompt, answer) pairs about one scene, or about none."""

    scene: Scene | None
    turns: tuple[tuple[str, str], ...]


def _ask_absent(scene: Scene, rng: np.random.Generator) -> q.Asked:
    return q.ask_presence(scene, rng, q.pick(rng, ("random", "adversarial")))


def _ask_relation_if_any(scene: Scene, rng: np.random.Generator) -> q.Asked | None:
    return q.ask_relation(scene, rng) if q.neighbours(scene) else None


def _ask_other_count_at_times(scene: Scene, rng: np.random.Generator) -> q.Asked | None:
    return q.ask_count(scene, rng, q.pick(rng, scene.names)) if rng.integers(3) == 0 else None


TURNS: dict[SceneKind, tuple[Callable[[Scene, np.random.Generator], q.Asked | None], ...]] = {
    "single": (
        q.ask_name,
        q.ask_kind,
        *(q.ask_category_letter,) * 2,
        *(q.ask_object_letter,) * 2,
        q.ask_presence,
    ),
    "multi": (
        *(q.ask_locate,) * 2,
        q.ask_position,
        q.ask_list,
        partial(q.ask_presence, group="positive"),
        _ask_absent,
        *(_ask_relation_if_any,) * 2,
    ),
    "count": (q.ask_count, q.ask_locate, q.ask_list, _ask_other_count_at_times, q.ask_presence),
    "digits": (q.ask_digits, q.ask_locate),
    "shapes": (
        *(q.ask_shape_open,) * 3,
        *(q.ask_shape_yesno,) * 3,
        q.ask_locate,
        q.ask_list,
    ),
}
"""The questions about a picture of each kind; those that do not apply are left out."""


def docstrings(path: Path, module: str) -> Iterator[tuple[str, str]]:
    """Yield the longer docstrings of a file with the names of what they document."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = inspect.cleandoc(ast.get_docstring(node) or "")
            if len(text) > 150:
                name = "" if isinstance(node, ast.Module) else f".{node.name}"
                yield f"{module}{name}", text


@cache
def load_passages() -> tuple[tuple[str, str], ...]:
    """Return (prompt, passage) pairs of English: docstrings of Python's own standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found: list[tuple[str, str]] = []
    for module in PASSAGE_MODULES:
        path = root / f"{module}.py"
        if not path.is_file():
            continue
        for name, text in docstrings(path, module.replace("/__init__", "").replace("/", ".")):
            if len(text) > PASSAGE_CHARS:
                text = text[:PASSAGE_CHARS].rsplit(None, 1)[0]
            found.append((f"what does python say about {name}?", text))
    return tuple(found)


def make_conversation(seed: int, index: int) -> Conversation:
    """Return the training conversation with this number; it depends on nothing else."""
    rng = np.random.default_rng([seed, 7, index])
    scene = None
    if rng.random() < TEXT_SHARE:
        passages = load_passages()
        if passages and rng.random() < PASSAGE_SHARE:
            return Conversation(None, (passages[int(rng.integers(len(passages)))],))
        asked = [q.ask_text(task, rng, "train") for task in q.TEXT_ASKERS]
        asked += [q.ask_told(kind, ask, rng) for kind, ask in q.TOLD_ASKERS]
        turns = [(a.prompt, a.answer) for a in asked]
    else:
        kind = SCENE_KINDS[int(rng.choice(len(SCENE_KINDS), p=KIND_SHARES))]
        scene = make_scene(kind, rng)
        seen = [ask(scene, rng) for ask in TURNS[kind]]
        turns = list(dict.fromkeys((a.prompt, a.answer) for a in seen if a is not None))
    return Conversation(scene, tuple(turns[int(i)] for i in rng.permutation(len(turns))))


def demo_samples(count: int, seed: int = 0, pictures: bool = True) -> list[Sample]:
    """Return distinct training conversations; without ``pictures``, only those of text."""
    samples = []
    numbered = ((index, make_conversation(seed, index)) for index in itertools.count())
    chosen = ((i, each) for i, each in numbered if pictures or each.scene is None)
    for index, conversation in itertools.islice(chosen, count):
        scene = conversation.scene
        messages: list[Message] = []
        for prompt, answer in conversation.turns:
            shown = [{"type": "image"}] if scene is not None and not messages else []
            messages += [
                {"role": "user", "content": [*shown, {"type": "text", "text": prompt}]},
                {"role": "assistant", "content": [{"type": "text", "text": answer}]},
            ]
        images = () if scene is None else (render(scene),)
        samples.append(Sample(f"demo-{seed}-{index}", tuple(messages), images))
    return samples
