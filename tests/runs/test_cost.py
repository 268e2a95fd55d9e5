"""Estimates grow with what they rest on, and count what really learns and is kept."""

import time
from dataclasses import replace
from functools import partial
from itertools import count

import pytest
import torch

from slimvlm.core.options import CompressConfig, RecoverConfig
from slimvlm.models.cost import Picture, question_flops
from slimvlm.models.devices import usable_cores
from slimvlm.models.load import anatomy
from slimvlm.runs import cost as module
from slimvlm.runs.cost import (
    Sizes,
    cost,
    device_flops,
    kept_bytes,
    learning_params,
    stage_flops,
)
from slimvlm.runs.recipe import decide
from slimvlm.training.trainer import prepare_training
from tests import tiny
from tests import tiny_folder as folders

MODEL = str(folders.folder("text"))
SHOWN = Picture(17, 17, 16, 16)
SPEEDS = {torch.float32: 1e10, torch.bfloat16: 4e10}


def cost_of(recover=None, dtype="float32", **sizes):
    config = CompressConfig(ratio=0.4, axis="width", data="demo", recover=recover)
    sizes = Sizes(shape=anatomy(MODEL), **{"tokens": 100.0, "samples": 80, **sizes})
    return cost(decide(MODEL, config), sizes, torch.device("cpu"), dtype)


@pytest.fixture(autouse=True)
def speed(monkeypatch):
    monkeypatch.setattr(module, "device_flops", lambda device, dtype: SPEEDS[dtype])


def test_other_work_on_the_machine_does_not_change_the_speed(monkeypatch):
    """While a core does other work, a clock goes on and the probe's processor time does not."""
    threads = torch.get_num_threads()

    def flops(of_the_clock):
        readings = {"thread_time": 0.02, "perf_counter": of_the_clock}
        for name, step in readings.items():
            monkeypatch.setattr(time, name, partial(next, count(0, step)))
        device_flops.cache_clear()
        return device_flops(torch.device("cpu"), torch.float32)

    idle, busy = flops(0.02 / threads), flops(60.0)
    device_flops.cache_clear()
    assert busy == idle == pytest.approx(usable_cores() * 2 * 1024**3 / 0.02)
    assert torch.get_num_threads() == threads


