"""Make the demo's questions: its benchmarks, and conversations to calibrate and to train on.

Benchmarks are small versions of the published ones, all generated, always in the same order.
``--data demo`` gives the conversations, on which the demo model was trained. The two share no
composition, digit image or text question.
"""

import ast
import inspect
import itertools
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.random import Generator

from slimvlm.data.chat import answered_sample
from slimvlm.data.samples import Message, Question, Sample, Task
from slimvlm.demo import scenes
from slimvlm.demo.scenes import CELLS, COLORS, Scene, SceneKind, Split, load_art, make_scene, pick

NUM_QUESTIONS = 320
_LETTERS = ("a", "b", "c", "d")
_TEST_SEED = 20240
_TEST_PASSAGE_CHARS = 600
_KIND_SHARES = (0.20, 0.32, 0.14, 0.16, 0.18)  # of the training images, of each of `SCENE_KINDS`
_TEXT_SHARE = 0.16  # share of conversations without an image
_PASSAGE_SHARE = 0.35  # share of those that are passages of English
_PASSAGE_CHARS = 420


class _Asked(NamedTuple):
    """A question with its answer, choices (letters or words) and sub-group of a benchmark."""

    prompt: str
    answer: str
    choices: tuple[str, ...] = ()
    group: str = ""


def _with_letters(question: str, right: str, wrong: Sequence[str], rng: Generator) -> _Asked:
    options = rng.permutation([right, *wrong]).tolist()
    listed = " ".join(f"{x}) {option}" for x, option in zip(_LETTERS, options, strict=True))
    return _Asked(f"{question} {listed}", _LETTERS[options.index(right)], _LETTERS)


def neighbours(scene: Scene) -> list[tuple[str, str, str]]:
    """Return (object, reference, side) for every ordered pair in one row or one column."""
    found = []
    for a, b in itertools.product(scene.objects, repeat=2):
        (row_a, col_a), (row_b, col_b) = divmod(a.cell, 2), divmod(b.cell, 2)
        if row_a == row_b and col_a != col_b:
            found.append((a.name, b.name, "left" if col_a < col_b else "right"))
        elif col_a == col_b and row_a != row_b:
            found.append((a.name, b.name, "above" if row_a < row_b else "below"))
    return found


def _ask(what: str, scene: Scene, rng: Generator, detail: str = "") -> _Asked:
    """Ask a question of this kind about a scene.

    ``detail`` is the group of "presence" (by default half of the draws are positive, with "absent"
    none), or the object of "count" (by default the most frequent one).
    """
    kind_of, objects, names = load_art().categories, scene.objects, scene.names
    match what:
        case "name":
            return _Asked("what is this?", names[0])
        case "category":
            return _Asked("what kind of thing is this?", kind_of[names[0]])
        case "category_letter":
            right = kind_of[names[0]]
            wrong = [c for c in dict.fromkeys(kind_of.values()) if c != right]
            wrong = rng.permutation(wrong)[:3].tolist()
            return _with_letters("what kind of thing is this?", right, wrong, rng)
        case "object_letter":
            right = names[0]
            others = [n for n, c in kind_of.items() if c == kind_of[right] and n != right]
            wrong = rng.permutation(others)[:3].tolist()
            return _with_letters("which one is this?", right, wrong, rng)
        case "presence":
            groups = ("positive", "positive", "random", "adversarial")
            if detail in ("", "absent"):
                detail = pick(rng, groups[2:] if detail else groups)
            kinds = {kind_of[n] for n in names}  # adversarial: absent, of a category shown
            wanted = [n for n, c in kind_of.items() if detail == "random" or c in kinds]
            absent = [n for n in wanted if n not in names]
            name = pick(rng, names if detail == "positive" else absent)
            answer = "yes" if detail == "positive" else "no"
            return _Asked(f"is the {name} in the picture?", answer, ("yes", "no"), detail)
        case "locate":
            item = pick(rng, objects)
            return _Asked(f"what is at the {CELLS[item.cell]}?", item.name)
        case "position":
            item = pick(rng, objects)
            return _Asked(f"where is the {item.name}?", CELLS[item.cell])
        case "relation":
            name, reference, side = pick(rng, neighbours(scene))
            prompt = f"where is the {name}, seen from the {reference}: left, right, above or below?"
            return _Asked(prompt, side, ("left", "right", "above", "below"))
        case "count":
            name = detail or max(names, key=names.count)
            prompt, count = f"how many times is the {name} shown?", str(names.count(name))
            return _Asked(prompt, count, ("1", "2", "3", "4"))
        case "digits":
            return _Asked("what number is written here?", "".join(names))
        case "list":
            return _Asked("list all objects.", ", ".join(dict.fromkeys(names)))
    return _ask_shape(what, names, rng)


