"""Stages are done once, in order, by any number of workers; kills change nothing."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from importlib.util import find_spec

import pandas as pd
import pytest
import yaml

from slimvlm.core.errors import NumericalError
from slimvlm.runs.study import prepared
from slimvlm.runs.study import schedule as scheduling
from slimvlm.runs.study.schedule import Cache, Outcome, ray_task, run_local
from tests import tiny_folder as folders
from tests.runs.study.study_files import RECOVER, RECOVERIES, stable, study, watch_work
from tests.tiers import tiered

KILLS = int(os.environ.get("SLIMVLM_KILLS", "3"))
"""Kills at random moments; SLIMVLM_KILLS=10 for the long form."""
NUM_STAGES = 10


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return folders.write_llava_data(tmp_path_factory.mktemp("data"), pictures=False)


@pytest.fixture
def schedule(data):
    config = study(data, {"ratio": [0.2, 0.4], "seed": [0, 1]})
    return prepared(config, print)[1]


@pytest.fixture
def done(monkeypatch):
    """Stages only take a moment and leave their output; the names of those that were done."""
    names = []

    def quick(stage, inputs, folder, scratch):
        names.append(stage.name)
        threading.Event().wait(0.005)
        (folder / scheduling.CHECKPOINT).mkdir()

    monkeypatch.setattr(scheduling, "work", quick)
    monkeypatch.setattr(scheduling, "PAUSE_S", 0.01)
    return names


def run(schedule, cache, stages=None, at_end=bool):
    """Do stages, by default all that are missing; outcomes by the stage's name."""
    outcomes = {}

    def finished(stage, outcome):
        outcomes[stage.name] = outcome
        at_end()

    missing = schedule.missing(cache) if stages is None else stages
    run_local(schedule, missing, cache, bool, finished)
    return outcomes


def models_in(root):
    kinds = ("prune", "recover")
    return [path for kind in kinds for path in (root / "cache" / kind).glob("*/checkpoint")]


def test_an_error_of_another_worker_is_not_tried_again_at_once(schedule, tmp_path, monkeypatch):
    def fails(stage):
        raise NumericalError("no")

    tried = watch_work(monkeypatch, fails)
    missing = schedule.missing(Cache(tmp_path))
    early, late = Cache(tmp_path), Cache(tmp_path)
    run(schedule, early, missing)
    first = tried.total()
    run(schedule, late, missing)
    assert tried.total() == first > 0
    run(schedule, Cache(tmp_path), missing)
    assert tried.total() == 2 * first


@pytest.mark.parametrize(
    "kind", tiered(["calibrate", "prune", "recover", "evaluate"], lambda kind: kind == "prune")
)
def test_a_stop_costs_one_stage(kind, schedule, tmp_path, monkeypatch, done):
    def stops(stage):
        if stage.kind == kind:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        watch_work(patch, after=stops)
        with pytest.raises(KeyboardInterrupt):
            run(schedule, Cache(tmp_path))
    lost = done[-1]
    run(schedule, Cache(tmp_path))
    assert sorted(done) == sorted([lost, *(stage.name for stage in schedule.stages())])


