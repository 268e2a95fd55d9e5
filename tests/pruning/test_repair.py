"""Repair of pruned models: exact where it can be, never worse where it is fitted or judged."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from slimvlm.core.errors import ConfigError, DataError, NumericalError
from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.classes import auto_class
from slimvlm.models.parts import decoder_layers, final_norm
from slimvlm.planning.plan import Plan
from slimvlm.pruning.cut import prune_
from slimvlm.pruning.layerwise.calls import record_calls
from slimvlm.pruning.repair import answer_loss, prune_and_repair_, repair_
from slimvlm.scoring.inputs import capture_grams
from slimvlm.scoring.statistics import Grams, Weights
from tests import tiny
from tests.handmade import assert_untouched, logits, padded, plan_by_hand, snapshot
from tests.tolerances import SOLVE, assert_close

FAMILIES = ["llama", "mistral", "phi", "phi3", "gemma3", "qwen2_5_vl", "qwen3_vl", "llava-phi"]
HEADS_STAY = ("qwen2_vl", "qwen2_5_vl")
Batch = dict[str, Tensor]


def doubled(batch: Batch) -> Batch:
    return {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


def build(name: str) -> PreTrainedModel:
    return tiny.build(name).double()


def batches(model: PreTrainedModel, count: int = 6, tokens: int = 24) -> list[Batch]:
    return [doubled(tiny.batch(model, tokens, seed)) for seed in range(count)]


def narrow(model: PreTrainedModel, layers: Sequence[int] | None = None) -> Plan:
    """Half of the KV groups (where they may go), two thirds of the neurons."""
    anatomy = read_anatomy(model)
    fixed = model.config.model_type in HEADS_STAY
    groups = None if fixed else range(0, anatomy.layers[0].num_kv_heads, 2)
    return plan_by_hand(anatomy, layers, groups, range(64))


@torch.no_grad()
def final_hidden(model: Any, data: Sequence[Batch]) -> Tensor:
    inputs = [{k: v for k, v in batch.items() if k != "labels"} for batch in data]
    outputs = [model.base_model(**x, use_cache=False).last_hidden_state for x in inputs]
    return torch.cat([output.flatten(0, 1) for output in outputs])


def repaired(model: PreTrainedModel, plan: Plan, *args: Any, **options: Any) -> PreTrainedModel:
    student = copy.deepcopy(model)
    prune_and_repair_(student, plan, *args, **options)
    return student


def sliced(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    student = copy.deepcopy(model)
    prune_(student, plan)
    return student


@pytest.mark.parametrize("name", FAMILIES)
def test_repair_comes_nearer_and_stays_a_standard_checkpoint(name: str, tmp_path: Path) -> None:
    model = build(name)
    data = batches(model)
    goal = final_hidden(model, data)
    plan = narrow(model, [0, 1, 3])
    student = copy.deepcopy(model)
    report = prune_and_repair_(student, plan, data, "both", ridge=1e-3)
    error = (final_hidden(student, data) - goal).square().sum()
    assert error < 0.75 * (final_hidden(sliced(model, plan), data) - goal).square().sum()
    assert all(after < before for before, after in report.errors.values())
    assert "\n" not in report.summary()
    student.save_pretrained(tmp_path)
    again = auto_class(student.config).from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert torch.equal(logits(again, data[0]), logits(student, data[0]))


def blind(batch: Batch) -> Batch:
    """A batch without its picture."""
    return {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}


@torch.no_grad()
def assert_layer_by_layer_is_the_model(model: PreTrainedModel, data: Sequence[Batch]) -> None:
    seen: list[Tensor] = []
    handle = final_norm(model).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    final_hidden(model, data)
    handle.remove()
    calls_of_batches, _ = record_calls(model, data, None)
    for calls, expected in zip(calls_of_batches, seen, strict=True):
        hidden = calls.hidden
        for index, layer in enumerate(decoder_layers(model)):
            hidden = calls.through(layer, index, hidden)
        assert_close(hidden, expected, SOLVE)


@pytest.mark.parametrize("name", FAMILIES)
def test_walking_layer_by_layer_is_the_model(name: str) -> None:
    model = build(name)
    assert_layer_by_layer_is_the_model(model, batches(model, 2))


def test_layers_that_batches_without_pictures_skip_stay_as_they_are() -> None:
    """Mllama's cross-attention layers: 1 and 3."""
    model = build("mllama")
    data = list(map(blind, batches(model)))
    assert_layer_by_layer_is_the_model(model, data)
    report = prune_and_repair_(model, plan_by_hand(read_anatomy(model), range(4)), data, "depth")
    assert "no calibration batch runs layer 1, 3" in report.summary()


