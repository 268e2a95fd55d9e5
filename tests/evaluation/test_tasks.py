"""Tasks of the user's own: a YAML row over a local data file."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from PIL import Image

from slimvlm.core.errors import ConfigError, DataError
from slimvlm.data.chat import answered_sample
from slimvlm.data.samples import Question
from slimvlm.evaluation import metrics
from slimvlm.evaluation.ask import evaluate
from slimvlm.evaluation.metrics import metric_named
from slimvlm.evaluation.on_data import evaluate_data
from slimvlm.evaluation.tasks import find_tasks, read_task
from slimvlm.models.load import load
from tests import tiny_folder as folders

YAML = """
name: colours
data: rows.jsonl
images: pictures
prompt: "What colour? {hint}"
answer: colour
metric: exact_match
chance: 25
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    for name in ("red", "blue"):
        Image.new("RGB", (8, 8), name).save(tmp_path / "pictures" / f"{name}.png")
    rows = [
        {"id": "a", "hint": "one word", "colour": "red", "image": "red.png"},
        {"id": "b", "hint": "please", "colour": ["blue", "navy"], "image": "blue.png"},
        {"id": "c", "hint": "no picture", "colour": "none"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task.yaml").write_text(YAML)
    return tmp_path


def test_rows_become_questions(folder: Path) -> None:
    task = read_task(folder / "task.yaml")
    questions = task.load(None)
    assert [q.id for q in questions] == ["a", "b", "c"]
    assert questions[0].prompt == "What colour? one word"
    assert questions[1].answers == ("blue", "navy")
    assert [len(q.images) for q in questions] == [1, 1, 0]
    assert task.chance == 25


def test_limit_takes_the_first(folder: Path) -> None:
    assert [q.id for q in read_task(folder / "task.yaml").load(2)] == ["a", "b"]


def test_a_file_stands_among_names(folder: Path) -> None:
    found = find_tasks(f"name,{folder / 'task.yaml'}")
    assert [task.name for task in found] == ["name", "colours"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("metric: exact_match|metric: magic", "metric 'magic' must be one of"),
        ("chance: 25|chanse: 25", "chanse"),
        ('prompt: "What colour? {hint}"|', "prompt"),
        ("chance: 25|by_likelihood: true", "by_likelihood needs choices"),
        ("name: colours|name: [", "cannot be read"),
    ],
)
def test_a_wrong_field_is_named(folder: Path, change: str, message: str) -> None:
    old, new = change.split("|")
    path = folder / "task.yaml"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ConfigError, match=message):
        read_task(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{hint}|{hunt}", "no column 'hunt'"),
        ("answer: colour|answer: color", "no column 'color'"),
        ("images: pictures|images: .", "not found"),
    ],
)
def test_a_wrong_column_or_picture_is_named(folder: Path, change: str, message: str) -> None:
    old, new = change.split("|")
    path = folder / "task.yaml"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(DataError, match=message):
        read_task(path).load(None)


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(ConfigError, match="Choose from: demo, name"):
        find_tasks("nope")


def test_repeated_ids_are_refused(folder: Path) -> None:
    """They would share one answer. Rows without an id are numbered."""
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]

    def asked(*ids: object) -> list[str]:
        named = [{**row, "id": name} for row, name in zip(rows, ids, strict=True)]
        kept = [{k: v for k, v in row.items() if k != "id" or v is not None} for row in named]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
        return [question.id for question in read_task(folder / "task.yaml").load(None)]

    assert asked("a", "b", 3) == ["a", "b", "3"]
    assert asked(None, None, "z") == ["0", "1", "z"]
    with pytest.raises(DataError, match=r"^task 'colours': two questions have the id 'b'$"):
        asked("a", "b", "b")
    with pytest.raises(DataError, match="two questions have the id '1'"):
        asked("1", None, "z")


