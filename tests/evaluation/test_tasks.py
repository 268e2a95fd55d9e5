"""Tasks of the user's own: a YAML row over a local data file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from slimvlm.core.errors import ConfigError, DataError
from slimvlm.evaluation.tasks import find_tasks, read_task

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
