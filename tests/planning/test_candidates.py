"""KV groups against neurons: every number tried, the least divergent kept, no weight touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from slimvlm.planning.balance import Balance, PlanDivergence, balanced_plan
from transformers import AutoModelForCausalLM, MistralConfig, PreTrainedModel

from slimvlm.core.errors import ConfigError, DataError
from slimvlm.models import losses
from slimvlm.models.anatomy import read_anatomy
from slimvlm.planning.make import make_plan
from slimvlm.planning.plan import Plan
from slimvlm.pruning.cut import prune_
from tests import tiny
from tests.handmade import assert_untouched, logits, random_scores, snapshot

AXES = ("depth", "width", "both")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny.build("llava-llama")


@pytest.fixture(scope="module")
def batches(model: PreTrainedModel) -> list[dict[str, Any]]:
    return [tiny.batch(model, text_tokens=8 + 4 * i, seed=i) for i in range(2)]


def balanced(model: PreTrainedModel, batches: Any, axis: str = "width", **options: Any) -> Balance:
    scores = random_scores(read_anatomy(model))
    return balanced_plan(model, scores, batches, 0.25, axis, **options)


# What is measured


def test_the_divergence_is_the_kl_of_the_pruned_model_at_answer_positions(
    model: PreTrainedModel, batches: list[dict[str, Any]]
) -> None:
    plan = make_plan(read_anatomy(model), random_scores(read_anatomy(model)), 0.3, "both")
    pruned = tiny.build("llava-llama")
    prune_(pruned, plan)
    total, count = 0.0, 0
    for batch in batches:
        counted = (batch["labels"][:, 1:] != -100).nonzero()[:, 1]
        own, other = logits(model, batch)[:, counted], logits(pruned, batch)[:, counted]
        total += float(losses.divergence(other, own, temperature=1.0)) * len(counted)
        count += len(counted)
    measured = PlanDivergence(model, batches).of(plan)
    assert measured == pytest.approx(total / count, rel=1e-4)
    assert measured > 0


def test_the_original_does_not_diverge_and_padding_does_not_count(
    model: PreTrainedModel, batches: list[dict[str, Any]]
) -> None:
    everything = Plan.everything(read_anatomy(model))
    assert PlanDivergence(model, batches).of(everything) == 0
    batch = batches[0]
    fills = {"input_ids": 7, "attention_mask": 0, "labels": 7}
    longer = {name: F.pad(batch[name], (0, 3), value=fill) for name, fill in fills.items()}
    plan = make_plan(read_anatomy(model), random_scores(read_anatomy(model)), 0.3)
    padded = PlanDivergence(model, [{**batch, **longer}]).of(plan)
    assert padded == pytest.approx(PlanDivergence(model, [batch]).of(plan), rel=1e-4)


# The choice


def test_every_number_of_kv_groups_is_tried(
    model: PreTrainedModel, batches: list[dict[str, Any]]
) -> None:
    found = balanced(model, batches)
    assert [trial.name for trial in found.trials] == ["2 KV groups", "3 KV groups", "4 KV groups"]
    assert found.divergence == min(trial.divergence for trial in found.trials)
    assert found.plan.after.is_uniform
    assert PlanDivergence(model, batches).of(found.plan) == found.divergence


def test_many_numbers_of_kv_groups_come_coarsely_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best of a valley is found without a pass for every number."""
    config = MistralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=4,
    )
    model = AutoModelForCausalLM.from_config(config)
    anatomy = read_anatomy(model)
    legal = anatomy.legal_kv_heads()
    assert len(legal) == 32
    asked: list[int] = []

    def valley(self: PlanDivergence, plan: Plan) -> float:
        asked.append(len(plan.kv_groups[0]))
        return abs(len(plan.kv_groups[0]) - 21.0)

    monkeypatch.setattr(PlanDivergence, "of", valley)
    found = balanced_plan(
        model, random_scores(anatomy), [{"input_ids": torch.ones(1, 4, dtype=torch.long)}], 0.25
    )
    assert {len(kept) for kept in found.plan.kv_groups} == {21}
    assert len(asked) == len(set(asked)) == len(found.trials) < len(legal)


@pytest.mark.parametrize("axis", AXES)
def test_no_weight_is_touched_and_the_ratio_is_met(
    model: PreTrainedModel, batches: list[dict[str, Any]], axis: str
) -> None:
    before = snapshot(model)
    found = balanced(model, batches, axis)
    step = 0.25 if axis == "depth" else 0.05
    assert abs(found.plan.ratio - 0.25) <= step
    assert len(found.trials) == {"depth": 1, "width": 3, "both": 1}[axis]
    assert balanced(model, batches, axis) == found
    assert_untouched(model, before)


def test_protected_layers_and_kinds_are_left_alone(
    model: PreTrainedModel, batches: list[dict[str, Any]]
) -> None:
    found = balanced(model, batches, protect=(1, 0), units=("neuron",), round_to=2)
    assert {len(kept) for kept in found.plan.kv_groups} == {4}
    widths = [len(kept) for kept in found.plan.neurons]
    assert widths[0] == 96
    assert all(width % 2 == 0 for width in widths)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"allocation": "search"}, "allocation 'search' must be one of: uniform, protect"),
        ({"units": ("head",)}, "units"),
    ],
)
def test_wrong_requests_are_refused_before_a_pass(
    model: PreTrainedModel, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        balanced(model, [], **options)


def test_batches_without_labelled_tokens_are_refused(
    model: PreTrainedModel, batches: list[dict[str, Any]]
) -> None:
    nothing = {**batches[0], "labels": torch.full_like(batches[0]["labels"], -100)}
    for given in ([], [nothing]):
        with pytest.raises(DataError, match="no labelled token"):
            balanced(model, given)