def test_weights_of_another_type_take_another_time_and_fewer_tokens_less():
    slow, fast = (cost_of(RecoverConfig(), dtype) for dtype in ("float32", "bfloat16"))
    assert slow.pruning_hours == pytest.approx(4 * fast.pruning_hours)
    assert slow.training_hours == fast.training_hours  # which computes in bfloat16 in any case
    shape = anatomy(MODEL)
    whole = Sizes(shape=shape, tokens=100.0, samples=8)
    fewer = replace(whole, vocabulary=shape.vocab_size // 3)
    assert fewer.decoder_share(0.4) < whole.decoder_share(0.4)
    assert fewer.decoder_share(fewer.token_share) == pytest.approx(0)
    assert cost_of(vocabulary=shape.vocab_size // 3).pruning_hours < cost_of().pruning_hours


@pytest.mark.parametrize(
    ("axis", "criterion", "passes"),
    [("width", "obs", 0), ("depth", "block_influence", 1), ("width", "taylor", 3)],
)
def test_criteria_cost_passes_over_the_samples(axis, criterion, passes):
    config = CompressConfig(ratio=0.4, axis=axis, criterion=(criterion,), data="demo")
    request = decide(MODEL, config)
    sizes = Sizes(shape=anatomy(MODEL), tokens=100.0, samples=80, calibration=12)
    found = stage_flops("calibrate", request, sizes)
    assert found == pytest.approx(passes * 12 * sizes.pass_flops)


def test_a_training_costs_what_it_is_asked_for():
    def hours(**options):
        config = RecoverConfig(train="lora", loss="sft", batch_size=4, **options)
        return cost_of(config).training_hours

    whole = hours()
    assert hours(fraction=0.25) == pytest.approx(whole / 4)
    assert hours(epochs=3) == pytest.approx(3 * whole)
    assert hours(max_steps=5) == pytest.approx(whole / 4)


def test_a_task_has_the_questions_of_its_file_and_no_more_than_it_has(tmp_path):
    (tmp_path / "q.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n' * 3)
    (tmp_path / "own.yaml").write_text(
        "{name: own, data: q.jsonl, prompt: '{question}', answer: answer}"
    )
    assert module.questions_of(f"{tmp_path}/own.yaml,presence", None) == 3 + 320
    assert module.questions_of("presence,gqa", 500) == 320 + 500


def test_batches_are_as_long_as_their_longest_sample():
    """One long sample among short ones takes the memory of long ones, and no more time."""
    short, mixed, long, shown = (
        cost_of(RecoverConfig(bf16=False), **given)
        for given in ({}, {"longest": (0.0, 900.0)}, {"tokens": 900.0}, {"longest": (900.0, 0.0)})
    )
    assert shown.training_bytes == short.training_bytes  # only calibrates, as general text does
    assert mixed.training_bytes == long.training_bytes > short.training_bytes
    assert mixed.training_hours == short.training_hours < long.training_hours


@pytest.mark.parametrize("train", ["projector", "lora", "full"])
def test_learning_parameters_are_those_that_learn(train):
    net = tiny.build("llava-llama")
    expected = learning_params(anatomy(net), 0.0, train, rank=4)
    trained = prepare_training(net, RecoverConfig(train=train, lora_rank=4))
    assert expected == sum(p.numel() for p in trained.parameters() if p.requires_grad)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(tiny.CONFIGS))
def test_what_a_backward_pass_keeps_is_counted_for_every_family(name):
    config = tiny.CONFIGS[name]()
    float32, bfloat16 = (kept_bytes(config, dtype) for dtype in ("float32", "bfloat16"))
    text = config.get_text_config()
    assert min(float32, bfloat16) > 4 * text.num_hidden_layers * text.hidden_size


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen2"])
def test_what_a_backward_pass_keeps_is_what_a_real_one_does(name):
    net = tiny.build(name)
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept = {}  # tensors stay alive, so that no address comes twice

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        net.base_model(input_ids=torch.randint(0, 9, (1, 64)), use_cache=False)
    real = sum(size for size, _ in kept.values()) / 64
    assert kept_bytes(net.config, "float32") == pytest.approx(real, rel=0.15)


def test_images_cost_the_tower_once_for_each_time_that_a_sample_is_read():
    """Not three times, as a backbone that learns; a teacher reads the image as well."""
    shape, model = anatomy(tiny.build("llava-llama")), str(folders.folder("llava"))
    without = Sizes(shape=shape, tokens=100.0, samples=8, calibration=6, picture=SHOWN)
    sizes = replace(without, images=2.0)
    each = 2 * sum(question_flops(shape, SHOWN)[:2])
    assert sizes.pass_flops - without.pass_flops == sizes.picture_flops == each > 0
    expected = {"calibrate": 6, "prune": 6 + 2 * 5, "recover": 2 * 8, "evaluate": 320}
    training = RecoverConfig(train="full", loss="kl+cosine", epochs=1.0)
    given = {"axis": "width", "criterion": ("taylor",), "data": "demo", "tasks": "presence"}
    recipe = decide(model, CompressConfig(ratio=0.4, recover=training, **given))
    recipe = replace(recipe, test_samples=5)
    for kind, times in expected.items():
        more = stage_flops(kind, recipe, sizes) - stage_flops(kind, recipe, without)
        assert more == pytest.approx(times * each), kind
    unknown = Sizes(shape=anatomy(tiny.build("perception_lm")), tokens=9.0, samples=8)
    told = cost(recipe, unknown, torch.device("cpu"), "float32").rests_on
    assert any("every parameter" in line for line in told)