def _ask_shape(what: str, names: Sequence[str], rng: Generator) -> _Asked:
    if what == "shape":
        what = "shape_open" if rng.integers(2) else "shape_yesno"
    (color, shape), is_first = pick(rng, names).split(), rng.integers(2)
    if what == "shape_open":
        first, second = (f"what color is the {shape}?", color), (f"which shape is {color}?", shape)
        return _Asked(*(first if is_first else second))
    said = color if is_first else pick(rng, [c for c in COLORS if c != color])
    return _Asked(f"is the {shape} {said}?", "yes" if is_first else "no", ("yes", "no"))


_TEXT_TASKS = ("text_odd", "text_sort", "text_sum")
_IN_WORDS: tuple[tuple[SceneKind, str], ...] = (
    *(("single", "object_letter"), ("single", "category_letter")),
    *(("multi", "relation"), ("count", "count"), ("shapes", "shape")),
)
"""Questions about scenes that are described in words; they teach letters and sides sooner."""


def _ask_text(task: str, rng: Generator, split: Split) -> _Asked:
    """Draw text-only questions until one belongs to a split, by the checksum of its text."""
    kind_of = load_art().categories
    while True:
        if task == "text_odd":
            kind = pick(rng, list(kind_of.values()))
            others = [name for name, each in kind_of.items() if each != kind]
            wrong = rng.permutation([n for n, each in kind_of.items() if each == kind])[:3].tolist()
            asked = _with_letters(f"which is not a {kind}?", pick(rng, others), wrong, rng)
        elif task == "text_sort":
            numbers = rng.choice(99, size=int(rng.integers(3, 5)), replace=False) + 1
            given, ordered = (" ".join(map(str, each)) for each in (numbers, sorted(numbers)))
            asked = _Asked(f"sort these numbers: {given}", ordered)
        else:
            a, b = (int(v) for v in rng.integers(1, 61, size=2))
            asked = _Asked(f"what is {a} + {b}?", str(a + b))
        if (zlib.crc32(asked.prompt.encode()) % scenes.TEST_SHARE == 0) == (split == "test"):
            return asked


_ROWS: dict[str, dict[str, Any]] = {row["name"]: row for row in scenes.DATA["tasks"]}


