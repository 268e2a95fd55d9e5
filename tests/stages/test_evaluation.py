"""Asking questions: the same answers whatever the batch, whole results on disk."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from slimvlm import evaluation, losses
from slimvlm.checkpoint import load
from slimvlm.errors import ConfigError
from slimvlm.evaluation import Result, answer, evaluate, latency, with_other_pictures
from slimvlm.geometry import read_anatomy
from slimvlm.samples import Question, Task
from slimvlm.tasks import find_tasks
from tests import tiny_folder as folders
from tests.tiny_folder import SEEING, picture

WORDS = ("red", "blue", "green")


def questions(count: int, sees: bool = True) -> list[Question]:
    """Prompts of quite different lengths, every fourth with the answer "yes"."""
    return [
        Question(
            id=f"q{index}",
            prompt="Which colour " + "of these " * (index * 5 % 7) + f"is part {index}?",
            answers=("yes" if index % 4 == 0 else WORDS[index % 3],),
            images=(picture(index),) if sees else (),
        )
        for index in range(count)
    ]


def task(name: str = "colours", count: int = 9, sees: bool = True, **changes: Any) -> Task:
    def first(limit: int | None) -> Sequence[Question]:
        return questions(count, sees)[:limit]

    made = Task(name=name, metric="exact_match", chance=25.0, load=first, max_new_tokens=4)
    return replace(made, **changes)


PASSAGES = ("A field of colours.", "It is red. It is blue, and this one is longer.", "yes")
PERPLEXITY = Task(
    name="passages",
    metric="perplexity",
    chance=0.0,
    load=lambda limit: [Question(t[:5], "", (t,)) for t in PASSAGES[:limit]],
    in_average=False,
)


@pytest.fixture(autouse=True, scope="module")
def unhurried() -> Iterator[None]:
    """Measuring times takes longer than the questions; one test does it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "latency", lambda *_: (2.0, 1.0))
        yield


@pytest.fixture(scope="module")
def llava() -> tuple[Any, Any]:
    return load(folders.folder("llava"))


@pytest.fixture(scope="module")
def result(llava: tuple[Any, Any], unhurried: None) -> Result:
    return evaluate(*llava, [task(), PERPLEXITY], name="tiny")


@pytest.mark.parametrize("kind", [*SEEING, "text"])
def test_batches_change_no_reply(kind: str) -> None:
    model, processor = load(folders.folder(kind))
    asked = [task(sees=kind in SEEING)]
    one = evaluate(model, processor, asked, batch_size=1).tasks["colours"]
    eight = evaluate(model, processor, asked, batch_size=8).tasks["colours"]
    assert one.replies == eight.replies
    assert any(one.replies)
    assert one == eight
    assert one == evaluate(model, processor, asked, batch_size=8).tasks["colours"]


def test_replies_stay_with_their_questions(llava: tuple[Any, Any], result: Result) -> None:
    """They are asked longest first, and must come back in the task's order."""
    found = result.tasks["colours"]
    assert found.ids == tuple(f"q{i}" for i in range(9))
    for question, reply in zip(questions(9), found.replies, strict=True):
        assert answer(*llava, [question], 4) == [reply]


def test_scores_follow_from_the_replies(llava: tuple[Any, Any], result: Result) -> None:
    """Ask again with some replies declared right."""
    replies = result.tasks["colours"].replies

    def first(limit: int | None) -> Sequence[Question]:
        asked = questions(9)
        right = {i: replace(q, answers=(replies[i],)) for i, q in enumerate(asked) if i < 3}
        return [right.get(i, q) for i, q in enumerate(asked)]

    found = evaluate(*llava, [task(load=first)]).tasks["colours"]
    assert found.scores == (1, 1, 1, 0, 0, 0, 0, 0, 0)
    assert found.score == pytest.approx(100 / 3)


def test_limit_asks_the_first_questions(llava: tuple[Any, Any], result: Result) -> None:
    few = evaluate(*llava, [task()], limit=3)
    assert few.tasks["colours"].ids == ("q0", "q1", "q2")
    assert few.tasks["colours"].replies == result.tasks["colours"].replies[:3]
    with pytest.raises(ConfigError, match=r"'colours' asked other questions"):
        few.retention(result)


