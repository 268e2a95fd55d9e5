"""Tasks by name, and tasks of the user's own: a YAML row over a local data file."""

import json
import math

import pytest
from PIL import Image

from slimvlm.core.errors import ConfigError, DataError
from slimvlm.data.chat import answered_sample
from slimvlm.evaluation.ask import digest_of_questions, evaluate
from slimvlm.evaluation.on_data import evaluate_data
from slimvlm.evaluation.tasks import find_tasks, read_task
from slimvlm.models.load import load
from tests import tiny_folder as folders
from tests.tables import tables

TABLES = tables(__file__)

YAML = TABLES["task"]


@pytest.fixture
def folder(tmp_path):
    """A task and its data."""
    (tmp_path / "pictures").mkdir()
    for name in ("red", "blue"):
        Image.new("RGB", (8, 8), name).save(tmp_path / "pictures" / f"{name}.png")
    rows = [
        {"id": "a", "hint": "one word", "colour": "red", "image": "red.png"},
        {"id": "b", "hint": "please", "colour": ["blue", "navy"], "image": "blue.png"},
        {"id": "c", "hint": "no picture", "colour": "none"},
    ]
    write_rows(tmp_path, [{**row, "kinds": ["red", "blue"], "other": None} for row in rows])
    (tmp_path / "task.yaml").write_text(YAML)
    return tmp_path


def write_rows(folder, rows):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def changed(folder, *changes):
    """The task's file with some of its text replaced: ``old|new``."""
    path = folder / "task.yaml"
    for old, new in (change.split("|") for change in changes):
        path.write_text(path.read_text().replace(old, new))
    return path


def test_rows_become_questions_and_tasks_are_found_by_name_and_by_file(folder):
    task = read_task(folder / "task.yaml")
    questions = task.load(None)
    assert [q.id for q in questions] == ["a", "b", "c"]
    assert questions[0].prompt == "What colour? one word"
    assert questions[1].answers == ("blue", "navy")
    assert [len(q.images) for q in questions] == [1, 1, 0]
    assert task.chance == 25
    assert [q.id for q in task.load(2)] == ["a", "b"]

    def names(wanted):
        return [task.name for task in find_tasks(wanted)]

    assert names("presence, text_sum,presence") == ["presence", "text_sum"]
    assert names(f"name,{folder / 'task.yaml'}") == ["name", "colours"]
    assert len(names("demo")) > 3
    for wrong, message in (
        ("presence,presense", r"'presense' is not known.*presence"),
        ("nope", "Choose from: demo, name"),
        (" , ", "names no task"),
    ):
        with pytest.raises(ConfigError, match=message):
            names(wrong)


@pytest.mark.parametrize(("change", "message"), TABLES["wrong"])
def test_a_wrong_field_column_or_picture_is_named(folder, change, message):
    with pytest.raises((DataError, ConfigError), match=message):
        read_task(changed(folder, change)).load(None)


def test_questions_are_those_of_the_test_split_or_the_named_one(folder, capsys):
    rows = (folder / "rows.jsonl").read_text()
    (folder / "mine").mkdir()
    for split, name in (("train", "a"), ("val", "b"), ("test", "c")):
        line = next(line for line in rows.splitlines() if json.loads(line)["id"] == name)
        (folder / "mine" / f"{split}.jsonl").write_text(line + "\n")
        task = read_task(changed(folder, 'rows.jsonl|mine\nimage: ""', "images: pictures|"))
        assert [question.id for question in task.load(None)] == [name]
    assert "task 'colours': questions are those of the test split" in capsys.readouterr().err
    (named,) = read_task(changed(folder, "chance: 25|split: validation")).load(None)
    assert named.id == "b"
    (folder / "mine" / "test.jsonl").unlink()
    asked = read_task(changed(folder, "split: validation|split: test"))
    with pytest.raises(ConfigError, match=r"task 'colours': .*mine' has no test split"):
        asked.load(None)
    (folder / "mine" / "dataset_dict.json").touch()
    with pytest.raises(ConfigError, match=r"has no test split"):
        asked.load(None)


def test_no_answer_a_name_twice_and_an_id_twice_are_refused(folder):
    """Questions of one id would share one answer. Rows without an id are numbered."""
    (folder / "other.yaml").write_text((folder / "task.yaml").read_text())
    with pytest.raises(ConfigError, match="two tasks have this name"):
        find_tasks(f"{folder / 'task.yaml'},{folder / 'other.yaml'}")
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]

    def asked(*ids):
        named = [{**row, "id": name} for row, name in zip(rows, ids, strict=True)]
        write_rows(folder, [{k: v for k, v in r.items() if k != "id" or v} for r in named])
        found = (task := read_task(folder / "task.yaml")).load(None)
        assert digest_of_questions("", task, found)
        return [question.id for question in found]

    assert asked("a", "b", 3) == ["a", "b", "3"]
    assert asked(None, None, "z") == ["0", "1", "z"]
    with pytest.raises(DataError, match="two questions have the id '1'"):
        asked("1", None, "z")
    for nothing in (None, "", [], [None]):
        write_rows(folder, [{"id": "a", "hint": "one word", "colour": nothing}])
        with pytest.raises(DataError, match="has no answer"):
            read_task(folder / "task.yaml").load(None)


@pytest.mark.parametrize("prompt", ["", "What colour? {hint}"])
def test_loss_and_perplexity_are_of_the_given_answers(prompt, folder):
    """With a prompt those of answers in a conversation, as data is evaluated; else plain text."""
    model, words = load(folders.folder("text"))
    changed(folder, 'images: pictures|image: ""', f"What colour? {{hint}}|{prompt}")
    loss, perplexity = (
        evaluate(model, words, [read_task(changed(folder, change))])
        for change in ("exact_match|loss", "metric: loss|metric: perplexity")
    )
    questions = read_task(folder / "task.yaml").load(None)
    given = [answered_sample(q, q.answers[0]) if prompt else q.answers[0] for q in questions]
    expected = evaluate_data(model, words, given).figures
    assert loss.tasks["colours"].score == pytest.approx(expected.loss.value, abs=1e-5)
    assert perplexity.tasks["colours"].score == pytest.approx(expected.perplexity.value, rel=1e-5)
    assert math.isnan(loss.average)  # neither counts in AVG