def _item(task: str, index: int) -> tuple[Scene | None, _Asked]:
    """Make the question with this number of a benchmark, and its scene if it shows one."""
    row, lone = _ROWS[task], None
    rng = np.random.default_rng([_TEST_SEED, *task.encode(), index])
    if "ask" not in row:
        return None, _ask_text(task, rng, "test")
    styles = (scenes.UNSEEN_STYLE,) if row.get("unseen") else scenes.SEEN_STYLES
    if row["kind"] == "single":
        names = load_art().names
        order = np.random.default_rng([_TEST_SEED, index // len(names)]).permutation(len(names))
        lone = [names[int(order[index % len(names)])]]
    scene = make_scene(row["kind"], rng, "test", styles, lone)
    while task == "relation" and not neighbours(scene):
        scene = make_scene(row["kind"], rng, "test", styles)
    group = ""
    if task == "presence":
        block, place = divmod(index, 32)
        shuffled = int(np.random.default_rng([_TEST_SEED, 1, block]).permutation(32)[place])
        group = ("positive", "random", "positive", "adversarial")[shuffled % 4]
    return scene, _ask(row["ask"], scene, rng, group)


def _load(task: str, limit: int | None) -> Sequence[Question]:
    """Make the first questions of a benchmark; no text question twice."""
    if _ROWS[task]["metric"] == "perplexity":
        return _load_passages(limit)
    found, index = dict[object, Question](), 0
    while len(found) < len(range(NUM_QUESTIONS)[:limit]):
        scene, a = _item(task, index)
        shown = () if scene is None else (scenes.render(scene),)
        made = Question(f"{task}-{len(found)}", a.prompt, (a.answer,), shown, a.choices, a.group)
        found.setdefault(a.prompt if scene is None else index, made)
        index += 1
    return list(found.values())


def _load_passages(limit: int | None) -> Sequence[Question]:
    from pydoc_data.topics import topics  # 600 kB, and only this benchmark needs it

    passages: list[str] = []
    for name in sorted(topics):
        text = " ".join(topics[name].split("\n", 3)[-1].split())
        starts = range(0, len(text) - _TEST_PASSAGE_CHARS, _TEST_PASSAGE_CHARS)
        passages += [text[start : start + _TEST_PASSAGE_CHARS] for start in starts]
    step = max(1, len(passages) // NUM_QUESTIONS)
    chosen = passages[::step][:NUM_QUESTIONS][:limit]
    return [Question(f"text_ppl-{i}", "", (text,)) for i, text in enumerate(chosen)]


def make_task_scene(task: Task, index: int) -> Scene | None:
    """Return the scene of a question, or None for text-only benchmarks."""
    return _item(task.name, index)[0]


_OF_PICTURES = ("ask", "kind", "unseen")
TASKS = {
    name: Task(load=partial(_load, name), **{k: row[k] for k in row if k not in _OF_PICTURES})
    for name, row in _ROWS.items()
}
"""Every benchmark by name. Those in an unseen art style and perplexity are not in the average."""


class Conversation(NamedTuple):
    """Independent (prompt, answer) pairs about one scene, or about none."""

    scene: Scene | None
    turns: tuple[tuple[str, str], ...]


_TURNS: dict[SceneKind, str] = {
    "single": "name category category_letter category_letter object_letter object_letter presence",
    "multi": "locate locate position list presence:positive presence:absent relation relation",
    "count": "count locate list count:any presence",
    "digits": "digits locate",
    "shapes": "shape_open shape_open shape_open shape_yesno shape_yesno shape_yesno locate list",
}
"""The questions of `_ask` about an image of each kind, with their details."""


def docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the longer docstrings of a file with the names of what they document, if it has one."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = inspect.cleandoc(ast.get_docstring(node) or "")
            if len(text) > 150:
                yield "" if isinstance(node, ast.Module) else f".{node.name}", text


@cache
def load_passages() -> tuple[tuple[str, str], ...]:
    """Return (prompt, passage) pairs of English: longer docstrings of Python's own library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found: list[tuple[str, str]] = []
    for module in scenes.DATA["passages"]:
        path = root / f"{module}.py"
        if not path.is_file():
            continue
        about = module.replace("/__init__", "").replace("/", ".")
        for name, text in docstrings(path):
            if len(text) > _PASSAGE_CHARS:
                text = text[:_PASSAGE_CHARS].rsplit(None, 1)[0]
            found.append((f"what does python say about {about}{name}?", text))
    return tuple(found)


def make_conversation(seed: int, index: int) -> Conversation:
    """Return the training conversation with this number; it depends on nothing else."""
    rng = np.random.default_rng([seed, 7, index])
    scene = None
    if rng.random() < _TEXT_SHARE:
        passages = load_passages()
        if passages and rng.random() < _PASSAGE_SHARE:
            return Conversation(None, (pick(rng, passages),))
        asked = [_ask_text(task, rng, "train") for task in _TEXT_TASKS]
        turns = [(a.prompt, a.answer) for a in asked]
        for kind, what in _IN_WORDS:
            told = make_scene(kind, rng, "train")
            while what == "relation" and not neighbours(told):
                told = make_scene(kind, rng, "train")
            about = _ask(what, told, rng)
            listed = ", ".join(f"{CELLS[o.cell]}: {o.name}" for o in told.objects) + "."
            described = f"this is a {told.names[0]}." if kind == "single" else listed
            turns.append((f"{described} {about.prompt}", about.answer))
    else:
        kind = scenes.SCENE_KINDS[int(rng.choice(len(scenes.SCENE_KINDS), p=_KIND_SHARES))]
        scene = make_scene(kind, rng)
        found: dict[tuple[str, str], None] = {}  # each once, in order
        for what, _, detail in (each.partition(":") for each in _TURNS[kind].split()):
            if what == "relation" and not neighbours(scene):
                continue
            if detail == "any":
                if rng.integers(3):
                    continue
                detail = pick(rng, scene.names)
            about = _ask(what, scene, rng, detail)
            found[about.prompt, about.answer] = None
        turns = list(found)
    return Conversation(scene, tuple(turns[int(i)] for i in rng.permutation(len(turns))))


def demo_samples(count: int, seed: int = 0, pictures: bool = True) -> list[Sample]:
    """Return distinct training conversations; without ``pictures``, only those of text."""
    samples = []
    numbered = ((index, make_conversation(seed, index)) for index in itertools.count())
    chosen = ((i, each) for i, each in numbered if pictures or each.scene is None)
    for index, conversation in itertools.islice(chosen, count):
        images = () if conversation.scene is None else (scenes.render(conversation.scene),)
        messages = list[Message]()
        for prompt, answer in conversation.turns:  # the first one shows the image
            asked = Question("", prompt, (answer,), () if messages else images)
            messages += answered_sample(asked, answer).messages
        samples.append(Sample(f"demo-{seed}-{index}", tuple(messages), images))
    return samples
