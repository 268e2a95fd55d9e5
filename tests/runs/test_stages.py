"""Several ratios in one run: prune, train, prune the rest, train."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from slimvlm.core.errors import ConfigError
from slimvlm.core.options import CompressConfig, RecoverConfig
from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.load import load
from slimvlm.planning.plan import Plan
from slimvlm.runs import compress as compression
from slimvlm.runs import stages
from slimvlm.runs.compress import compress
from slimvlm.training.recover import History
from tests import tiny_folder as folders

pytestmark = pytest.mark.usefixtures("unhurried")

CONFIG = CompressConfig(
    stages=(0.15, 0.3),
    axis="width",
    samples=8,
    local_steps=1,
    report_samples=0,
    recover=RecoverConfig(
        train="full", loss="kl", batch_size=2, learning_rate=5e-3, bf16=False, save_steps=1
    ),
    data="later",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.write_llava_data(tmp_path_factory.mktemp("data"), count=16)


def run(data: Path, out: Path, **changes: Any) -> None:
    config = replace(CONFIG, data=str(data), **changes)
    compress(str(folders.folder("llava")), config, out, say=silent)


def silent(line: str) -> None:
    """Nobody listens."""


@pytest.fixture(scope="module")
def staged(data: Path, unhurried: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "staged"
    run(data, out)
    return out


def test_the_plan_is_of_the_original_and_the_ratio_the_last_one(staged: Path) -> None:
    plan = Plan.load(staged / "plan.json")
    original, _ = load(folders.folder("llava"))
    assert plan.before == read_anatomy(original)
    assert plan.asked_ratio == 0.3
    assert plan.ratio == pytest.approx(0.3, abs=0.03)
    small, _ = load(staged / "checkpoint")
    assert read_anatomy(small).layers == plan.after.layers


def test_every_ratio_learns_from_samples_of_its_own(staged: Path, data: Path) -> None:
    """Eight of sixteen calibrate, so the last ratio has four of the others."""
    last = History.load(staged / "history.json")
    assert last.sample_ids == ("s12", "s13", "s14", "s15")
    assert not list(staged.glob("stage-*"))


def test_the_first_ratio_is_a_run_of_its_own(data: Path, tmp_path: Path) -> None:
    """What the second prunes is what a run with the first ratio alone leaves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compression, "finish", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(data, tmp_path / "staged")
    run(data, tmp_path / "alone", stages=(), ratio=0.15, training_samples=4)
    first, alone = (
        load_file(folder / "checkpoint" / "model.safetensors")
        for folder in (tmp_path / "staged" / "stage-1", tmp_path / "alone")
    )
    assert all(torch.equal(first[name], alone[name]) for name in alone)


def stopped(*args: Any, **kwargs: Any) -> None:
    raise KeyboardInterrupt


def test_a_stopped_run_goes_on(staged: Path, data: Path, tmp_path: Path) -> None:
    """Each time it is stopped after one more pruning or training, it ends with the same bits."""
    out = tmp_path / "out"
    for _ in range(3):
        with pytest.MonkeyPatch.context() as patch:
            done: list[str] = []
            for name in ("prune_", "recover_"):
                patch.setattr(stages, name, only_one(getattr(stages, name), done))
            with pytest.raises(KeyboardInterrupt):
                run(data, out)
            assert len(done) == 1
    run(data, out)
    found, whole = (load_file(f / "checkpoint" / "model.safetensors") for f in (out, staged))
    assert all(torch.equal(found[name], whole[name]) for name in whole)


def only_one(honest: Any, done: list[str]) -> Any:
    """A stage that is done if it is the first one of a run."""

    def stage(*args: Any, **kwargs: Any) -> Any:
        if done:
            raise KeyboardInterrupt
        done.append(honest.__name__)
        return honest(*args, **kwargs)

    return stage


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": (0.3, 0.15)}, "must rise"),
        ({"stages": (0.0, 0.3)}, "above 0"),
        ({"ratio": 0.5}, "must end at the ratio, 0.5"),
        ({"recover": None}, "need training"),
        ({"data": None}, "need training and data"),
    ],
)
def test_stages_that_lead_nowhere_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(CONFIG, **{"ratio": None, **changes})