def with_metric(folder: Path, metric: str, **changes: str) -> Path:
    """The task with another metric."""
    path, text = folder / "task.yaml", YAML.replace("exact_match", f'"{metric}"')
    for old, new in changes.items():
        text = text.replace(old, new)
    path.write_text(text)
    return path


def module_of_mine(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, source: str) -> None:
    (folder / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(str(folder))


MINE = """
from os import system as theirs

def first_letter(reply, question):
    return reply[:1] == question.answers[0][:1]

def two(reply, question):
    return 2

def word(reply, question):
    return "good"

def alone(reply):
    return 1.0

number = 3
"""


def asked(answer: str, *more: str) -> Question:
    return Question("q", "", (answer, *more))


def test_a_function_of_ones_own_scores_replies(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module_of_mine(folder, monkeypatch, "mine_a", MINE)
    task = read_task(with_metric(folder, "mine_a:first_letter"))
    model, processor = load(folders.folder("llava"))
    result = evaluate(model, processor, [task]).tasks["colours"]
    expected = [
        float(reply[:1] == question.answers[0][:1])
        for reply, question in zip(result.replies, task.load(None), strict=True)
    ]
    assert list(result.scores) == expected
    assert metric_named("mine_a:first_letter")("red", asked("rot")) == 1.0


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("os:system", "a function of your own"),
        ("subprocess:getoutput", "a function of your own"),
        ("mine_b:theirs", "defines no function 'theirs'"),
        ("mine_b:number", "defines no function 'number'"),
        ("mine_b:missing", "defines no function 'missing'"),
        ("mine_b:alone", "two arguments"),
        ("no_such_module:f", "cannot be imported"),
        ("torch:load", "defines no function"),
    ],
)
def test_what_is_no_metric_of_ones_own_is_refused(
    metric: str, message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module_of_mine(folder, monkeypatch, "mine_b", MINE)
    with pytest.raises(ConfigError, match=message) as failure:
        read_task(with_metric(folder, metric))
    assert "colours" in str(failure.value)


@pytest.mark.parametrize("name", ["two", "word"])
def test_a_score_must_be_a_number_from_0_to_1(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module_of_mine(folder, monkeypatch, "mine_c", MINE)
    with pytest.raises(ConfigError, match="number from 0 to 1"):
        metric_named(f"mine_c:{name}")("red", asked("red"))


def test_f1_counts_words_and_takes_the_best_answer() -> None:
    f1 = metric_named("f1")
    assert f1("It is red.", asked("it is red")) == 1
    assert f1("red red", asked("red blue")) == pytest.approx(0.5)
    assert f1("the red one", asked("blue", "red one")) == pytest.approx(2 * 2 / 5)
    assert f1("", asked("red")) == 0


def test_rouge_l_without_its_package_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"slimvlm\[rouge\]"):
        read_task(with_metric(folder, "rouge_l"))


def test_rouge_l_is_the_longest_common_subsequence() -> None:
    rouge = metric_named("rouge_l")
    assert rouge("one two three", asked("four", "one three two")) == pytest.approx(2 / 3)


@pytest.mark.parametrize("prompt", ["", "What colour? {hint}"])
def test_loss_and_perplexity_are_of_the_given_answers(prompt: str, folder: Path) -> None:
    """With a prompt those of answers in a conversation, as data is evaluated; else plain text."""
    model, words = load(folders.folder("text"))
    changes = {"images: pictures": 'image: ""', "What colour? {hint}": prompt}
    loss, perplexity = (
        evaluate(model, words, [read_task(with_metric(folder, metric, **changes))])
        for metric in ("loss", "perplexity")
    )
    questions = read_task(folder / "task.yaml").load(None)
    given = [answered_sample(q, q.answers[0]) if prompt else q.answers[0] for q in questions]
    expected = evaluate_data(model, words, given).figures
    assert loss.tasks["colours"].score == pytest.approx(expected.loss.value, abs=1e-5)
    assert perplexity.tasks["colours"].score == pytest.approx(expected.perplexity.value, rel=1e-5)
    assert math.isnan(loss.average)  # neither counts in AVG