@pytest.mark.parametrize("form", ["none", "width", "depth", "both", "auto"])
def test_nothing_removed_changes_no_bit(form: str) -> None:
    model = tiny.build("llava-phi")
    data = [tiny.batch(model, 24, seed) for seed in range(6)]
    before = snapshot(model)
    prune_and_repair_(model, Plan.everything(read_anatomy(model)), data, form)
    assert_untouched(model, before)


@pytest.mark.parametrize("name", ["llama", "phi", "phi3", "qwen3_vl"])
def test_neurons_that_others_determine_are_replaced_exactly(name: str) -> None:
    """Copies of other neurons and, where there are biases, constant ones."""
    model = build(name)
    with torch.no_grad():
        for layer in decoder_layers(model):
            for path in ("gate_proj", "up_proj", "gate_up_proj", "fc1"):
                linear = getattr(layer.mlp, path, None)
                if linear is None:
                    continue
                for block in linear.weight.view(-1, 96, 64):
                    block[64:] = block[:32]
                if linear.bias is not None:
                    linear.bias[64:] = linear.bias[:32]
                    linear.weight[90:] = 0
    data = batches(model, 8)
    plan = plan_by_hand(read_anatomy(model), neurons=range(64))
    expected = logits(model, data[0])
    assert not torch.allclose(logits(sliced(model, plan), data[0]), expected, atol=1e-2)
    student = repaired(model, plan, data, "width", ridge=0.0)
    torch.testing.assert_close(logits(student, data[0]), expected, atol=1e-6, rtol=1e-6)
    statistics = capture_grams(model, data)
    student = sliced(model, plan)
    repair_(student, plan, statistics, ridge=0.0)
    torch.testing.assert_close(logits(student, data[0]), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["llama", "llava-phi"])
def test_one_shot_and_sequential_agree_where_their_inputs_do(name: str) -> None:
    model = build(name)
    data, plan = batches(model), narrow(model)
    weights = {"image": 0.5, "prompt": 1.0, "answer": 2.0}
    one_shot = sliced(model, plan)
    report = repair_(one_shot, plan, capture_grams(model, data, weights), ridge=1e-2)
    sequential = repaired(model, plan, data, "width", token_weights=weights, ridge=1e-2)
    path = "self_attn.dense" if "phi" in name else "self_attn.o_proj"
    first, later = (
        [decoder_layers(m)[i].get_submodule(path).weight for m in (one_shot, sequential)]
        for i in (0, 1)
    )
    assert_close(first[0], first[1], SOLVE)
    assert (later[0] - later[1]).abs().max() > 1e-3
    assert all(after < before for before, after in report.errors.values())


def test_padding_and_tokens_of_weight_zero_change_nothing() -> None:
    model = build("llava-llama")
    plan = narrow(model, [0, 1, 3])
    data = [doubled(tiny.batch(model, tokens, seed)) for seed, tokens in enumerate((24, 16, 20))]
    weights = {"answer": 0.0}
    student = repaired(model, plan, data, "both", token_weights=weights).state_dict()
    other = copy.deepcopy(data)
    for batch in other:  # answers come last: nothing before can see them
        answers = batch["labels"] != -100
        batch["input_ids"][answers] = 99
    for changed in (other, [padded(data)]):
        again = repaired(model, plan, changed, "both", token_weights=weights).state_dict()
        for name, value in student.items():
            torch.testing.assert_close(again[name], value, atol=1e-8, rtol=1e-8)
    unweighted = repaired(model, plan, data, "both").state_dict()
    assert any(not torch.allclose(unweighted[k], v, atol=1e-3) for k, v in student.items())


