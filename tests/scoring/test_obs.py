"""Greedy removal with refits: against trying every unit with a least-squares fit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.parts import decoder_layers
from slimvlm.scoring import score_model
from slimvlm.scoring.obs import removal_order
from slimvlm.scoring.score_model import collect, score
from slimvlm.scoring.statistics import Grams
from slimvlm.scoring.unit_scores import strictly_increasing
from tests import tiny
from tests.tolerances import SOLVE, assert_close


def toy(channels: int, tokens: int = 40, outputs: int = 5) -> tuple[Tensor, Tensor]:
    """A matrix and correlated inputs, float64."""
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(channels, channels, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, channels, generator=generator, dtype=torch.float64) @ mix
    return torch.randn(outputs, channels, generator=generator, dtype=torch.float64), x


def error_without(matrix: Tensor, x: Tensor, gone: list[int], ridge: float) -> float:
    """The least squared error of the outputs that the other channels can reach.

    The ridge is ``sqrt(ridge)`` times the identity as further data: it ties refitted weights to
    the old ones.
    """
    data = torch.cat([x, ridge**0.5 * torch.eye(x.shape[1], dtype=torch.float64)])
    wanted = data @ matrix.T
    left = [j for j in range(x.shape[1]) if j not in gone]
    if not left:
        return float(wanted.square().sum())
    fitted = torch.linalg.lstsq(data[:, left], wanted).solution
    return float((data[:, left] @ fitted - wanted).square().sum())


def by_trying(
    matrix: Tensor, x: Tensor, width: int, damping: float
) -> tuple[list[int], list[float]]:
    ridge = damping * float(x.square().sum(0).mean())
    order: list[int] = []
    costs: list[float] = []
    gone: list[int] = []
    before = 0.0
    for _ in range(x.shape[1] // width):
        tried = {
            unit: error_without(
                matrix, x, gone + list(range(unit * width, (unit + 1) * width)), ridge
            )
            for unit in range(x.shape[1] // width)
            if unit not in order
        }
        best = min(tried, key=lambda unit: tried[unit])
        order.append(best)
        costs.append(tried[best] - before)
        before = tried[best]
        gone += list(range(best * width, (best + 1) * width))
    return order, costs


@pytest.mark.parametrize(("units", "width"), [(6, 1), (5, 3)], ids=["neurons", "groups"])
@pytest.mark.parametrize("damping", [1e-6, 0.01, 0.3])
def test_one_at_a_time_is_the_exact_greedy_order(units: int, width: int, damping: float) -> None:
    matrix, x = toy(units * width)
    order, costs = removal_order(matrix, x.T @ x, units, group=1, damping=damping)
    expected_order, expected_costs = by_trying(matrix, x, width, damping)
    assert order.tolist() == expected_order
    expected = torch.tensor(expected_costs, dtype=torch.float64)
    torch.testing.assert_close(costs, expected, rtol=1e-6, atol=1e-7 * float(expected.max()))


@pytest.mark.parametrize(("units", "width"), [(24, 1), (8, 3)], ids=["neurons", "groups"])
def test_costs_add_up_to_the_error_of_removing_all(units: int, width: int) -> None:
    """Whatever the group: each cost is what the removal added."""
    matrix, x = toy(units * width)
    gram = x.T @ x
    ridge = 0.01 * float(gram.diagonal().mean())
    for group in (1, 4, units):
        order, costs = removal_order(matrix, gram, units, group)
        assert sorted(order.tolist()) == list(range(units))
        for count in (1, units // 2, units):
            gone = [u * width + i for u in order[:count].tolist() for i in range(width)]
            error = error_without(matrix, x, gone, ridge)
            assert float(costs[:count].sum()) == pytest.approx(error, rel=1e-8)


def test_of_two_copies_one_is_free_even_within_a_group() -> None:
    matrix, x = toy(8)
    x = torch.cat([x, x], dim=1)
    matrix = torch.cat([matrix, matrix], dim=1)
    for group in (1, 8, 16):
        order, costs = removal_order(matrix, x.T @ x, 16, group, damping=1e-9)
        assert sorted(j % 8 for j in order[:8].tolist()) == list(range(8))
        assert float(costs[:8].sum()) < 1e-6 * float(costs[8:].min())


def test_a_group_loses_little() -> None:
    matrix, x = toy(96, tokens=400, outputs=30)
    exact = removal_order(matrix, x.T @ x, 96, group=1)[1]
    grouped = removal_order(matrix, x.T @ x, 96, group=8)[1]
    for count in (24, 48, 72):
        assert float(grouped[:count].sum()) < 1.05 * float(exact[:count].sum())


def test_silent_channels_do_not_break_the_inverse() -> None:
    matrix, x = toy(6)
    x[:, 2] = 0
    order, costs = removal_order(matrix, x.T @ x, 6)
    assert int(order[0]) == 2
    assert costs.isfinite().all()
    order, costs = removal_order(matrix, torch.zeros(6, 6, dtype=torch.float64), 6)
    assert sorted(order.tolist()) == list(range(6))
    assert costs.isfinite().all()


def test_scores_rank_as_the_order_of_removal_whatever_the_costs() -> None:
    costs = torch.tensor([0.0, 0.0, 3.0, 1.0, 1.0, 2.0, 5.0, 1e-3], dtype=torch.float64)
    scores = strictly_increasing(costs)
    assert (scores[1:] > scores[:-1]).all()
    assert_close(scores, costs.cummax(0).values, SOLVE._replace(rtol=1e-6))
    assert scores[0] == 0
    assert (scores >= costs).all()


def test_keeping_the_best_scores_is_stopping_early() -> None:
    model = tiny.build("llava-llama")
    data = [tiny.batch(model, 20, seed) for seed in range(3)]
    statistics = collect(model, data, "obs")
    scores = score(model, data, "obs")
    assert isinstance(statistics, Grams)
    for index in range(read_anatomy(model).num_layers):
        for unit, path in (("kv_group", "self_attn.o_proj"), ("neuron", "mlp.down_proj")):
            values = scores.of(unit)[index]
            order, costs = removal_order(
                decoder_layers(model)[index].get_submodule(path).weight.detach(),
                statistics.parts[index, path].gram / statistics.weight,
                len(values),
                max(len(values) // 32, 1),
            )
            assert values.argsort().tolist() == order.tolist()
            assert float(values.max()) == pytest.approx(float(costs.max()), rel=1e-5)


def test_parts_of_the_layers_score_as_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("llava-qwen2")
    batches = [tiny.batch(model, seed=seed) for seed in range(2)]
    whole = score(model, iter(batches), "obs")
    passes = []
    decoder_layers(model)[0].register_forward_pre_hook(lambda *call: passes.append(1))
    monkeypatch.setattr(score_model, "PART_BYTES", 1)
    parts = score(model, iter(batches), "obs")
    assert len(passes) == len(batches) * read_anatomy(model).num_layers
    for unit in ("kv_group", "neuron"):
        for expected, found in zip(whole.of(unit), parts.of(unit), strict=True):
            assert torch.equal(expected, found)
