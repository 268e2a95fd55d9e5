"""Random damage: to plans, options, and to runs in flight."""

import os
import random
import signal
import time
from typing import get_args, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimvlm import cli
from slimvlm.core.errors import SlimError
from slimvlm.core.options import PruneConfig, RecoverConfig
from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.load import load
from slimvlm.planning.plan import Plan
from slimvlm.pruning.cut import prune_
from slimvlm.pruning.save import PLAN_FILE, save
from tests import tiny, tiny_folder
from tests.handmade import assert_equal

KILLS = 3
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
@settings(max_examples=8)
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
def test_options_are_taken_or_named(kind, data):
    numbers = st.integers(-3, 10**9) | st.floats()
    texts = st.text(max_size=10) | st.sampled_from(["sft+hidden", "0.5*sft+kl", "kl+", "lora"])
    by_type = {int: st.integers(-3, 10**9), float: numbers, bool: st.booleans(), str: texts}
    hints = {name: (get_args(hint) or (hint,))[0] for name, hint in get_type_hints(kind).items()}
    name = data.draw(st.sampled_from([name for name, first in hints.items() if first in by_type]))
    refusal = refusal_of(lambda: kind(**{name: data.draw(by_type[hints[name]])}))
    assert refusal is None or name.split("_")[0] in refusal


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