def test_evaluation_leaves_the_model_alone(llava: tuple[Any, Any]) -> None:
    model, processor = llava
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    evaluate(model, processor, [task(count=2)])
    assert model.training
    model.eval()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_result_survives_the_disk(result: Result, tmp_path: Path) -> None:
    result.save(tmp_path / "result.json")
    assert Result.load(tmp_path / "result.json") == result
    assert json.loads((tmp_path / "result.json").read_text())["average"] == result.average
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"average": 1, "tasks": {"a": {}}}', '{"average": 1, "tasks": []}']
)
def test_a_broken_result_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(ConfigError, match=r"result '.*result\.json': cannot be read"):
        Result.load(tmp_path / "result.json")
    with pytest.raises(ConfigError, match=r"missing\.json"):
        Result.load(tmp_path / "missing.json")


def test_a_result_says_what_was_measured(llava: tuple[Any, Any], result: Result) -> None:
    shape = read_anatomy(llava[0])
    assert (result.total_params, result.backbone_params) == (
        shape.total_params,
        shape.backbone_params,
    )
    assert (result.prefill_ms, result.decode_ms) == (2.0, 1.0)
    assert result.average == result.tasks["colours"].score


def test_latency_is_measured(llava: tuple[Any, Any]) -> None:
    prefill_ms, decode_ms = latency(*llava, questions(1)[0], repeats=3, tokens=4)
    assert prefill_ms > 0
    assert decode_ms >= 0


def with_scores(result: Result, scores: Sequence[float]) -> Result:
    changed = replace(
        result.tasks["colours"],
        scores=tuple(scores),
        score=100 * sum(scores) / len(scores),
    )
    return replace(result, tasks={**result.tasks, "colours": changed})


def test_retention_of_a_model_with_itself(result: Result) -> None:
    known = with_scores(result, [1, 0, 1, 1, 0, 0, 1, 1, 0])
    kept = known.retention(known)
    assert (kept.percent, kept.low, kept.high) == pytest.approx((100, 100, 100))
    half = with_scores(result, [1, 0, 0, 1, 0, 0, 0, 0, 0])
    assert half.retention(known).percent == pytest.approx(40)


def test_retention_refuses_other_questions(result: Result) -> None:
    colours = result.tasks["colours"]
    other = replace(result, tasks={"colours": replace(colours, ids=colours.ids[::-1])})
    with pytest.raises(ConfigError, match=r"'colours' asked other questions"):
        result.retention(other)
    with pytest.raises(ConfigError, match="shares no task"):
        result.retention(replace(result, tasks={"shapes": colours}))
    with pytest.raises(ConfigError, match="shares no task"):
        result.retention(replace(result, tasks={"passages": result.tasks["passages"]}))


def test_perplexity_is_exp_of_the_mean_token_loss(llava: tuple[Any, Any], result: Result) -> None:
    model, processor = llava
    total, count = 0.0, 0
    for passage in PASSAGES:
        ids = processor.tokenizer(passage, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            token_losses = losses.token_cross_entropy(model(input_ids=ids).logits, ids)
        total, count = total + float(token_losses.sum()), count + token_losses.numel()
    found = result.tasks["passages"]
    assert found.score == pytest.approx(math.exp(total / count), rel=1e-5)
    assert found.in_average is False
    assert "passages" not in {n for n, t in result.tasks.items() if t.in_average}


def test_yes_no_reports_f1(llava: tuple[Any, Any]) -> None:
    found = evaluate(*llava, [task(metric="yes_no")]).tasks["colours"]
    assert set(found.details) == {"f1", "yes_rate"}


def test_blind_shows_other_pictures(llava: tuple[Any, Any], result: Result) -> None:
    asked = questions(5)
    blind = with_other_pictures(asked)
    assert [q.id for q in blind] == [q.id for q in asked]
    assert all(b.images != q.images for b, q in zip(blind, asked, strict=True))
    found = evaluate(*llava, [task()], blind=True).tasks["colours"]
    assert found.replies != result.tasks["colours"].replies


def test_tasks_are_found_by_name() -> None:
    names = [found.name for found in find_tasks("presence, text_sum,presence")]
    assert names == ["presence", "text_sum"]
    assert len(find_tasks("demo")) > 3
    with pytest.raises(ConfigError, match=r"'presense' is not known.*presence"):
        find_tasks("presence,presense")
    with pytest.raises(ConfigError, match="names no task"):
        find_tasks(" , ")
