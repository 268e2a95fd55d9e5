"""What runs on the card waits for it as seldom as can be, and gives what the CPU gives."""

import copy
from dataclasses import replace

import pytest
import torch
from accelerate import data_loader

from slimvlm.core.errors import DataError
from slimvlm.models.anatomy import read_anatomy
from slimvlm.pruning.repair import refit
from slimvlm.pruning.walk.walk import walk_
from slimvlm.scoring.moments import Moments
from slimvlm.scoring.obs import removal_order
from slimvlm.training import recover as recovery
from slimvlm.training.trainer import SUPERVISION, DistillationTrainer, num_workers
from tests import tiny
from tests import tiny_folder as folders
from tests.gpu.alike import config, llava, pretended
from tests.handmade import Stopped, plan_by_hand
from tests.pretended_gpu import waits_of
from tests.tolerances import FORWARD, SOLVE, assert_close


def drawn(channels, outputs=20):
    """A matrix and the Gram matrix of correlated inputs, float64."""
    generator = torch.Generator().manual_seed(3)
    mix, x = (
        torch.randn(rows, channels, generator=generator, dtype=torch.float64)
        for rows in (channels, 3 * channels)
    )
    matrix = torch.randn(outputs, channels, generator=generator, dtype=torch.float64)
    return matrix, (x @ mix).T @ (x @ mix)


# Elimination
@pytest.mark.parametrize(("units", "width"), [(192, 1), (48, 4), (3, 64)])
@pytest.mark.parametrize("share", [0.4, 0.9])
def test_the_card_removes_the_same_units(units, width, share, card):
    matrix, gram = drawn(units * width)
    stop = int(units * share)
    expected = removal_order(matrix, gram, units, stop)
    found = removal_order(matrix.to(card), gram.to(card), units, stop)
    assert found.order.tolist() == expected.order.tolist()
    assert found.left.tolist() == expected.left.tolist()
    for name in ("costs", "prices", "weights"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert ours.device == card
        assert_close(ours.cpu() / theirs.abs().max(), theirs / theirs.abs().max(), SOLVE)


@pretended
@pytest.mark.parametrize("width", [1, 4, 64])
def test_an_elimination_waits_for_blocks_of_units(width, card):
    channels = 256
    matrix, gram = (each.to(card) for each in drawn(channels))
    units = channels // width
    begun = waits_of(lambda: removal_order(matrix, gram, units, stop=0))
    whole = waits_of(lambda: removal_order(matrix, gram, units))
    assert begun <= 8
    assert whole - begun <= channels // 5


# Refits
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("has_residuals", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_card_finds_the_same_weights(has_bias, has_residuals, dtype, card):
    generator = torch.Generator().manual_seed(5)
    inputs, residuals = (torch.randn(300, n, generator=generator) for n in (24, 10))
    weights = torch.rand(300, generator=generator).round(decimals=1)
    weight = torch.randn(10, 24, generator=generator).to(dtype)
    bias = torch.randn(10, generator=generator).to(dtype) if has_bias else None
    keep = torch.arange(0, 24, 2)

    def found(device):
        moments = Moments.zero(24, 10 if has_residuals else None, device=device)
        given = [inputs, weights, *([residuals] if has_residuals else [])]
        moments.add(*(each.to(device) for each in given))
        its_bias = None if bias is None else bias.to(device)
        return refit(weight.to(device), its_bias, moments, keep.to(device), ridge=1e-3)

    ours, theirs = found(card), found(torch.device("cpu"))
    assert ours.weight.device == card
    assert_close(ours.weight.cpu(), theirs.weight, FORWARD)
    if has_bias:
        assert_close(ours.bias.cpu(), theirs.bias, FORWARD)
    assert ours.sliced_error == pytest.approx(theirs.sliced_error, rel=1e-4)
    assert ours.repaired_error == pytest.approx(theirs.repaired_error, rel=1e-4)


@pretended
def test_a_refit_waits_as_often_for_a_large_matrix_as_for_a_small_one(card):
    def waits(size):
        inputs, weight = torch.randn(2 * size, size, device=card), torch.randn(size, size).to(card)
        moments = Moments.zero(size, device=card)
        keep = torch.arange(0, size, 2, device=card)
        weights = torch.ones(2 * size, device=card)

        def run():
            moments.add(inputs, weights)
            refit(weight, None, moments, keep, ridge=1e-3)

        return waits_of(run)

    assert waits(16) == waits(128) <= 16


# Local steps
@pretended
def test_a_local_step_does_not_wait(card):
    model = tiny.build("llava-llama")
    plan = plan_by_hand(read_anatomy(model), [0, 1, 3], [0, 2], range(64))
    data = [{k: v.to(card) for k, v in tiny.batch(model, 6, seed).items()} for seed in range(3)]
    model.to(card)

    def waits(steps):
        student = copy.deepcopy(model)
        options = {"plan": plan, "repair": "none", "held_out": data[:1]}
        return waits_of(lambda: walk_(student, data[1:], local_steps=steps, **options))

    waits(1)
    assert waits(2) == waits(7)


# Recovery

SAMPLES = folders.short_samples(8)


def trained(device, workers, monkeypatch, samples=SAMPLES, work=None, stop=None):
    """Losses and weights of a student, which so many processes put batches together for."""
    honest = DistillationTrainer.training_step

    def step(self, *args, **kwargs):
        if self.state.global_step == stop:
            raise Stopped
        return honest(self, *args, **kwargs)

    monkeypatch.setattr(recovery, "num_workers", lambda device: workers)

    model, processor = llava()
    how = {"learning_rate": 5e-3, "lora": {"lora_dropout": 0.1}, "max_steps": 6}
    given = samples, config(**how, trainer={"logging_steps": 1, "save_steps": 2}), processor, work
    with monkeypatch.context() as patch:
        patch.setattr(DistillationTrainer, "training_step", step)
        history = recovery.recover(model.to(device), None, *given)
    weights = {name: value.cpu() for name, value in model.state_dict().items()}
    return [float(row["loss"]) for row in history.steps], weights


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine with one core
def test_batches_from_other_processes_are_the_same(card, monkeypatch, tmp_path):
    """Their order, too; and a training that was stopped in its second epoch goes on the same."""
    assert num_workers(torch.device("cpu")) == 0
    losses, weights = trained(card, 0, monkeypatch)
    with pytest.raises(Stopped):
        trained(card, 2, monkeypatch, work=tmp_path, stop=5)
    for work in (None, tmp_path):
        found = trained(card, 2, monkeypatch, work=work)
        assert found[0] == losses
        assert all(torch.equal(value, weights[name]) for name, value in found[1].items())


@pytest.mark.slow
def test_what_another_process_refuses_is_said_in_one_line(card, monkeypatch, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    samples = [replace(sample, images=(broken,)) for sample in SAMPLES]
    told = set[str]()
    for workers in (1, 0):
        with pytest.raises(DataError) as refused:
            trained(card, workers, monkeypatch, samples)
        told.add(str(refused.value))
    (line,) = told
    assert len(line.splitlines()) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_pinned_and_sent_without_waiting(workers, card, monkeypatch):
    honest, seen = data_loader.send_to_device, list[tuple[bool, ...]]()

    def sent(batch, device, non_blocking):
        pinned = (batch[SUPERVISION][name].is_pinned() for name in ("labels", "compared"))
        seen.append((non_blocking, *pinned))
        return honest(batch, device, non_blocking)

    monkeypatch.setattr(data_loader, "send_to_device", sent)
    trained(card, workers, monkeypatch)
    assert seen == [(True, True, True)] * max(len(seen), 6)
