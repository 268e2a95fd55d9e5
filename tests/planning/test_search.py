"""Searches and steps: seeded, resumable, never worse than where they began, no weight touched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from slimvlm.core.errors import ConfigError, DataError
from slimvlm.models import losses
from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.parts import projections
from slimvlm.planning.divergence import Divergence, Found
from slimvlm.planning.make import make_plan
from slimvlm.planning.mask import masked
from slimvlm.planning.plan import Plan
from slimvlm.planning.search import search_plan
from slimvlm.planning.steps import plan_in_steps, removed_last, silenced
from slimvlm.pruning.cut import prune_
from slimvlm.scoring.score_model import score
from tests import tiny
from tests.helpers import assert_untouched, logits, random_scores, snapshot

AXES = ("depth", "width", "both")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny.build("llava-llama")


@pytest.fixture(scope="module")
def batches(model: PreTrainedModel) -> list[dict[str, Any]]:
    return [tiny.batch(model, text_tokens=8 + 4 * i, seed=i) for i in range(2)]


def searched(model: PreTrainedModel, batches: Any, axis: str = "width", **options: Any) -> Found:
    scores = random_scores(read_anatomy(model))
    return search_plan(model, scores, batches, 0.25, axis, **options)


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
        total += float(losses.kl(other, own, temperature=1.0)) * len(counted)
        count += len(counted)
    measured = Divergence(model, batches).of(plan)
    assert measured == pytest.approx(total / count, rel=1e-4)
    assert measured > 0


def test_the_original_does_not_diverge_and_padding_does_not_count(
    model: PreTrainedModel, batches: list[dict[str, Any]]
) -> None:
    everything = Plan.everything(read_anatomy(model))
    assert Divergence(model, batches).of(everything) == 0
    batch = batches[0]
    fills = {"input_ids": 7, "attention_mask": 0, "labels": 7}
    longer = {name: F.pad(batch[name], (0, 3), value=fill) for name, fill in fills.items()}
    plan = make_plan(read_anatomy(model), random_scores(read_anatomy(model)), 0.3)
    padded = Divergence(model, [{**batch, **longer}]).of(plan)
    assert padded == pytest.approx(Divergence(model, [batch]).of(plan), rel=1e-4)


# The search


def test_every_number_of_kv_groups_is_tried(
    model: PreTrainedModel, batches: list[dict[str, Any]]
) -> None:
    found = searched(model, batches)
    assert [trial.name for trial in found.trials] == ["2 KV groups", "3 KV groups", "4 KV groups"]
    assert found.divergence == min(trial.divergence for trial in found.trials)
    assert found.plan.after.is_uniform
    assert Divergence(model, batches).of(found.plan) == found.divergence


@pytest.mark.parametrize("axis", AXES)
def test_a_search_over_layers_is_no_worse_than_its_start_and_meets_the_ratio(
    model: PreTrainedModel, batches: list[dict[str, Any]], axis: str
) -> None:
    before = snapshot(model)
    start = searched(model, batches, axis)
    found = searched(model, batches, axis, level="layer", passes=30)
    assert found.divergence < start.divergence
    assert len(found.trials) <= 30
    block = max(s.kv_group_params for s in found.plan.before.layers)
    step = 0.05 if axis == "depth" else block / found.plan.before.backbone_params
    assert abs(found.plan.ratio - 0.25) <= step
    assert_untouched(model, before)


def test_protected_layers_and_kinds_are_left_alone(
    model: PreTrainedModel, batches: list[dict[str, Any]]
) -> None:
    options: dict[str, Any] = {"protect": (1, 0), "units": ("neuron",), "round_to": 2}
    found = searched(model, batches, level="layer", passes=25, **options)
    assert {len(kept) for kept in found.plan.kv_groups} == {4}
    widths = [len(kept) for kept in found.plan.neurons]
    assert widths[0] == 96
    assert all(width % 2 == 0 for width in widths)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("axis", ["width", "both"])
def test_a_stopped_search_ends_as_if_it_had_not_been_stopped(
    model: PreTrainedModel,
    batches: list[dict[str, Any]],
    axis: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options: dict[str, Any] = {"level": "layer", "passes": 24, "seed": 3}
    whole = searched(model, batches, axis, **options)
    measure, calls = Divergence.of, []

    def counted(self: Divergence, plan: Plan) -> float:
        calls.append(plan)
        if len(calls) == 18:
            raise Stopped
        return measure(self, plan)

    monkeypatch.setattr(Divergence, "of", counted)
    state = tmp_path / "search.json"
    with pytest.raises(Stopped):
        searched(model, batches, axis, state_file=state, **options)
    assert len(json.loads(state.read_text())["divergence"]) == 17
    again = searched(model, batches, axis, state_file=state, **options)
    assert again == whole
    assert len(calls) == 18 + len(whole.trials) - 17


def test_the_seed_decides_the_moves(model: PreTrainedModel, batches: list[dict[str, Any]]) -> None:
    options: dict[str, Any] = {"level": "layer", "passes": 20}
    first, same, other = (searched(model, batches, seed=seed, **options) for seed in (0, 0, 1))
    assert first == same
    assert first.trials != other.trials


def test_a_state_file_of_another_search_is_refused(
    model: PreTrainedModel, batches: list[dict[str, Any]], tmp_path: Path
) -> None:
    state = tmp_path / "search.json"
    searched(model, batches, state_file=state)
    for changes in ({"seed": 1}, {"units": ("neuron",)}, {"protect": (1, 0)}):
        told = rf"state_file .*search\.json.* a search with other {min(changes)}\."
        with pytest.raises(ConfigError, match=told):
            searched(model, batches, state_file=state, **changes)
    with pytest.raises(ConfigError, match=r"a search with other batches\."):
        searched(model, batches[:1], state_file=state)
    state.write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        searched(model, batches, state_file=state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": "neuron"}, "level 'neuron' must be one of: uniform, layer"),
        ({"passes": 0}, "passes 0 must be at least 1"),
        ({"allocation": "global"}, "no option 'allocation'"),
        ({"units": ("head",)}, "units"),
    ],
)
def test_wrong_requests_are_refused_before_a_pass(
    model: PreTrainedModel, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        searched(model, [], **options)


def test_batches_without_labelled_tokens_are_refused(
    model: PreTrainedModel, batches: list[dict[str, Any]]
) -> None:
    nothing = {**batches[0], "labels": torch.full_like(batches[0]["labels"], -100)}
    for given in ([], [nothing]):
        with pytest.raises(DataError, match="no labelled token"):
            searched(model, given)


# Steps

CRITERIA: dict[str, dict[str, Any]] = {"block_influence": {}, "gate": {}}


@pytest.mark.parametrize("axis", AXES)
def test_one_step_is_the_plain_plan(
    model: PreTrainedModel, batches: list[dict[str, Any]], axis: str
) -> None:
    scores = [score(model, batches, name) for name in CRITERIA]
    plain = make_plan(read_anatomy(model), scores, 0.3, axis)
    assert plan_in_steps(model, batches, CRITERIA, 0.3, axis, 1) == plain


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("axis", AXES)
def test_what_is_gone_stays_gone(
    model: PreTrainedModel,
    batches: list[dict[str, Any]],
    axis: str,
    allocation: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import slimvlm.planning.steps as iterative

    masks: list[Plan] = []
    real = iterative.silenced

    def watched(model: PreTrainedModel, plan: Plan) -> Any:
        masks.append(plan)
        return real(model, plan)

    monkeypatch.setattr(iterative, "silenced", watched)
    before = snapshot(model)
    plan = plan_in_steps(model, batches, CRITERIA, 0.5, axis, 4, allocation=allocation)
    assert_untouched(model, before)
    assert len(masks) == 4
    assert masks[0].ratio == 0 < masks[-1].ratio <= plan.ratio
    for larger, smaller in zip(masks, [*masks[1:], plan], strict=True):
        assert set(smaller.layers) <= set(larger.layers)
        for unit in ("kv_groups", "neurons"):
            for kept, was in zip(getattr(smaller, unit), getattr(larger, unit), strict=True):
                assert set(kept) <= set(was)


@pytest.mark.parametrize("axis", AXES)
def test_silenced_units_leave_the_function_of_the_mask_and_a_way_for_gradients(
    model: PreTrainedModel, batches: list[dict[str, Any]], axis: str
) -> None:
    anatomy = read_anatomy(model)
    plan = make_plan(anatomy, random_scores(anatomy), 0.4, axis)
    with masked(model, plan):
        expected = logits(model, batches[0])
    with silenced(model, plan):
        assert torch.equal(logits(model, batches[0]), expected)
        model(**batches[0]).loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    model.zero_grad()
    for index, projection, _ in projections(model):
        gradient = gradients[f"model.language_model.layers.{index}.{projection.path}.weight"]
        assert gradient is not None
        assert bool(gradient.any()) == (index in plan.layers)


def test_steps_score_what_is_left(model: PreTrainedModel, batches: list[dict[str, Any]]) -> None:
    plain = plan_in_steps(model, batches, {"gate": {}}, 0.5, "width", 1)
    steps = plan_in_steps(model, batches, {"gate": {}}, 0.5, "width", 5)
    assert steps.ratio == plain.ratio
    assert steps.neurons != plain.neurons


def test_runs_of_layers_grow_around_what_is_gone(model: PreTrainedModel) -> None:
    anatomy = read_anatomy(model)
    scores = score(model, [tiny.batch(model)], "angular")
    first = make_plan(anatomy, scores, 0.2, "depth")
    gone = set(range(4)) - set(first.layers)
    later = make_plan(anatomy, removed_last(scores, first), 0.4, "depth")
    assert len(gone) == 1 < 4 - len(later.layers)
    assert gone <= set(range(4)) - set(later.layers)


def test_steps_must_be_positive(model: PreTrainedModel, batches: list[dict[str, Any]]) -> None:
    with pytest.raises(ConfigError, match="steps 0 must be at least 1"):
        plan_in_steps(model, batches, CRITERIA, 0.3, "width", 0)
