"""Public functions with a model on the card, and batches there or on the CPU."""

import copy
from functools import cache

import pytest
import torch

import slimvlm as sv
from slimvlm.evaluation.on_data import Predictions, predictions_of, result_of
from slimvlm.models.hidden import HeadWeights, head_weights_of
from slimvlm.models.losses import CHUNK, rows_at_once
from tests import pretended_gpu, tiny
from tests import tiny_folder as folders
from tests.gpu.alike import assert_close, config, llava, pretended
from tests.handmade import Watched, changed_copy, plan_by_hand


@cache
def original():
    """A tiny model that sees, on the CPU. Tests must not change it."""
    return tiny.build("llava-llama")


def batches(device="cpu"):
    made = [tiny.batch(original(), 12 + 3 * seed, seed) for seed in range(2)]
    return [{name: value.to(device) for name, value in batch.items()} for batch in made]


def repaired(model, given):
    plan = plan_by_hand(sv.anatomy(model), neurons=range(64))
    statistics = sv.collect(model, given, "obs")
    sv.prune_(model, plan)
    sv.repair_(model, plan, statistics)
    return plan


@pytest.mark.parametrize("where", ["card", "cpu"])
def test_a_repair_in_one_shot(where, card):
    """Whether batches are on the card or on the CPU."""
    here, there = copy.deepcopy(original()), copy.deepcopy(original()).to(card)
    plan = repaired(here, batches())
    assert repaired(there, batches(card if where == "card" else "cpu")) == plan
    assert_close(there.state_dict(), here.state_dict())


def learnt(device, share):
    """Weights that a pruned model on a device learns from a teacher on the CPU."""
    teacher, processor = llava()
    student = copy.deepcopy(teacher)
    plan = plan_by_hand(sv.anatomy(student), [0, 1, 3], [0, 2], [*range(0, 64, 2), *range(64, 80)])
    sv.prune_(student, plan)
    given = folders.short_samples(6), config(loss="sft+kl+cosine"), processor
    sv.recover(student.to(device), teacher, *given, plan=plan, share=share)
    assert {parameter.device.type for parameter in student.parameters()} == {device.type}
    return student.state_dict()


@pytest.mark.parametrize("share", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_teacher_on_the_cpu_teaches_the_same(share, card):
    assert_close(learnt(card, share), learnt(torch.device("cpu"), share))


@pytest.fixture(scope="module")
def pair():
    """A model, another one, and the processor of both, on the CPU. Tests must not change them."""
    model, processor = llava()
    return model, changed_copy(model), processor


@pytest.mark.parametrize("baseline", ["cpu", "kept"])
def test_evaluate_data(baseline, pair, card):
    """The baseline may be on the CPU, or gone."""
    model, other, processor = pair
    samples = folders.short_samples(5)
    there, theirs = (copy.deepcopy(each).to(card) for each in (model, other))
    beside = other
    if baseline == "kept":
        beside = predictions_of(theirs, processor, samples)
        assert {each.device.type for each in (*beside.states, *beside.wanted)} == {"cpu"}
    expected = sv.evaluate_data(model, processor, samples, other, batch_size=2)
    found = sv.evaluate_data(there, processor, samples, beside, batch_size=2)
    for ours, same in zip(found.samples, expected.samples, strict=True):
        assert vars(ours) == {
            name: pytest.approx(value, rel=1e-4, abs=1e-6) if isinstance(value, float) else value
            for name, value in vars(same).items()
        }


def test_what_was_said_lies_on_the_cpu_and_its_head_moves_once(pair, card, tmp_path):
    model, other, processor = pair
    samples = folders.short_samples(5)
    there = copy.deepcopy(other).to(card)
    said = predictions_of(there, processor, samples, head=head_weights_of(there))
    assert isinstance(said.head, HeadWeights)
    assert said.head.weight.device.type == "cpu"
    said.save(tmp_path / "said")
    smaller = copy.deepcopy(model).to(card)
    for kept in (said, Predictions.load(tmp_path / "said")):
        moved = []

        def look(func, given, made, moved=moved):
            if func is torch.ops.aten._to_copy.default and made[0].shape == said.head.weight.shape:
                moved.append(made[0].device.type != given[0].device.type)

        with Watched(look):
            sv.evaluate_data(smaller, processor, samples, kept, batch_size=1)
        assert sum(moved) == 1
        expected = sv.evaluate_data(other, processor, samples).samples
        for device in (torch.device("cpu"), card):
            found = result_of(kept, samples, device).samples
            assert [s.loss for s in found] == pytest.approx([s.loss for s in expected], rel=1e-4)


@pretended
def test_chunks_grow_with_the_free_memory_of_a_card_and_change_nothing(card):
    assert rows_at_once(torch.device("cpu")) == CHUNK
    assert rows_at_once(card) == 4 * CHUNK
    count = 5 * CHUNK
    weight, rows = torch.randn(50, 8), torch.randn(1, count, 8)
    labels = torch.randint(50, (1, count))
    found = []
    for size in (2**40, 2**30, 2**20):
        with pretended_gpu.limit(size):
            found.append(rows_at_once(card))
            hidden = rows.to(card).requires_grad_()
            head = HeadWeights(weight.to(card))
            loss = sv.losses.cross_entropy(hidden, head, labels)
            loss.backward()
            assert hidden.grad is not None
            same = rows.clone().requires_grad_()
            expected = sv.losses.cross_entropy(same, HeadWeights(weight), labels)
            expected.backward()
            torch.testing.assert_close(loss.cpu(), expected)
            torch.testing.assert_close(hidden.grad.cpu(), same.grad)
    assert found == [4 * CHUNK, 64, CHUNK // 4]
