"""Results: retention, floors, and files of every age."""

import json
from dataclasses import replace

import pytest

from slimvlm.core.errors import ConfigError
from slimvlm.data.samples import Question, Task
from slimvlm.evaluation.results import Result, TaskResult, asked_of, kind_of, read_baseline
from tests.tables import tables

TABLES = tables(__file__)

PASSAGES = TaskResult("perplexity", 12.1825, 0.0, False, ("p",), ("",), (2.5,))
TIMES = {"prefill_ms": 2.25, "decode_ms": 1.0}
TIMES |= {"prefill_range_ms": (2.0, 2.5), "decode_range_ms": (1.0, 1.0)}
KNOWN, HALF = "101100110", "100100000"


def result(right, majority=100 * 3 / 9, **changes):
    """A result from ``1`` for each right answer and ``0`` for each wrong one."""
    scores, ids = tuple(map(float, right)), tuple(f"q{i}" for i in range(len(right)))
    mean, replies = 100 * sum(scores) / len(scores), ("red",) * len(right)
    colours = TaskResult("exact_match", mean, 25.0, True, ids, replies, scores, majority=majority)
    tasks = {"colours": colours, "passages": PASSAGES}
    made = Result("tiny", 2000, 1000, tasks, dtype="float32", weight_bytes=8000, **TIMES)
    return replace(made, **changes)


def test_a_file_gives_the_same_result_and_one_without_later_fields_loads(tmp_path):
    found = result(KNOWN, limit=9, batch_size=3)
    found.save(tmp_path / "result.json")
    assert Result.load(tmp_path / "result.json") == found
    values = json.loads((tmp_path / "result.json").read_text())
    assert values["average"] == found.average
    assert values["average_by_kind"] == {"free": found.average}
    replace(found, tasks={"passages": PASSAGES}).save(tmp_path / "loss.json")
    assert json.loads((tmp_path / "loss.json").read_text())["average"] is None  # JSON has no NaN
    for text in ("", "[]", "{}", '{"average": 1, "tasks": {"a": {}}}'):
        (tmp_path / "broken.json").write_text(text)
        with pytest.raises(ConfigError, match=r"result '.*broken\.json': cannot be read"):
            Result.load(tmp_path / "broken.json")
    for name in ("limit", "batch_size", "dtype", "average_by_kind"):
        del values[name]
    values |= {"seed": 1, "blind": False}
    for task in values["tasks"].values():
        del task["majority"], task["blind_scores"], task["offered"]
    (tmp_path / "old.json").write_text(json.dumps(values))
    old = Result.load(tmp_path / "old.json")
    assert (old.limit, old.tasks["colours"].majority) == (None, None)
    kept = old.retention(old)
    assert kept.above_floor == kept.above_chance == pytest.approx(100)
    assert list(old.retention_by_kind(old)) == ["free"]


@pytest.mark.parametrize(("name", "metric", "offered", "kind"), TABLES["kinds"])
def test_a_task_is_of_one_kind(name, metric, offered, kind):
    colours = result(KNOWN).tasks["colours"]
    assert kind_of(name, replace(colours, metric=metric, offered=offered)) == kind


def both_kinds(chosen, free, blind=""):
    """A result of a task with choices (chance 25 %) and of one without (majority 10 %)."""
    one = result(chosen, majority=None).tasks["colours"]
    one = replace(one, metric="yes_no", blind_scores=tuple(map(float, blind)))
    other = replace(result(free, majority=10.0).tasks["colours"], chance=0.0)
    return replace(result(KNOWN), tasks={"there": one, "name": other, "passages": PASSAGES})


def test_chosen_and_free_answers_are_kept_apart_with_their_floors():
    whole, small = both_kinds("11111111", "1111100000"), both_kinds("11111100", "1000000000")
    assert {kind: list(part.tasks) for kind, part in whole.by_kind().items()} == {
        "chosen": ["there"],
        "free": ["name"],
    }
    kept = small.retention_by_kind(whole)
    assert [each.percent for each in kept.values()] == pytest.approx([75, 20])
    assert [each.floor for each in kept.values()] == pytest.approx([25, 20])
    for name, kind in (("there", "chosen"), ("name", "free")):
        alone = replace(small, tasks={name: small.tasks[name]})
        assert alone.retention_by_kind(whole) == {kind: kept[kind]}
        assert alone.retention(whole) == kept[kind]
    assert small.retention(whole).percent == pytest.approx(100 * (75 + 10) / (100 + 50))
    blind = both_kinds("11111111", "1111100000", blind="11110000")
    assert small.retention_by_kind(blind)["chosen"].floor == pytest.approx(50)
    nothing = both_kinds("11111111", "0000000000")  # of which no share can be kept
    assert list(small.retention_by_kind(nothing)) == ["chosen"]
    passages = replace(small, tasks={"passages": PASSAGES})
    assert passages.by_kind() == passages.retention_by_kind(whole) == {}


def test_models_of_one_shape_have_the_same_times_and_retain_all():
    found = result(KNOWN)
    kept = found.retention(found)
    assert kept.low < kept.percent == 100 < kept.high
    assert result(HALF).retention(found).percent == pytest.approx(40)
    slow = replace(found, prefill_ms=9.0, prefill_range_ms=(8.0, 10.0))
    assert found.timed_as(slow) == slow
    for change in ({"backbone_params": 1}, {"weight_bytes": 1}, {"dtype": "bfloat16"}):
        assert found.timed_as(replace(slow, **change)) == found


@pytest.mark.parametrize(
    ("floor", "scores"), [(3 / 9, "100000000"), (4 / 9, "111100000"), (3 / 9, "")]
)
def test_retention_above_the_highest_floor(floor, scores):
    """Chance is 25 %, the best constant answer 33 %; the blind floor counts if it is higher."""
    known, half = result("101100111"), result("100100011")
    colours = replace(known.tasks["colours"], blind_scores=tuple(map(float, scores)))
    kept = half.retention(replace(known, tasks={"colours": colours}))
    score, base = 4 / 9, 6 / 9
    assert kept.above_chance == pytest.approx(100 * (score - 0.25) / (base - 0.25))
    assert kept.above_floor == pytest.approx(100 * (score - floor) / (base - floor))


def test_a_baseline_file_is_checked_before_a_model_is_read(tmp_path):
    asked = [Question("q0", "what?", ("red",))]
    colours = replace(result("1").tasks["colours"], **asked_of(asked))
    found = replace(result("1"), tasks={"colours": colours})
    found.save(tmp_path / "r.json")
    assert read_baseline(tmp_path / "r.json") == found
    assert found.retention(found).percent == 100
    text = (tmp_path / "r.json").read_text()
    (tmp_path / "blind.json").write_text(text.replace("{", '{"blind": true,', 1))
    same = Task("colours", "exact_match", 25.0, lambda limit: asked[:limit])
    assert read_baseline(tmp_path / "r.json", tasks={"colours": same}).tasks["colours"] == colours
    other = replace(same, load=lambda limit: [replace(asked[0], answers=("blue",))])
    for name, how, message in (
        ("blind", {}, r"blind\.json': cannot be read.*blind"),
        ("r", {"floors": True}, "evaluate that model with --floors"),
        ("r", {"tasks": {"colours": other}}, r"'colours'.*other prompts or answers"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_baseline(tmp_path / f"{name}.json", **how)