@pytest.mark.parametrize("layers", [None, [0, 1], [1, 2, 3]])
def test_auto_is_never_worse_than_slicing_on_held_out_answers(layers: list[int] | None) -> None:
    model = build("llama")
    data, judges = batches(model, 4), batches(model, 8)[4:]
    plan = narrow(model, layers)
    student = copy.deepcopy(model)
    report = prune_and_repair_(student, plan, data, "auto", held_out=judges)
    assert report.loss_sliced is not None
    assert report.loss_repaired is not None
    assert report.loss_repaired == pytest.approx(answer_loss(student, judges), abs=1e-12)
    assert report.loss_sliced == pytest.approx(answer_loss(sliced(model, plan), judges), abs=1e-9)
    assert report.loss_repaired <= report.loss_sliced
    full = repaired(model, plan, data, "both")
    assert report.loss_repaired <= answer_loss(full, judges)
    assert bool(report.notes) == (layers == [1, 2, 3])


def test_auto_refuses_a_repair_that_hurts() -> None:
    """Fitted on too few tokens, a repair helps there and nowhere else."""
    model = build("llama")
    data, judges = batches(model, 1, 8), batches(model, 8)[4:]
    plan = narrow(model)
    spoilt = repaired(model, plan, data, "both", ridge=0.0)
    student = copy.deepcopy(model)
    report = prune_and_repair_(student, plan, data, "auto", ridge=0.0, held_out=judges)
    assert report.loss_repaired is not None
    assert report.loss_repaired < answer_loss(spoilt, judges)
    assert min(report.kept.values()) < 1


def test_a_norm_behind_the_mlp_keeps_its_seam() -> None:
    model = build("gemma3")
    data, plan = batches(model), plan_by_hand(read_anatomy(model), [0, 1, 3])
    student = copy.deepcopy(model)
    report = prune_and_repair_(student, plan, data, "depth")
    assert len(report.notes) == 1
    assert "layer 1" in report.notes[0]
    before = sliced(model, plan).state_dict()
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"repair": "all"}, ConfigError, "repair 'all'"),
        ({"ridge": -1.0}, ConfigError, "ridge -1.0"),
        ({"token_weights": {"sky": 1.0}}, ConfigError, "'sky'"),
        ({"batches": []}, DataError, "5 calibration batches"),
        ({"batches": [], "repair": "width"}, DataError, "no calibration batch"),
    ],
)
def test_mistakes_leave_the_model_alone(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = tiny.build("llama")
    before, plan = snapshot(model), narrow(model)
    data = [tiny.batch(model, 12, seed) for seed in range(5)]
    with pytest.raises(error, match=message):
        prune_and_repair_(model, plan, **{"batches": data, **options})
    assert_untouched(model, before)


def test_infinity_is_named_with_its_layer_and_the_model_stays() -> None:
    model = tiny.build("llama")
    data, plan = [tiny.batch(model, 12, seed) for seed in range(3)], narrow(model)
    decoder_layers(model)[2].mlp.up_proj.weight.data[5] = torch.inf
    before = snapshot(model)
    with pytest.raises(NumericalError, match=r"2\.mlp\.down_proj"):
        prune_and_repair_(model, plan, data, "width")
    assert_untouched(model, before)


def test_one_shot_refuses_what_does_not_fit() -> None:
    model = tiny.build("llama")
    plan, data = narrow(model), [tiny.batch(model)]
    with pytest.raises(ConfigError, match="'weights'"):
        repair_(model, plan, Weights(parts={}))
    statistics = capture_grams(model, data)
    with pytest.raises(ConfigError, match="prune it first"):
        repair_(model, plan, statistics)
    prune_(model, plan)
    with pytest.raises(ConfigError, match="o_proj"):
        repair_(model, plan, Grams(parts={}, weight=torch.zeros((), dtype=torch.float64)))


def test_half_precision_stays() -> None:
    model = tiny.build("llama").bfloat16()
    data = [tiny.batch(model, 24, seed) for seed in range(6)]
    plan = narrow(model, [0, 1, 3])
    goal = final_hidden(model, data).float()
    student = repaired(model, plan, data, "both")
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}
    errors = [
        (final_hidden(m, data).float() - goal).square().sum()
        for m in (student, sliced(model, plan))
    ]
    assert errors[0] < 0.75 * errors[1]
