"""A request means the same to every driver: what is left open, which samples, which tasks."""

from dataclasses import replace

import pytest

import slimvlm as sv
from slimvlm.core.errors import ConfigError, ImpossiblePlanError
from slimvlm.core.options import CompressConfig, Questions, RecoverConfig
from slimvlm.core.progress import silent
from slimvlm.data.read import load_samples
from slimvlm.data.samples import Sample
from slimvlm.evaluation.tasks import find_tasks
from slimvlm.models.cost import question_flops
from slimvlm.models.pictures import picture_of
from slimvlm.runs import recipe as recipes
from slimvlm.runs.recipe import (
    Recipe,
    check_questions,
    decide,
    dry_plan,
    not_among,
    read_split,
    rows_to_read,
    split,
)
from slimvlm.scoring.criteria import DEFAULT_CRITERIA
from tests import tiny
from tests import tiny_folder as folders
from tests.tables import tables

TABLES = tables(__file__)


def asked(**changes):
    """Options as a user gives them: with data, along width."""
    return CompressConfig(
        **{"ratio": 0.3, "axis": "width", "data": "demo", "recover": None} | changes
    )


def decided(options):
    said = []
    return decide("demo", options, say=said.append), said


# What is left open.
def test_with_data_the_measured_recipe_is_the_default_without_it_the_demo_calibrates():
    found, said = decided(asked())
    assert found.criterion == DEFAULT_CRITERIA["width"] == ("obs",)
    assert (found.allocation, found.repair) == ("balanced", "auto")
    assert found.local_steps is None  # as many as the samples make of it
    assert found.hold_out
    assert said == []
    alone, said = decided(asked(data=None, test_samples=0))
    assert alone == decided(asked(too_long="truncate", test_samples=0))[0]
    assert said == ["no --data: calibrating on the demo's samples"]


@pytest.mark.parametrize(
    "changes", [{"criterion": ("magnitude",)}, {"ratio": None, "vocab_size": 100}]
)
def test_what_needs_no_data_reads_none_and_is_not_repaired(changes):
    found, said = decided(asked(data=None, **changes))
    assert found.data is None
    assert (found.allocation, found.repair) == ("uniform", "none")
    assert found.local_steps == 0
    assert not found.hold_out
    assert found.recover is None
    assert said == []


UNTRIED = {
    "depth": ({"axis": "depth"}, "axis depth removes no widths"),
    "no data": ({"data": None, "criterion": ("random",)}, "there is no data to try it on"),
    "scores": ({"criterion": ("taylor",)}, "only the walk's own choice, by 'obs', tries it"),
}


@pytest.mark.parametrize("case", UNTRIED)
def test_only_what_was_given_is_missed(case):
    """A default that cannot be had is no news; a wish that cannot be met is said once."""
    changes, reason = UNTRIED[case]
    found, said = decided(asked(**changes))
    assert (found.allocation, said) == ("uniform", [])
    found, said = decided(asked(**changes, allocation="balanced"))
    assert found.allocation == "uniform"
    assert said == [f"allocation 'balanced' becomes 'uniform': {reason}"]


def test_the_axis_depends_on_training():
    for recover, axis in ((None, "width"), ("lora", "depth")):
        assert decided(asked(ratio=0.15, axis="chart", recover=recover))[0].axis == axis
        named = asked(ratio=0.15, axis=None, recover=recover)
        assert decided(named)[0].axis == ("width" if recover is None else "auto")


@pytest.mark.parametrize(("changes", "hold_out"), TABLES["held_out"])
def test_samples_are_held_out_where_something_is_judged(changes, hold_out):
    assert decided(asked(**{"local_steps": 0, **changes}))[0].hold_out == hold_out


def test_a_run_has_one_seed_and_only_0_leaves_the_order_of_places():
    config = CompressConfig(ratio=0.3, data="demo", seed=3, recover=RecoverConfig())
    found = decide("demo", config)
    assert found.recover is not None
    assert found.recover.seed == found.seed == 3
    with pytest.raises(ConfigError, match="seed 3 conflicts"):
        CompressConfig(seed=3, data="demo", recover=RecoverConfig(seed=5))
    rows = samples(10)
    first, rest = names(split(rows, plain(samples=4)))
    assert first + rest == [f"s{i}" for i in range(10)]
    other, more = names(split(rows, plain(samples=4, seed=1)))
    assert sorted(other + more) == sorted(first + rest)
    assert other != first


# Which samples.
def plain(**changes):
    return Recipe(model="demo", ratio=0.3, axis="width", **changes)


def samples(count):
    return [Sample(id=f"s{i}", messages=(), place=i) for i in range(count)]


def ids(samples):
    return [sample.id for sample in samples]


def names(found):
    return ids(found.calibration), ids(found.training)


