"""The demo's benchmarks: small versions of the published ones, all generated and held out.

Questions come from the test split (compositions, handwritten digits and text questions), always in
the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from slimvlm.data.samples import Question, Task
from slimvlm.demo import questions as q
from slimvlm.demo.scenes import (
    SEEN_STYLES,
    UNSEEN_STYLE,
    Scene,
    SceneKind,
    load_art,
    make_scene,
    render,
)

NUM_QUESTIONS = 320
_TEST_SEED = 20240
_PASSAGE_CHARS = 600


def _rng(task: str, index: int) -> np.random.Generator:
    return np.random.default_rng([_TEST_SEED, *task.encode(), index])


def _to_question(task: str, index: int, asked: q.Asked, scene: Scene | None) -> Question:
    images = () if scene is None else (render(scene),)
    answers = (asked.answer,)
    return Question(f"{task}-{index}", asked.prompt, answers, images, asked.choices, asked.group)


def make_item(
    task: str, kind: SceneKind, ask: q.Asker, styles: Sequence[str], index: int
) -> tuple[Scene, q.Asked]:
    """Return the scene and the question with this number of a picture benchmark."""
    rng = _rng(task, index)
    if kind == "single":
        names = load_art().names
        order = np.random.default_rng([_TEST_SEED, index // len(names)]).permutation(len(names))
        lone = [names[int(order[index % len(names)])]]
        scene = make_scene(kind, rng, "test", styles, lone)
    else:
        scene = make_scene(kind, rng, "test", styles)
    while task == "relation" and not q.neighbours(scene):
        scene = make_scene(kind, rng, "test", styles)
    if task == "presence":
        block, place = divmod(index, 32)
        shuffled = int(np.random.default_rng([_TEST_SEED, 1, block]).permutation(32)[place])
        group = ("positive", "random", "positive", "adversarial")[shuffled % 4]
        return scene, q.ask_presence(scene, rng, group)
    return scene, ask(scene, rng)


def _load_scenes(
    task: str, kind: SceneKind, ask: q.Asker, styles: Sequence[str], limit: int | None
) -> Sequence[Question]:
    count = NUM_QUESTIONS if limit is None else min(limit, NUM_QUESTIONS)
    items = (make_item(task, kind, ask, styles, i) for i in range(count))
    return [_to_question(task, i, asked, scene) for i, (scene, asked) in enumerate(items)]


def _load_text(task: str, limit: int | None) -> Sequence[Question]:
    count = NUM_QUESTIONS if limit is None else min(limit, NUM_QUESTIONS)
    found: dict[str, q.Asked] = {}
    index = 0
    while len(found) < count:
        asked = q.ask_text(task, _rng(task, index), "test")
        found.setdefault(asked.prompt, asked)
        index += 1
    return [_to_question(task, i, asked, None) for i, asked in enumerate(found.values())]


def _load_passages(limit: int | None) -> Sequence[Question]:
    from pydoc_data.topics import topics  # 600 kB, and only this benchmark needs it

    passages: list[str] = []
    for name in sorted(topics):
        text = " ".join(topics[name].split("\n", 3)[-1].split())
        starts = range(0, len(text) - _PASSAGE_CHARS, _PASSAGE_CHARS)
        passages += [text[start : start + _PASSAGE_CHARS] for start in starts]
    step = max(1, len(passages) // NUM_QUESTIONS)
    chosen = passages[::step][:NUM_QUESTIONS][:limit]
    return [Question(f"text_ppl-{i}", "", (text,)) for i, text in enumerate(chosen)]


def make_task_scene(task: Task, index: int) -> Scene | None:
    """Return the scene of a question, or None for text-only benchmarks."""
    if not isinstance(task.load, partial) or task.load.func is not _load_scenes:
        return None
    name, kind, ask, styles = task.load.args
    return make_item(name, kind, ask, styles, index)[0]


def _picture_task(
    name: str,
    kind: SceneKind,
    ask: q.Asker,
    metric: str,
    chance: float,
    like: str,
    max_new_tokens: int = 8,
    styles: Sequence[str] = SEEN_STYLES,
) -> Task:
    load = partial(_load_scenes, name, kind, ask, styles)
    in_average = tuple(styles) == SEEN_STYLES
    return Task(name, metric, chance, load, max_new_tokens, like, in_average)


def _text_task(name: str, metric: str, chance: float, max_new_tokens: int) -> Task:
    return Task(name, metric, chance, partial(_load_text, name), max_new_tokens, "text only")


_UNSEEN = (UNSEEN_STYLE,)
_ALL = (
    _picture_task("name", "single", q.ask_name, "exact_match", 0.8, "recognition"),
    _picture_task("category_letter", "single", q.ask_category_letter, "letter", 25.0, "MMMU, AI2D"),
    _picture_task("object_letter", "single", q.ask_object_letter, "letter", 25.0, "ScienceQA"),
    _picture_task("presence", "multi", q.ask_presence, "yes_no", 50.0, "POPE"),
    _picture_task("locate", "multi", q.ask_locate, "exact_match", 0.8, "GQA"),
    _picture_task("relation", "multi", q.ask_relation, "exact_match", 25.0, "GQA"),
    _picture_task("count", "count", q.ask_count, "exact_match", 25.0, "MME (count)"),
    _picture_task("read_digits", "digits", q.ask_digits, "exact_match", 0.5, "DocVQA, OCR"),
    _picture_task("list_objects", "multi", q.ask_list, "set_f1", 0.8, "captioning", 24),
    _picture_task("shape_open", "shapes", q.ask_shape_open, "exact_match", 20.0, "VQA"),
    _picture_task("shape_yesno", "shapes", q.ask_shape_yesno, "yes_no", 50.0, "GQA"),
    _text_task("text_odd", "letter", 25.0, 4),
    _text_task("text_sort", "exact_match", 10.0, 16),
    _text_task("text_sum", "exact_match", 1.0, 6),
    _picture_task(
        "name_unseen_style", "single", q.ask_name, "exact_match", 0.8, "domain shift",
        styles=_UNSEEN,
    ),
    _picture_task(
        "object_letter_unseen_style", "single", q.ask_object_letter, "letter", 25.0, "domain shift",
        styles=_UNSEEN,
    ),
    Task("text_ppl", "perplexity", 0.0, _load_passages, 0, "WikiText", in_average=False),
)  # fmt: skip

TASKS: dict[str, Task] = {task.name: task for task in _ALL}
"""Every benchmark by name. Those in an unseen art style and perplexity stay out of the average."""
