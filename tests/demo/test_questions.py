"""The demo's benchmarks and conversations: size, order, truth, balance, separation."""

from collections import Counter

import pytest

from slimvlm.demo.questions import (
    TASKS,
    demo_samples,
    make_conversation,
    make_task_scene,
    neighbours,
)
from slimvlm.demo.scenes import load_art
from slimvlm.evaluation.metrics import majority_score
from tests.tiers import tiered

PICTURE_TASKS = [name for name, task in TASKS.items() if make_task_scene(task, 0) is not None]
TEXT_TASKS = ["text_odd", "text_sort", "text_sum"]


@pytest.mark.parametrize(
    "name", tiered(TASKS, lambda name: name in ("presence", "text_sum", "text_ppl"))
)
def test_a_task_is_large_in_fixed_order_and_its_majority_answer_near_chance(name):
    task, questions = TASKS[name], TASKS[name].load(None)
    assert len(questions) >= 300
    assert len({q.id for q in questions}) == len(questions)
    again = task.load(5)
    assert [(q.id, q.prompt, q.answers) for q in again] == [
        (q.id, q.prompt, q.answers) for q in questions[:5]
    ]
    pictures = [q.images[0].tobytes() for q in again if q.images]
    assert pictures == [q.images[0].tobytes() for q in questions[:5] if q.images]
    if task.metric != "perplexity":
        assert majority_score(task.metric, questions) < task.chance + 9
    if task.metric in ("letter", "yes_no"):
        assert {q.answers[0] for q in questions} == set(questions[0].choices)


def test_presence_is_balanced_and_text_answers_are_right():
    groups = Counter(q.group for q in TASKS["presence"].load(None))
    answers = Counter(q.answers[0] for q in TASKS["presence"].load(None))
    assert groups == {"positive": 160, "random": 80, "adversarial": 80}
    assert answers == {"yes": 160, "no": 160}
    for q in TASKS["text_sum"].load(40):
        a, b = _word(q.prompt, "what is ", "?").split(" + ")
        assert int(q.answers[0]) == int(a) + int(b)
    for q in TASKS["text_sort"].load(40):
        numbers = sorted(int(n) for n in q.prompt.split(": ")[1].split())
        assert q.answers[0] == " ".join(map(str, numbers))


def _word(prompt, start, end):
    return prompt.split(start)[1].split(end)[0]


@pytest.mark.parametrize(
    "name", ["presence", "count", "relation", "list_objects", "read_digits", "name"]
)
def test_answers_agree_with_the_scene(name):
    art = load_art()
    for i, q in enumerate(TASKS[name].load(40)):
        scene, answer = make_task_scene(TASKS[name], i), q.answers[0]
        assert scene is not None
        if name == "presence":
            asked = _word(q.prompt, "is the ", " in the picture")
            assert (asked in scene.names) == (answer == "yes")
            if q.group == "adversarial":
                assert art.categories[asked] in {art.categories[n] for n in scene.names}
        elif name == "count":
            assert scene.names.count(_word(q.prompt, "times is the ", " shown")) == int(answer)
        elif name == "relation":
            told = (
                _word(q.prompt, "where is the ", ","),
                _word(q.prompt, "seen from the ", ":"),
                answer,
            )
            assert told in neighbours(scene)
        elif name == "list_objects":
            assert answer.split(", ") == list(dict.fromkeys(scene.names))
        elif name == "read_digits":
            assert answer == "".join(scene.names)
        else:
            assert answer == scene.names[0]


@pytest.mark.slow
def test_training_shares_no_scene_and_no_text_question_with_benchmarks():
    conversations = [make_conversation(0, i) for i in range(1500)]
    scenes = {c.scene.key for c in conversations if c.scene is not None}
    asked = {p for c in conversations if c.scene is None for p, _ in c.turns}
    for name in PICTURE_TASKS:
        for i in range(60):
            scene = make_task_scene(TASKS[name], i)
            assert scene is not None
            assert scene.key not in scenes
    for name in TEXT_TASKS:
        assert not asked & {q.prompt for q in TASKS[name].load(None)}


def test_samples_are_chats_over_one_picture_and_some_text():
    samples = demo_samples(60)
    assert len({s.id for s in samples}) == 60
    assert [s.messages for s in demo_samples(3)] == [s.messages for s in samples[:3]]
    assert demo_samples(3, seed=1)[0].messages != samples[0].messages
    for sample in samples:
        entries = [e for m in sample.messages for e in m["content"]]
        assert sum(e["type"] == "image" for e in entries) == len(sample.images) <= 1
        assert [m["role"] for m in sample.messages[:2]] == ["user", "assistant"]
        assert sample.messages[-1]["role"] == "assistant"
        if sample.images:
            assert sample.messages[0]["content"][0] == {"type": "image"}
    assert 2 <= sum(not s.images for s in samples) <= 20
