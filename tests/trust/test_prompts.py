"""A task's prompt names columns and does nothing else; its name and files lead nowhere."""

import datetime
import json

import datasets
import pytest
import yaml

from slimvlm.core.errors import ConfigError, DataError, SlimError
from slimvlm.data.read import load_samples, read_rows
from slimvlm.data.samples import Question
from slimvlm.evaluation.ask import AnswerLog
from slimvlm.evaluation.tasks import TaskRow, read_task
from tests.tables import tables
from tests.tiny_folder import edit_json

TABLES = tables(__file__)

TASK = {"name": "own", "data": "rows.jsonl", "prompt": "{q}?", "answer": "a"}


def asked(prompt, **columns):
    return TaskRow(name="own", data="", prompt=prompt, answer="").filled_prompt(columns)


def test_columns_are_filled_in_as_text():
    row = {"q": "What {is} it", "n": 3, "two words": None, "a.b": "dot"}
    prompt = "{q} {n} {two words} {a.b} {{kept}} }}{{"
    assert asked(prompt, **row) == "What {is} it 3 None dot {kept} }{"


@pytest.mark.parametrize(
    "inside",
    [
        *("t.ceil.__globals__[sys].modules[os].environ", "t.__class__", "t.year"),
        *("t[0]", "t!r", "t:>9999999999", "0", ""),
    ],
)
def test_no_attribute_index_or_format_is_read(inside):
    with pytest.raises(KeyError):
        asked("{" + inside + "}", t=datetime.datetime(2020, 1, 1))


@pytest.mark.parametrize("prompt", ["{", "}", "{q", "q}", "{{}", "{a{b}}", "{q}}"])
def test_a_lone_brace_is_refused(prompt):
    with pytest.raises(ConfigError, match="brace"):
        asked(prompt, q="x", b="y")


def task_file(folder, **changes):
    (folder / "rows.jsonl").write_text(json.dumps({"q": "Why", "a": "so"}) + "\n")
    path = folder / "task.yaml"
    path.write_text(yaml.safe_dump(TASK | changes))
    return path


@pytest.mark.parametrize(("changes", "named"), TABLES["wrong_values"])
def test_a_wrong_value_is_named_with_its_file(changes, named, tmp_path):
    with pytest.raises(ConfigError, match=f"task '.*task.yaml': .*({named})") as caught:
        read_task(task_file(tmp_path, **changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [*TABLES["no_task"], "[" * 500])
def test_yaml_that_is_no_task_ends_in_one_line(text, tmp_path):
    path = tmp_path / "task.yaml"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=r"task '.*task\.yaml'") as caught:
        read_task(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "line", ["[]", "3", "null", "{", '{"id": 1, "reply": "x"}', '{"id": "1"}', "[" * 5000]
)
def test_a_line_of_a_log_that_is_none_is_asked_again(line, tmp_path):
    log = AnswerLog(tmp_path, "own", "key")
    log.add([Question("1", "q", ("a",))], [("reply", False)])
    (file,) = tmp_path.iterdir()
    file.write_text(line + "\n" + file.read_text())
    assert AnswerLog(tmp_path, "own", "key").replies == {"1": ("reply", False)}


def test_rows_that_are_no_objects_and_columns_of_other_kinds_are_named(tmp_path):
    path = task_file(tmp_path, choices="c")
    for row in ([1], 3, {"q": 1, "a": "x", "c": "letters"}, {"q": 1, "a": [], "c": ["x"]}):
        (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
        with pytest.raises(DataError, match="task 'own': row"):
            read_task(path).load(None)


TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def saved(folder):
    datasets.Dataset.from_list([{"messages": TURNS}]).save_to_disk(str(folder))
    return folder


def test_a_datasets_folder_reads_its_own_files_only(tmp_path):
    folder = saved(tmp_path / "data")
    assert len(load_samples(folder)) == 1
    name = "data-00000-of-00001.arrow"
    other = saved(tmp_path / "other") / name
    (folder / "x.jsonl").symlink_to(other)
    with pytest.raises(ConfigError, match="link that leads out"):
        list(read_rows(folder))
    (folder / "x.jsonl").unlink()
    for outside in (f"../other/{name}", str(other)):
        change = {"_data_files": [{"filename": outside}]}
        edit_json(folder / "state.json", lambda state, change=change: state.update(change))
        (row,) = read_rows(folder)
        assert row["messages"] == TURNS


def test_a_line_above_the_limit_is_a_broken_row(tmp_path, monkeypatch):
    monkeypatch.setattr("slimvlm.data.read.MAX_LINE_BYTES", 300)
    good, path = json.dumps({"messages": TURNS}), tmp_path / "data.jsonl"
    long = json.dumps({"messages": TURNS, "note": "x" * 1000})
    path.write_text(f"{good}\n{long}\n{good}\n{long}")
    said = []
    assert len(load_samples(path, max_bad_rows=2, warn=said.append)) == 2
    assert [line for line in said if "line 2 has more than 300 bytes" in line]
    with pytest.raises(SlimError, match="line 2"):
        load_samples(path)
