"""Greedy depth: against pruning one layer after another and comparing what models say."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.parts import decoder_layers
from slimvlm.pruning.cut import prune_
from slimvlm.scoring.score_model import collect, score
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
    smaller = deepcopy(model)
    prune_(smaller, plan_by_hand(anatomy, [i for i in range(anatomy.num_layers) if i not in gone]))
    return logits(smaller, batch).double().log_softmax(-1)


def removals(model: PreTrainedModel, data: Iterable[Batch], **options: Any) -> dict[str, Tensor]:
    """The order of removal, and what each layer cost."""
    return collect(model, data, "kl_greedy", **options).tensors()


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
def test_rounds_are_greedy(name: str) -> None:
    model = tiny.build(name)
    data = samples(model)
    gone: list[int] = []
    costs: dict[int, float] = {}
    for _ in range(2):
        tried = {i: divergence(model, [*gone, i], data, None) for i in range(4) if i not in gone}
        costs.update(tried)
        gone.append(min(tried, key=lambda i: tried[i]))
    others = sorted((i for i in range(4) if i not in gone), key=lambda i: costs[i])
    found = removals(model, data, rounds=2)
    assert found["order"].tolist() == [*gone, *others]
    expected = torch.tensor([costs[i] for i in range(4)], dtype=torch.float64)
    torch.testing.assert_close(found["divergence"], expected, rtol=2e-4, atol=0)


def test_scores_rank_as_layers_go_at_any_number_of_rounds() -> None:
    model = tiny.build("llama")
    data = samples(model)
    for rounds in (1, 2, 3, 9):
        order = removals(model, data, rounds=rounds)["order"]
        layer = score(model, data, "kl_greedy", rounds=rounds).layer
        assert layer is not None
        assert layer.argsort().tolist() == order.tolist()
    default = removals(model, data)
    assert all(torch.equal(default[k], v) for k, v in removals(model, data, rounds=2).items())


def test_pinned_layers_are_never_tried() -> None:
    model = tiny.build("qwen3_vl")
    assert read_anatomy(model).pinned_layers == (0,)
    layer = score(model, samples(model), "kl_greedy", rounds=9).layer
    assert layer is not None
    assert int(layer.argmax()) == 0


def test_how_batched_changes_nothing() -> None:
    model = tiny.build("llava-llama")
    data = samples(model)
    expected = removals(model, data, rounds=3)
    for batches in ([joined(data)], [padded(data)]):
        found = removals(model, iter(batches), rounds=3)
        assert torch.equal(found["order"], expected["order"])
        torch.testing.assert_close(
            found["divergence"], expected["divergence"], rtol=2e-4, atol=1e-6
        )


def test_a_layer_runs_for_the_shared_prefix_and_for_each_candidate_before_it() -> None:
    model = tiny.build("llama")
    calls = [0, 0, 0, 0]

    def counter(index: int) -> Any:
        def count(module: Any, args: Any) -> None:
            calls[index] += 1

        return count

    for index, layer in enumerate(decoder_layers(model)):
        layer.self_attn.register_forward_pre_hook(counter(index), with_kwargs=False)
    (first, *_) = removals(model, samples(model)[:1], rounds=1)["order"].tolist()
    assert calls == [1, 2, 3, 4]
    calls[:] = [0, 0, 0, 0]
    removals(model, samples(model)[:1], rounds=2)
    second = iter([1, 2, 3])
    again = [0 if index == first else next(second) for index in range(4)]
    assert calls == [before + now for before, now in zip([1, 2, 3, 4], again, strict=True)]
