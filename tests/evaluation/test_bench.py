"""Benchmarks: two models in turn, and their ratio against the ideal."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from slimvlm.core.errors import ConfigError
from slimvlm.core.options import Workload
from slimvlm.evaluation import bench as speed
from slimvlm.evaluation.bench import bench, bench_rows
from slimvlm.evaluation.timing import Timing
from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.cost import weight_bytes
from slimvlm.pruning.cut import prune_
from tests import tiny
from tests.handmade import plan_by_hand

SMALL = Workload(prompt_tokens=8, new_tokens=3, batch_sizes=(1, 2), repeats=2)


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    """A model without every second layer and a part of its neurons, and the whole one."""
    small, large = tiny.build("llava-llama"), tiny.build("llava-llama")
    prune_(small, plan_by_hand(read_anatomy(small), layers=(0, 2), neurons=range(77)))
    return small, large


def test_a_speed_up_is_the_median_of_neighbouring_ratios(
    models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = [Timing(10.0 * slow, (2.0 * slow,)) for slow in (1.0, 50.0, 1.0)]
    slow = [Timing(r.prefill_ms * 3, (r.decode_ms * 2,)) for r in fast]
    monkeypatch.setattr(speed, "timed_runs", lambda *_: [fast, slow])
    found = bench(*models, SMALL).speed_ups
    assert [s.batch_size for s in found] == [1, 2]
    assert all(s.prefill == pytest.approx(3) and s.decode == pytest.approx(2) for s in found)
    assert all(s.prefill_share == pytest.approx(3 / s.prefill_ideal) for s in found)


def test_the_ideal_of_half_the_layers_is_between_one_and_two() -> None:
    small, large = tiny.build("llama"), tiny.build("llama")
    prune_(small, plan_by_hand(read_anatomy(small), layers=(0, 3)))
    (found,) = bench(small, large, replace(SMALL, batch_sizes=(1,), repeats=1)).speed_ups
    assert 1.5 < found.prefill_ideal < 2
    assert 1.5 < found.decode_ideal < 2


def test_figures_of_a_benchmark(models: tuple[Any, Any]) -> None:
    result = bench(*models, SMALL, ("small", "large"))
    assert (result.model.model, result.baseline and result.baseline.model) == ("small", "large")
    shape = read_anatomy(models[0])
    assert result.model.total_params == shape.total_params
    assert result.model.weight_bytes == weight_bytes(shape, "float32")
    assert result.model.speeds[1].peak_bytes > result.model.speeds[0].peak_bytes
    assert result.model.speeds[0].peak_bytes > result.model.weight_bytes
    assert any("77" in line for line in result.model.warnings)
    header, rows = bench_rows(result)
    assert header == ["", "large", "small", "speed-up", "ideal", "share of ideal"]
    assert all(len(row) == len(header) for row in rows)
    values = json.loads(json.dumps(result.to_dict()))
    assert values["speed_ups"][0]["prefill_share"] == result.speed_ups[0].prefill_share


def test_a_benchmark_of_one_model(models: tuple[Any, Any]) -> None:
    result = bench(models[0], workload=SMALL)
    assert (result.baseline, result.speed_ups) == (None, ())
    header, rows = bench_rows(result)
    assert all(len(row) == len(header) == 2 for row in rows)


@pytest.mark.parametrize(
    "wrong", [{"prompt_tokens": 0}, {"new_tokens": 2}, {"repeats": 0}, {"batch_sizes": (0,)}]
)
def test_a_workload_out_of_range_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Workload(**wrong)
