"""Times of models that take turns, bytes of their tensors, and their ratio against the ideal."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

from slimvlm.core.errors import ConfigError
from slimvlm.core.options import Workload
from slimvlm.data.chat import plain_question
from slimvlm.evaluation import bench as module
from slimvlm.evaluation.bench import (
    PairedTimes,
    PeakMemory,
    Side,
    bench,
    bench_rows,
    paired_times,
    stored_bytes,
    timed_run,
    timed_runs,
)
from slimvlm.evaluation.metrics import Estimate
from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.cost import weight_bytes
from slimvlm.models.load import load
from slimvlm.pruning.cut import prune_
from tests import tiny
from tests import tiny_folder as folders
from tests.handmade import plan_by_hand

SMALL = Workload(prompt_tokens=8, new_tokens=3, batch_sizes=(1, 2), repeats=2)


@pytest.fixture(scope="module")
def models():
    """A model without every second layer and a part of its neurons, and the whole one."""
    small, large = tiny.build("llava-llama"), tiny.build("llava-llama")
    prune_(small, plan_by_hand(read_anatomy(small), layers=(0, 2), neurons=range(77)))
    return small, large


def test_a_speed_up_is_the_median_of_ratios_and_half_the_layers_ideally_twice_as_fast(
    models, monkeypatch
):
    small, large = tiny.build("llama"), tiny.build("llama")
    prune_(small, plan_by_hand(read_anatomy(small), layers=(0, 3)))
    (found,) = bench(small, large, replace(SMALL, batch_sizes=(1,), repeats=1)).speed_ups
    assert 1.5 < found.prefill_ideal < 2
    assert 1.5 < found.decode_ideal < 2
    fast = [(10.0 * slow, 2.0 * slow) for slow in (1.0, 50.0, 1.0)]
    slow = [(read * 3, write * 2) for read, write in fast]
    monkeypatch.setattr(module, "timed_runs", lambda *_: [fast, slow])
    whole = bench(*models, SMALL)
    assert [s.tokens_per_second for s in whole.model.speeds] == [250, 500]  # 3 each in 12 ms
    found = whole.speed_ups
    assert [s.batch_size for s in found] == [1, 2]
    assert all(s.prefill == pytest.approx(3) and s.decode == pytest.approx(2) for s in found)
    assert all(s.prefill_share == pytest.approx(3 / s.prefill_ideal) for s in found)


def test_figures_of_a_benchmark_of_two_models_and_of_one(models):
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
    values = json.loads(json.dumps(asdict(result)))
    assert values["speed_ups"][0]["prefill_share"] == result.speed_ups[0].prefill_share
    precise = tiny.build("llama").double()
    found = bench(precise, tiny.build("llama"), replace(SMALL, batch_sizes=(1,), repeats=1))
    assert found.speed_ups[0].decode_ideal < 1  # it reads twice as much
    experts = Side("moe", read_anatomy(tiny.build("qwen3_moe")), "float32", 1000, 500)
    assert experts.bytes_for(1, 0) < experts.bytes_for(2, 0) < experts.bytes_for(999, 0) == 500
    result = bench(models[0], workload=SMALL)
    assert (result.baseline, result.speed_ups) == (None, ())
    header, rows = bench_rows(result)
    assert all(len(row) == len(header) == 2 for row in rows)


def test_a_question_with_an_image_is_timed_from_its_pixels(llava, monkeypatch):
    """Beside random prompts, for models and processors that take images."""
    model, processor = llava
    small, _ = load(folders.folder("llava"))
    prune_(small, plan_by_hand(read_anatomy(small), layers=(0, 2)))
    given = []
    timed = module.timed_run
    monkeypatch.setattr(module, "timed_run", lambda m, i, n: given.append({*i}) or timed(m, i, n))
    result = bench(small, model, replace(SMALL, batch_sizes=(1,)), processors=(processor,) * 2)
    assert sum("pixel_values" in names for names in given) == 2 * (1 + SMALL.repeats)
    ours, theirs = result.model, result.baseline
    gain, ideal = result.image_speed_up
    assert ideal == pytest.approx(theirs.image_flops / ours.image_flops)
    assert 1 < ideal < theirs.prefill_flops / ours.prefill_flops * 1.1  # the tower stays
    assert min(ours.image_ms, theirs.image_ms, gain) > 0
    header, rows = bench_rows(result)
    assert all(len(row) == len(header) for row in rows)
    names = [row[0].strip() for row in rows[-4:]]
    assert names == [
        "question with an image: prefill ms",
        *(f"{part} ms" for part in ("vision tower", "projector", "backbone")),
    ]
    assert all(sum(side.image_parts_ms) > 0 for side in (ours, theirs))
    assert min(*ours.image_parts_ms, *theirs.image_parts_ms) > 0
    alone = bench(model, workload=replace(SMALL, batch_sizes=(1,)), processors=(processor,))
    assert all(len(row) == 2 for row in bench_rows(alone)[1])
    text = bench(
        model, workload=replace(SMALL, batch_sizes=(1,)), processors=(processor.tokenizer,)
    )
    assert text.model.image_flops is None


@pytest.mark.parametrize(
    "wrong", [{"prompt_tokens": 0}, {"new_tokens": 2}, {"repeats": 0}, {"batch_sizes": (0,)}]
)
def test_a_workload_out_of_range_is_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Workload(**wrong)


@pytest.fixture(scope="module")
def llava():
    return load(folders.folder("llava"))


def test_models_take_turns_and_a_machine_that_slows_down_slows_both(llava, monkeypatch):
    model, processor = llava
    other, _ = load(folders.folder("llava"))
    speeds, order = {id(model): 3.0, id(other): 4.0}, list[int]()

    def timed(model, inputs, new_tokens):
        order.append(id(model))
        slowness = 1.5 ** ((len(order) - 1) // 2)
        return slowness * speeds[id(model)], slowness

    monkeypatch.setattr(module, "timed_run", timed)
    found = paired_times(model, processor, other, processor)
    shares = (found.prefill.value, found.prefill.low, found.prefill.high)
    assert shares == pytest.approx((0.75, 0.75, 0.75))
    low, high = found.pruned.prefill_range_ms
    assert high > 5 * low  # by itself, the model seems to take anything
    assert found.decode.value == pytest.approx(1)
    models = ("small", "large")
    order = []

    def record(model, inputs, new_tokens):
        order.append((models.index(model), new_tokens))
        return 1.0, 1.0

    monkeypatch.setattr(module, "timed_run", record)
    runs = timed_runs(models, [{}, {}], 7, 3)
    assert order == [(0, 2), (1, 2), *((index, 7) for index in (0, 1, 1, 0, 0, 1))]
    assert [len(its) for its in runs] == [3, 3]


def test_a_run_times_every_token_and_times_lie_within_their_runs(llava, tmp_path):
    ids = torch.full((1, 4), 40)
    run = timed_run(llava[0], {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 5)
    assert len(run) == 5
    assert min(run) > 0
    assert plain_question(llava[1]).images
    assert not plain_question(folders.processor("text")).images
    found = paired_times(*llava, *llava)
    low, high = found.pruned.prefill_range_ms
    assert 0 < low <= found.pruned.prefill_ms <= high
    found.save(tmp_path / "times.json")
    assert PairedTimes.load(tmp_path / "times.json") == found
    assert found.text is not None
    assert paired_times(*load(folders.folder("text")), *load(folders.folder("text"))).text is None
    old = json.loads((tmp_path / "times.json").read_text())
    del old["text"]  # as runs of an earlier version have it
    (tmp_path / "times.json").write_text(json.dumps(old))
    assert PairedTimes.load(tmp_path / "times.json") == replace(found, text=None)
    times = replace(found.pruned, prefill_ms=2.24, decode_ms=1.0)
    found = replace(found, pruned=times, prefill=Estimate(1, 1, 1), decode=Estimate(1), text=None)
    assert str(found) == (
        "prefills in 1.00 [1.00, 1.00] of the original's time (2.2 ms), "
        "decodes a token in 1.00 (1.0 ms)"
    )
    assert str(replace(found, text=Estimate(0.5))) == (
        "prefills a question with an image in 1.00 [1.00, 1.00] of the original's time (2.2 ms), "
        "without the image in 0.50, decodes a token in 1.00 (1.0 ms)"
    )
    (tmp_path / "times.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"times '.*times\.json'"):
        PairedTimes.load(tmp_path / "times.json")


def test_the_peak_counts_what_is_alive_and_shared_weights_once():
    with PeakMemory() as memory:
        kept = torch.zeros(1000)
        for _ in range(5):
            torch.ones(2000).add_(1)
        view = kept.view(10, 100)
    assert view.shape == (10, 100)
    assert memory.peak_bytes == 4 * 3000
    model = nn.Linear(10, 10)
    with PeakMemory(model) as memory, torch.no_grad():
        model.weight.view(100)
    assert memory.peak_bytes == 0  # weights are not activations
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    assert stored_bytes(model) == 2 * 8 * 8 * 4
    model[1].weight = model[0].weight
    assert stored_bytes(model) == 8 * 8 * 4
