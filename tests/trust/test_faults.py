"""Random damage: to plans, options, data, weights, and to runs in flight.

``SLIMVLM_FAULTS=long`` tries many more of each than the default, which is meant for every change.
"""

import json
import os
import random
import signal
import time
from typing import get_args, get_type_hints

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimvlm import cli
from slimvlm.core.errors import DataError, SlimError
from slimvlm.core.options import PruneConfig, RecoverConfig
from slimvlm.data.read import NAMED, load_samples
from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.load import load
from slimvlm.planning.plan import Plan
from slimvlm.pruning.cut import prune_
from slimvlm.pruning.save import PLAN_FILE, save
from tests import tiny, tiny_folder
from tests.handmade import assert_equal

IS_LONG = os.environ.get("SLIMVLM_FAULTS") == "long"
KILLS = 50 if IS_LONG else 3
EXAMPLES = 1000 if IS_LONG else 60
ANATOMY = read_anatomy(tiny.build("llama"))


@st.composite
def kept_units(draw):
    """Any legal choice for the tiny model: kept units may differ from layer to layer."""

    def kept(count):
        return tuple(sorted(draw(st.sets(st.integers(0, count - 1), min_size=1, max_size=count))))

    layers = kept(ANATOMY.num_layers)
    shapes = list(enumerate(ANATOMY.layers))
    return {
        "layers": layers,
        "kv_groups": tuple(kept(s.num_kv_heads) if i in layers else () for i, s in shapes),
        "neurons": tuple(kept(s.intermediate_size) if i in layers else () for i, s in shapes),
    }


def refusal_of(call):
    """What a user would read; None if nothing was wrong. Any other error passes."""
    try:
        call()
    except SlimError as error:
        return str(error)
    return None


@given(kept=kept_units())
@settings(max_examples=200 if IS_LONG else 8)
def test_any_plan_makes_a_checkpoint_that_loads(kept, tmp_path_factory):
    """`save` itself loads it back and compares; here its shape."""
    plan = Plan(before=ANATOMY, axis="both", **kept)
    model = tiny.build("llama")
    prune_(model, plan, allow_uneven=True)
    out = tmp_path_factory.mktemp("out") / "model"
    save(model, None, out, plan)
    assert read_anatomy(load(out)[0]).layers == plan.after.layers
    assert Plan.load(out / PLAN_FILE) == plan


@pytest.mark.parametrize("kind", [PruneConfig, RecoverConfig])
@given(data=st.data())
@settings(max_examples=EXAMPLES)
def test_options_are_taken_or_named(kind, data):
    numbers = st.integers(-3, 10**9) | st.floats()
    texts = st.text(max_size=10) | st.sampled_from(["sft+hidden", "0.5*sft+kl", "kl+", "lora"])
    by_type = {int: st.integers(-3, 10**9), float: numbers, bool: st.booleans(), str: texts}
    hints = {name: (get_args(hint) or (hint,))[0] for name, hint in get_type_hints(kind).items()}
    name = data.draw(st.sampled_from([name for name, first in hints.items() if first in by_type]))
    refusal = refusal_of(lambda: kind(**{name: data.draw(by_type[hints[name]])}))
    assert refusal is None or name.split("_")[0] in refusal


# Data files.

ROW = {
    "id": "good",
    "conversations": [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "Red."}],
}
IMAGES = ["../../etc/passwd", "/etc/passwd", "x" * 5000, "a\0b"]
WRONG = [
    *(None, 7, "text", [], {}, {"id": 1}, {"conversations": None}, {"messages": {}}),
    *({**ROW, "image": image} for image in (*IMAGES, 5, [None], {"path": None})),
    {"conversations": [{"from": "gpt", "value": ""}]},
    {"conversations": [{"from": {}, "value": []}]},
    {"messages": [{"role": "user", "content": [{"type": []}]}]},
    {"messages": [{"role": "assistant", "content": [{"type": "text", "text": 3}]}]},
]
BROKEN_LINES = ["{", "]", "nul", '{"id": ', "[" * 5000, "9" * 5000, '{"a": "\\ud800', "\x00"]
ROWS = 1000


def write_rows(path, rng):
    """A file of one good row and a thousand that are none."""
    wrong = [rng.choice(WRONG) for _ in range(ROWS)]
    if path.suffix == ".json":
        path.write_text(json.dumps([*wrong, ROW]))
    elif path.suffix == ".jsonl":
        lines = [rng.choice([json.dumps(row), rng.choice(BROKEN_LINES)]) for row in wrong]
        path.write_text("\n".join([*lines, json.dumps(ROW)]) + "\n")
    else:
        images = [*IMAGES, "none.png"]
        turns = [[], [{"from": "gpt", "value": ""}], [{"from": "robot", "value": "Hi"}]]
        rows = [
            {"id": str(i), "conversations": ROW["conversations"], "image": rng.choice(images)}
            if rng.random() < 0.5
            else {"id": str(i), "conversations": rng.choice(turns), "image": None}
            for i in range(ROWS)
        ]
        datasets.Dataset.from_list([*rows, {**ROW, "image": None}]).to_parquet(path)


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.parquet"])
def test_a_thousand_broken_rows_are_counted_and_named(name, tmp_path):
    path = tmp_path / name
    write_rows(path, random.Random(0))
    told = []
    samples = load_samples(path, max_bad_rows=ROWS, warn=told.append)
    assert [sample.id for sample in samples] == ["good"]
    assert len(told) == NAMED + 1
    assert all(line.startswith("skipped: ") and "\n" not in line for line in told[:-1])
    assert f"{ROWS} broken rows skipped, 1 samples read" in told[-1]
    with pytest.raises(DataError, match=f"max-bad-rows {ROWS - 1}"):
        load_samples(path, max_bad_rows=ROWS - 1, warn=lambda line: None)


# Kills. The commands run in forks of this process, which has its libraries in memory already.
def start(*arguments):
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nowhere, stream)
        cli.main([str(argument) for argument in arguments])
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        os._exit(code)


def finish(pid):
    """The exit code of a process; below 0 the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["prune", "recover"])
def test_kills_tear_nothing_and_every_restart_completes(verb, tmp_path):
    model = tiny_folder.folder("llava")
    data = tiny_folder.write_llava_data(tmp_path / "data", count=6)
    settings = tmp_path / "settings.yaml"
    settings.write_text("model: original\nratio: 0.3\nrecover: {trainer: {save_steps: 2}}\n")
    how = {
        "prune": ["--ratio", "0.3", "--data", data, "--samples", "4"],
        "recover": [
            *("--data", data, "--teacher", model, "--max-steps", "6", "--batch-size", "2"),
            *("--lora-rank", "4", "--config", settings),
        ],
    }[verb]
    began = time.monotonic()
    assert finish(start(verb, model, *how, "--out", tmp_path / "whole")) == 0
    takes = time.monotonic() - began
    rng = random.Random(0)
    killed = 0
    for attempt in range(KILLS):
        out = tmp_path / f"out-{attempt}"
        pid = start(verb, model, *how, "--out", out)
        time.sleep(rng.uniform(0, takes))
        os.kill(pid, signal.SIGKILL)
        was_killed = finish(pid) == -signal.SIGKILL
        killed += was_killed
        if not out.exists():
            assert finish(start(verb, model, *how, "--out", out)) == 0, "the restart failed"
        assert_equal(out, tmp_path / "whole")
        left = {p.name for p in tmp_path.iterdir() if p.name.startswith(f".{out.name}")}
        assert left <= ({f".{out.name}.training"} if was_killed else set()), left
    assert killed, "nothing was killed: the test shows nothing"