def test_few_samples_serve_both_and_training_comes_back_only_if_more_are_asked_for():
    first, rest = names(split(samples(3), plain(samples=4)))
    assert first == rest == ["s0", "s1", "s2"]
    assert names(split(samples(3), plain(samples=4, training_samples=2)))[1] == ["s0", "s1"]
    rows = samples(6)
    for count, wanted in [(None, "45"), (1, "4"), (4, "4501"), (9, "450123")]:
        request = plain(samples=4, training_samples=count, recover=RecoverConfig())
        assert names(split(rows, request)) == (["s0", "s1", "s2", "s3"], [f"s{i}" for i in wanted])


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({}, 4),
        ({"recover": RecoverConfig()}, None),
        ({"training_samples": 5, "recover": RecoverConfig()}, 9),
        ({"training_samples": 5}, 4),
        ({"seed": 1}, 4),
        ({"seed": 1, "training_samples": 5, "recover": RecoverConfig()}, 9),
    ],
)
def test_no_more_rows_are_read_than_needed(changes, count):
    request = plain(samples=4, **changes)
    assert rows_to_read(request) == count
    if count is not None and not request.seed:
        assert names(split(samples(count), request)) == names(split(samples(20)[:count], request))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return folders.write_llava_data(tmp_path_factory.mktemp("data"), count=20)


def reading(data, **changes):
    given = {"data": str(data), "samples": 6, "recover": RecoverConfig(), "test_samples": 64}
    return Recipe(model=str(folders.folder("llava")), ratio=0.3, **given | changes)


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize("training", [None, 5, 100])
@pytest.mark.parametrize("count", [2, 64])
def test_no_sample_of_the_report_is_used(seed, training, count, data):
    request = reading(data, training_samples=training, test_samples=count, seed=seed)
    found = read_split(request, silent)
    assert len(found.test) in (2, 4)  # at most a fifth of 20, or of the 13 that are read
    used = {*ids(found.calibration), *ids(found.training)}
    assert not used & set(ids(found.test))


def test_repeated_samples_are_not_held_out_and_too_few_not_reported(data, tmp_path):
    samples = [replace(each, place=n) for n, each in enumerate(load_samples(data))]
    twice = [*samples[:18], replace(samples[2], id="again", place=18), samples[19]]
    request = reading(data, test_samples=2)
    assert ids(split(twice, request).test) == [samples[19].id]
    others = [Sample("x", samples[0].messages, samples[1].images)]
    assert not_among([samples[0]], others) == [samples[0]]  # the same words on another picture
    few, lines = folders.write_llava_data(tmp_path, count=9), []
    found = read_split(reading(few), lines.append)
    assert found.test == ()
    assert len(found.calibration) == 6
    assert any("9 samples are too few, 10 are needed" in line for line in lines)
    lines.clear()
    read_split(reading(few, test_samples=0), lines.append)
    assert lines == []


# Which tasks.
def test_a_run_is_asked_what_evaluate_asks(monkeypatch):
    seen = []
    monkeypatch.setattr(recipes, "check_names", lambda *given: seen.append(given) or {})
    config = CompressConfig(ratio=0.3, tasks="presence,pope", task_folder="mine", limit=6)
    questions = decide("demo", config).part(Questions)
    assert questions == Questions(tasks="presence,pope", task_folder="mine", limit=6)
    check_questions(questions)
    assert seen == [(["pope"], 6, "mine")]
    assert [task.name for task in find_tasks("presence")] == ["presence"]


@pytest.mark.parametrize("how", [{"floors": True}, {"log": True}])
def test_published_benchmarks_are_not_asked_blind(how, monkeypatch):
    monkeypatch.setattr(recipes, "check_names", lambda *given: {})
    questions = Questions(tasks="pope", floors=how.pop("floors", False))
    with pytest.raises(ConfigError, match="--floors and --replies do not work with 'pope'"):
        check_questions(questions, **how)


def test_a_latency_is_of_the_whole_question_and_a_tower_may_take_more_than_it(tmp_path):
    """Of an image of 480 x 640 in patches of 8 pixels."""
    model = str(tmp_path)
    tiny.CONFIGS["qwen2_5_vl"]().save_pretrained(model)
    shape, asked = sv.anatomy(model), {"axis": "depth", "data": "demo", "vocab_size": "all"}
    picture = picture_of(model)
    work = question_flops(shape, picture)
    assert work.tower > 0.1 * sum(work)
    found = decide(model, CompressConfig(target_latency=0.8, **asked), shape)
    left = sum(question_flops(dry_plan(found, shape).after, picture))
    assert 0.6 < left / sum(work) <= 0.8
    least = f"{1 - work.backbone / sum(work):.2f}"
    with pytest.raises(ImpossiblePlanError, match=r"the backbone has \d+% of the work"):
        decide(model, CompressConfig(target_latency=float(least), **asked), shape)
