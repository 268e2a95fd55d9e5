"""Make questions about scenes, and about words and numbers without one.

Benchmarks (:mod:`slimvlm.demo.tasks`) and training conversations
(:mod:`slimvlm.demo.conversations`) have the same questions.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from slimvlm.demo.scenes import (
    CELLS,
    COLORS,
    TEST_SHARE,
    Scene,
    SceneKind,
    Split,
    load_art,
    make_scene,
)

LETTERS = ("a", "b", "c", "d")
SIDES = ("left", "right", "above", "below")
MAX_SUMMAND = 60
MAX_SORTED = 99


@dataclass(frozen=True)
class Asked:
    """A question with its answer, choices (letters or words) and sub-group of a benchmark."""

    prompt: str
    answer: str
    choices: tuple[str, ...] = ()
    group: str = ""


Asker = Callable[[Scene, np.random.Generator], Asked]


def pick(rng: np.random.Generator, items: Sequence[str]) -> str:
    """Draw one item."""
    return items[int(rng.integers(len(items)))]


def _with_letters(
    question: str, right: str, wrong: Sequence[str], rng: np.random.Generator
) -> Asked:
    options = [right, *wrong]
    options = [options[int(i)] for i in rng.permutation(len(options))]
    listed = " ".join(f"{x}) {option}" for x, option in zip(LETTERS, options, strict=True))
    return Asked(f"{question} {listed}", LETTERS[options.index(right)], LETTERS)


def _sample(rng: np.random.Generator, items: Sequence[str], count: int) -> list[str]:
    return [items[int(i)] for i in rng.permutation(len(items))[:count]]


def ask_name(scene: Scene, rng: np.random.Generator) -> Asked:
    """Ask for the name of a single object."""
    return Asked("what is this?", scene.objects[0].name)


def ask_kind(scene: Scene, rng: np.random.Generator) -> Asked:
    """Ask for the category of a single object, in words."""
    return Asked("what kind of thing is this?", load_art().category_of(scene.objects[0].name))


def ask_category_letter(scene: Scene, rng: np.random.Generator) -> Asked:
    """Ask for the category of a single object, out of four."""
    art = load_art()
    right = art.category_of(scene.objects[0].name)
    others = [c for c in dict.fromkeys(art.categories) if c != right]
    return _with_letters("what kind of thing is this?", right, _sample(rng, others, 3), rng)


def ask_object_letter(scene: Scene, rng: np.random.Generator) -> Asked:
    """Ask for the name of a single object, out of four of its category."""
    art = load_art()
    right = scene.objects[0].name
    others = [n for n in art.members(art.category_of(right)) if n != right]
    return _with_letters("which one is this?", right, _sample(rng, others, 3), rng)


def ask_presence(scene: Scene, rng: np.random.Generator, group: str = "") -> Asked:
    """Ask whether an object is shown.

    ``group`` is ``"positive"``, ``"random"`` (any absent object) or ``"adversarial"`` (an absent
    object of a category that is shown); half of the draws are positive if it is empty.
    """
    art = load_art()
    group = group or pick(rng, ("positive", "positive", "random", "adversarial"))
    shown = scene.names
    if group == "positive":
        name, answer = pick(rng, shown), "yes"
    elif group == "random":
        name, answer = pick(rng, [n for n in art.names if n not in shown]), "no"
    else:
        kinds = {art.category_of(n) for n in shown}
        pairs = zip(art.names, art.categories, strict=True)
        name, answer = pick(rng, [n for n, c in pairs if c in kinds and n not in shown]), "no"
    return Asked(f"is the {name} in the picture?", answer, ("yes", "no"), group)


def ask_locate(scene: Scene, rng: np.random.Generator) -> Asked:
    """Ask for the object in a quadrant."""
    item = scene.objects[int(rng.integers(len(scene.objects)))]
    return Asked(f"what is at the {CELLS[item.cell]}?", item.name)


def ask_position(scene: Scene, rng: np.random.Generator) -> Asked:
    """Ask for the quadrant of an object."""
    item = scene.objects[int(rng.integers(len(scene.objects)))]
    return Asked(f"where is the {item.name}?", CELLS[item.cell])


def neighbours(scene: Scene) -> list[tuple[str, str, str]]:
    """Return (object, reference, side) for every ordered pair in one row or one column."""
    found = []
    for a, b in product(scene.objects, repeat=2):
        (row_a, col_a), (row_b, col_b) = divmod(a.cell, 2), divmod(b.cell, 2)
        if row_a == row_b and col_a != col_b:
            found.append((a.name, b.name, "left" if col_a < col_b else "right"))
        elif col_a == col_b and row_a != row_b:
            found.append((a.name, b.name, "above" if row_a < row_b else "below"))
    return found


def ask_relation(scene: Scene, rng: np.random.Generator) -> Asked:
    """Ask on which side of a neighbour an object is. Needs one pair in `neighbours`."""
    pairs = neighbours(scene)
    name, reference, side = pairs[int(rng.integers(len(pairs)))]
    prompt = f"where is the {name}, seen from the {reference}: left, right, above or below?"
    return Asked(prompt, side, SIDES)


def ask_count(scene: Scene, rng: np.random.Generator, name: str = "") -> Asked:
    """Ask how often an object is shown; the most frequent one unless a name is given."""
    name = name or max(scene.names, key=scene.names.count)
    count = str(scene.names.count(name))
    return Asked(f"how many times is the {name} shown?", count, ("1", "2", "3", "4"))


def ask_digits(scene: Scene, rng: np.random.Generator) -> Asked:
    """Ask for the digits in reading order."""
    return Asked("what number is written here?", "".join(scene.names))


def ask_list(scene: Scene, rng: np.random.Generator) -> Asked:
    """Ask for all objects in reading order, each once."""
    return Asked("list all objects.", ", ".join(dict.fromkeys(scene.names)))


def ask_shape_open(scene: Scene, rng: np.random.Generator) -> Asked:
    """Ask for the colour of a shape or the shape of a colour."""
    color, shape = pick(rng, scene.names).split()
    if rng.integers(2):
        return Asked(f"what color is the {shape}?", color)
    return Asked(f"which shape is {color}?", shape)


def ask_shape_yesno(scene: Scene, rng: np.random.Generator) -> Asked:
    """Ask whether a shape has a colour; half of the answers are yes."""
    color, shape = pick(rng, scene.names).split()
    if rng.integers(2):
        return Asked(f"is the {shape} {color}?", "yes", ("yes", "no"))
    wrong = pick(rng, [c for c in COLORS if c != color])
    return Asked(f"is the {shape} {wrong}?", "no", ("yes", "no"))


def ask_shape(scene: Scene, rng: np.random.Generator) -> Asked:
    """Ask one of the two questions about shapes."""
    ask = ask_shape_open if rng.integers(2) else ask_shape_yesno
    return ask(scene, rng)


def ask_odd(rng: np.random.Generator) -> Asked:
    """Ask which of four words is not of a category."""
    art = load_art()
    category = pick(rng, art.categories)
    others = [n for n, c in zip(art.names, art.categories, strict=True) if c != category]
    wrong = _sample(rng, art.members(category), 3)
    return _with_letters(f"which is not a {category}?", pick(rng, others), wrong, rng)


def ask_sort(rng: np.random.Generator) -> Asked:
    """Ask for three or four numbers in ascending order."""
    numbers = rng.choice(MAX_SORTED, size=int(rng.integers(3, 5)), replace=False) + 1
    given = " ".join(str(n) for n in numbers)
    return Asked(f"sort these numbers: {given}", " ".join(str(n) for n in sorted(numbers)))


def ask_sum(rng: np.random.Generator) -> Asked:
    """Ask for the sum of two numbers from 1 to 60."""
    a, b = (int(v) for v in rng.integers(1, MAX_SUMMAND + 1, size=2))
    return Asked(f"what is {a} + {b}?", str(a + b))


def ask_told(kind: SceneKind, ask: Asker, rng: np.random.Generator) -> Asked:
    """Ask, without a picture, about a scene that is described in words (for training)."""
    scene = make_scene(kind, rng, "train")
    while ask is ask_relation and not neighbours(scene):
        scene = make_scene(kind, rng, "train")
    asked = ask(scene, rng)
    listed = ", ".join(f"{CELLS[o.cell]}: {o.name}" for o in scene.objects) + "."
    described = f"this is a {scene.names[0]}." if kind == "single" else listed
    return Asked(f"{described} {asked.prompt}", asked.answer, asked.choices)


TEXT_ASKERS = {"text_odd": ask_odd, "text_sort": ask_sort, "text_sum": ask_sum}
"""The text-only benchmarks."""
TOLD_ASKERS: tuple[tuple[SceneKind, Asker], ...] = (
    ("single", ask_object_letter),
    ("single", ask_category_letter),
    ("multi", ask_relation),
    ("count", ask_count),
    ("shapes", ask_shape),
)
"""Questions about scenes in words; they teach letters and sides sooner."""


def ask_text(task: str, rng: np.random.Generator, split: Split) -> Asked:
    """Draw text-only questions until one belongs to a split, by the checksum of its text."""
    while True:
        asked = TEXT_ASKERS[task](rng)
        is_test = zlib.crc32(asked.prompt.encode()) % TEST_SHARE == 0
        if is_test == (split == "test"):
            return asked
