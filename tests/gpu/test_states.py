"""Where a walk keeps hidden states changes nothing but memory, and is decided from free memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slimvlm.models.anatomy import read_anatomy
from slimvlm.pruning.walk.distil import LocalSteps
from slimvlm.pruning.walk.engine import WalkConfig
from slimvlm.pruning.walk.layer import Steps
from slimvlm.pruning.walk.result import Walked
from slimvlm.pruning.walk.walk import plans_for, walk
from slimvlm.scoring.layerwise.runner import Live
from slimvlm.scoring.layerwise.stores import Memory, Scratch, StatesPlace, Store
from slimvlm.scoring.unit_scores import Scores
from tests import pretended_gpu, tiny
from tests.handmade import random_scores

STEPS = Steps(repair="auto", local=LocalSteps(count=2))
CPU = torch.device("cpu")


def walked(name: str, device: torch.device, store: Store) -> tuple[Walked, int]:
    """A walk along both axes, and the most bytes that the card held meanwhile."""
    model = tiny.build(name).to(device)
    data = [tiny.batch(model, 40, seed) for seed in range(8)]
    anatomy = read_anatomy(model)
    scores = Scores("by-hand", layer=random_scores(anatomy).layer)
    chosen = plans_for(anatomy, [scores], 0.3, "both", "balanced")
    if device.type != "cpu":
        torch.get_device_module(device).reset_peak_memory_stats()
    found = walk(
        Live(model), WalkConfig(*chosen, data[:-2], data[-2:], STEPS), device, Memory(CPU), store
    )
    peak = 0 if device.type == "cpu" else torch.get_device_module(device).max_memory_allocated()
    return found, peak


@pytest.mark.parametrize("name", ["llava-llama", "qwen3_vl"])
def test_every_place_gives_the_same_walk(name: str, card: torch.device, tmp_path: Path) -> None:
    expected, _ = walked(name, CPU, Memory())
    peaks = {}
    for store in (Memory(), Memory(CPU), Scratch(tmp_path / "states")):
        found, peaks[type(store), getattr(store, "device", None)] = walked(name, card, store)
        assert found.plan == expected.plan
        assert found.weights.keys() == expected.weights.keys()
        for place, value in expected.weights.items():
            torch.testing.assert_close(found.weights[place], value, rtol=1e-3, atol=1e-5)
    assert peaks[Memory, CPU] < peaks[Memory, None]
    assert peaks[Scratch, None] < peaks[Memory, None]


def test_host_memory_is_pinned_and_comes_back_as_it_was(card: torch.device) -> None:
    store, value = Memory(CPU, pinned=True), torch.randn(3, 4, device=card)
    kept = store.held(value)
    assert kept.device == CPU
    assert kept.is_pinned()
    store.write("states", 0, {"hidden": value})
    assert torch.equal(store.read("states", 0, card)["hidden"], value)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Bytes that are said to be free, by kind of device."""
    from slimvlm.scoring.layerwise import stores

    found = {"cpu": 8000, "cuda": 4000}
    monkeypatch.setattr(stores, "free_memory", lambda device: found[device.type])
    return found


def test_the_first_place_with_room_is_taken(free: dict[str, int]) -> None:
    card = torch.device("cuda", 0)
    assert [StatesPlace.of(n, card).kind for n in (1000, 1001, 4000, 4001)] == [
        *("device", "host", "host", "files"),
    ]
    assert [StatesPlace.of(n, CPU).kind for n in (1000, 4000, 4001)] == ["host", "host", "files"]
    free.update(cuda=4 << 30, cpu=20 << 30)
    assert str(StatesPlace.of(3 << 30, card)) == (
        "3.00 GiB in host memory (4.00 GiB free on cuda:0, 20.00 GiB free on the host)"
    )


def test_a_full_card_keeps_states_on_the_host(card: torch.device) -> None:
    if pretended_gpu.REASON is not None:
        pytest.skip(pretended_gpu.REASON)
    model = tiny.build("llama").to(card)
    data = [tiny.batch(model, 40, seed) for seed in range(8)]
    chosen = plans_for(read_anatomy(model), [], 0.3, "width", "uniform")
    said: list[str] = []
    walks = []
    for room in (10 << 20, 1 << 20):
        with pretended_gpu.limit(room):
            config = WalkConfig(*chosen, data[:-2], data[-2:], STEPS)
            walks.append(walk(Live(model), config, card, Memory(CPU), say=said.append))
    assert "on cuda:0 (" in said[0]
    assert "in host memory (" in said[1]
    assert walks[0].plan == walks[1].plan
