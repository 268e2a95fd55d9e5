"""Times of models that take turns, and the bytes of their tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from slimvlm.core.errors import ConfigError
from slimvlm.evaluation import timing
from slimvlm.evaluation.timing import (
    PairedTimes,
    PeakMemory,
    Timing,
    paired_times,
    plain_question,
    stored_bytes,
    timed_run,
    timed_runs,
    times_of,
)
from slimvlm.models.load import load
from tests import tiny_folder as folders


@pytest.fixture(scope="module")
def llava() -> tuple[Any, Any]:
    return load(folders.folder("llava"))


def slowing(monkeypatch: pytest.MonkeyPatch, speeds: dict[int, float]) -> None:
    """Let a machine take half as long again at each run."""
    order: list[int] = []

    def timed(model: Any, inputs: Any, new_tokens: int) -> Timing:
        order.append(id(model))
        slowness = 1.5 ** ((len(order) - 1) // 2)
        return Timing(slowness * speeds[id(model)], (slowness,))

    monkeypatch.setattr(timing, "timed_run", timed)


def test_a_machine_that_slows_down_slows_both(
    llava: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = llava
    other, _ = load(folders.folder("llava"))
    slowing(monkeypatch, {id(model): 3.0, id(other): 4.0})
    found = paired_times(model, processor, other, processor)
    shares = (found.prefill.value, found.prefill.low, found.prefill.high)
    assert shares == pytest.approx((0.75, 0.75, 0.75))
    low, high = found.pruned.prefill_range_ms
    assert high > 5 * low  # by itself, the model seems to take anything
    assert found.decode.value == pytest.approx(1)


def test_times_by_themselves_lie_within_their_runs(llava: tuple[Any, Any]) -> None:
    model, processor = llava
    found = times_of(model, processor, plain_question(processor))
    low, high = found.prefill_range_ms
    assert 0 < low <= found.prefill_ms <= high
    assert plain_question(processor).images
    assert not plain_question(folders.processor("text")).images


def test_times_survive_the_disk(llava: tuple[Any, Any], unhurried: None, tmp_path: Path) -> None:
    found = paired_times(*llava, *llava)
    assert found.prefill == timing.Share(1, 1, 1)
    found.save(tmp_path / "times.json")
    assert PairedTimes.load(tmp_path / "times.json") == found
    assert str(found) == (
        "reads a question in 1.00 [1.00, 1.00] of the original's time (2.2 ms), "
        "writes a token in 1.00 [1.00, 1.00] (1.0 ms)"
    )
    (tmp_path / "times.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"times '.*times\.json'"):
        PairedTimes.load(tmp_path / "times.json")


def test_a_run_times_every_token(llava: tuple[Any, Any]) -> None:
    ids = torch.full((1, 4), 40)
    run = timed_run(llava[0], {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 5)
    assert run.prefill_ms > 0
    assert len(run.step_ms) == 4
    assert min(run.step_ms) > 0
    assert run.total_ms == pytest.approx(run.prefill_ms + sum(run.step_ms))


def test_models_take_turns_forwards_and_backwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models: Any = ("small", "large")
    order = []

    def record(model: Any, inputs: Any, new_tokens: int) -> Timing:
        order.append((models.index(model), new_tokens))
        return Timing(1.0, (1.0,))

    monkeypatch.setattr(timing, "timed_run", record)
    runs = timed_runs(models, [{}, {}], 7, 3)
    assert order == [(0, 2), (1, 2), *((index, 7) for index in (0, 1, 1, 0, 0, 1))]
    assert [len(its) for its in runs] == [3, 3]


def test_the_peak_counts_what_is_alive_at_once() -> None:
    with PeakMemory() as memory:
        kept = torch.zeros(1000)
        for _ in range(5):
            torch.ones(2000).add_(1)
        view = kept.view(10, 100)
    assert view.shape == (10, 100)
    assert memory.peak_bytes == 4 * 3000


def test_weights_are_not_activations() -> None:
    model = nn.Linear(10, 10)
    with PeakMemory(model) as memory, torch.no_grad():
        model.weight.view(100)
    assert memory.peak_bytes == 0


def test_shared_weights_are_stored_once() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    assert stored_bytes(model) == 2 * 8 * 8 * 4
    model[1].weight = model[0].weight
    assert stored_bytes(model) == 8 * 8 * 4
