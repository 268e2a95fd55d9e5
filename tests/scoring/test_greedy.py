"""Greedy depth: against removing layers one at a time with plain hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.parts import decoder_layers
from slimvlm.planning.mask import masked
from slimvlm.scoring.greedy import capture_greedy
from slimvlm.scoring.score_model import score
from tests import tiny
from tests.handmade import Batch, joined, logits, padded, plan_by_hand
from tests.tiers import ARCHETYPES, tiered

FAMILIES = ("llama", "gemma2", "phi", "llava-llama", "llava-phi3", "gemma3", "idefics3", "qwen3_vl")


def runs_by_default(name: str) -> bool:
    """Archetypes, and what layer by layer is special: kinds of masks, capped logits, deepstack."""
    return name in ARCHETYPES or name in ("gemma2", "gemma3", "qwen3_vl")


def samples(model: PreTrainedModel) -> list[Batch]:
    data = [tiny.batch(model, 12, seed) for seed in range(3)]
    for seed, batch in enumerate(data):
        batch["labels"][:, : -3 - seed] = -100
    return data


def without(model: PreTrainedModel, gone: list[int], batch: Batch) -> Tensor:
    anatomy = read_anatomy(model)
    kept = [i for i in range(anatomy.num_layers) if i not in gone]
    with masked(model, plan_by_hand(anatomy, layers=kept)):
        return logits(model, batch).double().log_softmax(-1)


def divergence(
    model: PreTrainedModel, gone: list[int], data: list[Batch], weights: dict[str, float] | None
) -> float:
    """Mean KL over counted predictions, one token at a time."""
    total = count = 0.0
    for batch in data:
        original, candidate = without(model, [], batch)[0], without(model, gone, batch)[0]
        for t in range(1, len(original)):
            if batch["labels"][0, t] != -100:
                weight = 1.0 if weights is None else weights["answer"]
            elif weights is None or batch["input_ids"][0, t] == tiny.IMAGE_TOKEN:
                continue
            else:
                weight = weights["prompt"]
            p, q = original[t - 1], candidate[t - 1]
            total += weight * float((p.exp() * (p - q)).sum())
            count += weight
    return total / count


@pytest.mark.parametrize("name", tiered(FAMILIES, runs_by_default))
@pytest.mark.parametrize("weights", [None, {"prompt": 0.5, "answer": 2.0}], ids=["plain", "roles"])
def test_one_round_is_every_layer_tried_alone(name: str, weights: dict[str, float] | None) -> None:
    model = tiny.build(name)
    data = samples(model)
    found = score(model, data, "kl_greedy", token_weights=weights, rounds=1).layer
    assert found is not None
    for index in set(range(4)) - set(read_anatomy(model).pinned_layers):
        expected = divergence(model, [index], data, weights)
        assert float(found[index]) == pytest.approx(expected, rel=2e-4)


@pytest.mark.parametrize("name", tiered(["llama", "llava-phi3"]))
@pytest.mark.parametrize("at_once", [1, 3])
def test_rounds_are_greedy(name: str, at_once: int) -> None:
    model = tiny.build(name)
    data = samples(model)
    gone: list[int] = []
    costs: dict[int, float] = {}
    for _ in range(2):
        tried = {i: divergence(model, [*gone, i], data, None) for i in range(4) if i not in gone}
        costs.update(tried)
        gone.append(min(tried, key=lambda i: tried[i]))
    others = sorted((i for i in range(4) if i not in gone), key=lambda i: costs[i])
    statistics = capture_greedy(model, data, rounds=2, at_once=at_once).tensors()
    assert statistics["order"].tolist() == [*gone, *others]
    expected = torch.tensor([costs[i] for i in range(4)], dtype=torch.float64)
    torch.testing.assert_close(statistics["divergence"], expected, rtol=2e-4, atol=0)


def test_scores_rank_as_layers_go_at_any_number_of_rounds() -> None:
    model = tiny.build("llama")
    data = samples(model)
    for rounds in (1, 2, 3, 9):
        order = capture_greedy(model, data, rounds=rounds).tensors()["order"]
        layer = score(model, data, "kl_greedy", rounds=rounds).layer
        assert layer is not None
        assert layer.argsort().tolist() == order.tolist()
    default = capture_greedy(model, data).tensors()
    assert all(
        torch.equal(default[k], v)
        for k, v in capture_greedy(model, data, rounds=2).tensors().items()
    )


def test_pinned_layers_are_never_tried() -> None:
    model = tiny.build("qwen3_vl")
    assert read_anatomy(model).pinned_layers == (0,)
    layer = score(model, samples(model), "kl_greedy", rounds=9).layer
    assert layer is not None
    assert int(layer.argmax()) == 0


def test_how_many_at_once_and_how_batched_changes_nothing() -> None:
    model = tiny.build("llava-llama")
    data = samples(model)
    expected = capture_greedy(model, data, rounds=3, at_once=1).tensors()
    others: list[tuple[list[Batch], int]] = [(data, 4), ([joined(data)], 3), ([padded(data)], 2)]
    for batches, at_once in others:
        found = capture_greedy(model, iter(batches), rounds=3, at_once=at_once).tensors()
        assert torch.equal(found["order"], expected["order"])
        torch.testing.assert_close(
            found["divergence"], expected["divergence"], rtol=2e-4, atol=1e-6
        )


def test_layers_that_are_not_needed_are_not_computed() -> None:
    model = tiny.build("llama")
    calls = [0, 0, 0, 0]

    def counter(index: int) -> Any:
        def count(module: Any, args: Any) -> None:
            calls[index] += 1

        return count

    for index, layer in enumerate(decoder_layers(model)):
        layer.self_attn.register_forward_pre_hook(counter(index), with_kwargs=False)
        assert "forward" not in vars(layer)
    capture_greedy(model, samples(model)[:1], rounds=1, at_once=1)
    # once for the original's predictions, once for the layers' inputs, then from each candidate on
    assert calls == [3, 4, 5, 6]
    assert all("forward" not in vars(layer) for layer in decoder_layers(model))