def test_two_workers_never_do_the_same_stage(schedule, tmp_path, done):
    missing = schedule.missing(Cache(tmp_path))
    workers = [
        threading.Thread(target=run, args=(schedule, Cache(tmp_path), missing)) for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert sorted(done) == sorted(stage.name for stage in missing)
    assert len(set(done)) == len(done) == len(schedule.stages())


def test_few_models_are_on_disk_at_a_time(schedule, tmp_path, done):
    counts = []
    run(schedule, Cache(tmp_path), at_end=lambda: counts.append(len(models_in(tmp_path))))
    assert max(counts) == 1


def test_a_stage_is_done_after_its_inputs_and_before_dearer_ones(schedule):
    missing = schedule.missing(Cache("/nowhere"))
    position = {stage.name: i for i, stage in enumerate(missing)}
    assert all(position[s.name] < position[t.name] for t in missing for s in t.inputs)
    recovers = [schedule.flops[s.name] for s in missing if s.kind == "recover"]
    assert recovers == sorted(recovers)
    originals = [stage for stage in missing if stage.kind == "evaluate" and not stage.inputs]
    assert missing[0] is originals[0]


@pytest.mark.parametrize(
    "recovery", tiered(["sft+hidden", ["none", "sft+hidden"]], lambda it: isinstance(it, list))
)
def test_other_questions_make_removed_models_again(recovery, data, tmp_path, done):
    cache = Cache(tmp_path)
    for limit in (2, 1):
        config = study(data, {"axis": "depth", "recovery": recovery}, limit=limit)
        _, schedule = prepared(config, print)
        missing = schedule.missing(cache)
        done.clear()
        run(schedule, cache, missing)
        assert sorted(done) == sorted(stage.name for stage in missing)
        assert [stage.kind for stage in missing if stage.kind == "recover"] == ["recover"]
        assert models_in(tmp_path) == []
        assert schedule.missing(cache) == []


def test_removed_and_failed_inputs_are_named(schedule, tmp_path, done):
    evaluation = next(s for s in schedule.stages() if s.kind == "evaluate" and s.inputs)
    outcome = run(schedule, Cache(tmp_path), [evaluation])[evaluation.name]
    assert outcome.error == "prune was removed meanwhile"
    prune = next(stage for stage in schedule.stages() if stage.kind == "prune" and stage.inputs)
    failed = Outcome(prune.inputs[0].name, error="it was too large")
    assert ray_task(prune, str(tmp_path), 1.0, failed).error == "calibrate failed"
    assert ray_task(prune, str(tmp_path), 1.0).error == "calibrate was removed meanwhile"
    assert not ray_task(prune.inputs[0], str(tmp_path), 1.0).error
    assert ray_task(prune, str(tmp_path), 1.0).seconds > 0
    assert ray_task(prune, str(tmp_path), 1.0).seconds == 0


def test_work_of_another_worker_between_two_looks_is_no_failure(schedule, tmp_path, done):
    missing = schedule.missing(Cache(tmp_path))
    rest = [stage for stage in missing if stage.kind in ("recover", "evaluate")]
    run(schedule, Cache(tmp_path), [stage for stage in missing if stage not in rest])
    overtaken = False

    class Overtaken(Cache):
        """Between its first look at a stage and at its inputs, another worker does them all."""

        def is_ready(self, stage):
            nonlocal overtaken
            if stage.kind == "prune" and not overtaken:
                overtaken = True
                run(schedule, Cache(tmp_path), rest)
            return super().is_ready(stage)

    outcomes = run(schedule, Overtaken(tmp_path), rest)
    assert [outcome.error for outcome in outcomes.values()] == [""] * len(rest)


# The same table after kills, by two processes, by Ray.
@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A study of a model that sees, along both axes, without recovery and with."""
    home = tmp_path_factory.mktemp("study")
    folders.copied("llava", home / "model")
    cells = {"model": str(home / "model"), "ratio": 0.4, "recovery": ["none", "sft+hidden"]}
    values = {
        **{"grids": [cells], "recoveries": RECOVERIES, "recover": RECOVER, "limit": 2},
        **{"data": str(folders.write_llava_data(home / "data")), "prune": {"samples": 4}},
        "tasks": "presence,text_ppl",
    }
    path = home / "study.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def started(file, out, *options):
    command = [sys.executable, "-m", "slimvlm", "study", str(file), "--out", str(out), *options]
    with (out.parent / f"{out.name}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def finished(file, out, *options):
    process = started(file, out, *options)
    assert process.wait(900) == 0, (out.parent / f"{out.name}.log").read_text()[-3000:]
    return pd.read_parquet(out / "results.parquet")


def done_in(out):
    """The records of all outcomes, by the stage's name."""
    found = (out / "cache").glob("*/[!.]*/stage.json")
    return {path.parent.name: json.loads(path.read_text()) for path in found}


@pytest.fixture(scope="module")
def expected(file, tmp_path_factory):
    table = finished(file, tmp_path_factory.mktemp("runs") / "undisturbed")
    assert set(table["status"]) == {"done"}
    assert table["perplexity"].nunique() == 5
    return stable(table)


@pytest.mark.slow
def test_kills_at_random_moments_change_nothing(file, expected, tmp_path):
    out, draw = tmp_path / "killed", random.Random(0)
    for target in sorted(draw.sample(range(NUM_STAGES - 1), KILLS)):
        process = started(file, out)
        while len(done_in(out)) < target and process.poll() is None:
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 1))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    pd.testing.assert_frame_equal(stable(finished(file, out)), expected)
    assert list((out / "work").iterdir()) == []
    assert len(done_in(out)) == NUM_STAGES


@pytest.mark.slow
def test_two_processes_share_the_work(file, expected, tmp_path):
    both = [started(file, tmp_path / "shared") for _ in range(2)]
    assert [process.wait(900) for process in both] == [0, 0]
    table = pd.read_parquet(tmp_path / "shared" / "results.parquet")
    pd.testing.assert_frame_equal(stable(table), expected)
    assert len(done_in(tmp_path / "shared")) == NUM_STAGES


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="needs slimvlm[ray]")
def test_ray_gives_the_same_table(file, expected, tmp_path):
    table = finished(file, tmp_path / "ray", "--engine", "ray", "--workers", "2")
    pd.testing.assert_frame_equal(stable(table), expected)
    assert len(done_in(tmp_path / "ray")) == NUM_STAGES
