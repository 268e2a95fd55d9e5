"""Greedy removal with refits: against trying every unit with a least-squares fit."""

from itertools import pairwise, product

import pytest
import torch

from slimvlm.core.errors import NumericalError
from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.parts import Parts
from slimvlm.scoring import obs, score_model
from slimvlm.scoring.obs import DAMPING, removal_order
from slimvlm.scoring.score_model import collect, score
from slimvlm.scoring.unit_scores import strictly_increasing
from tests import tiny
from tests.tiers import tiered
from tests.tolerances import SOLVE, assert_close


def toy(channels, tokens=40, outputs=5):
    """A matrix and correlated inputs, float64."""
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(channels, channels, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, channels, generator=generator, dtype=torch.float64) @ mix
    return torch.randn(outputs, channels, generator=generator, dtype=torch.float64), x


def error_without(matrix, x, gone, ridge):
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


def channels_of(units, width):
    return [unit * width + i for unit in units for i in range(width)]


def by_trying(matrix, x, width, damping):
    ridge = damping * float(x.square().sum(0).mean())
    left, order, errors = list(range(x.shape[1] // width)), [], [0.0]
    while left:
        tried = [
            error_without(matrix, x, channels_of([*order, unit], width), ridge) for unit in left
        ]
        errors.append(min(tried))
        order.append(left.pop(tried.index(min(tried))))
    return order, [after - before for before, after in pairwise(errors)]


def by_inverting(matrix, gram, width, damping=DAMPING):
    """The definition: at each step a new inverse of what is left, and all weights fitted anew."""
    ridge = damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    h, left = gram + ridge, list(range(len(gram) // width))
    order, costs = [], []
    while left:
        channels = channels_of(left, width)
        inverse = torch.linalg.inv(h[channels][:, channels])
        fitted = (matrix @ h[:, channels] @ inverse).unflatten(1, (-1, width))
        prices = [
            float((fitted[:, n] @ torch.linalg.inv(inverse[s, s]) * fitted[:, n]).sum())
            for n, s in enumerate(slice(n * width, (n + 1) * width) for n in range(len(left)))
        ]
        cheapest = min(prices)
        first = next(n for n, price in enumerate(prices) if price <= cheapest * (1 + 1e-6))
        order.append(left.pop(first))
        costs.append(prices[first])
    return order, costs


@pytest.mark.parametrize(("units", "width"), [(6, 1), (5, 3)], ids=["neurons", "groups"])
@pytest.mark.parametrize("damping", [1e-6, 0.01, 0.3])
def test_it_is_the_exact_greedy_order(units, width, damping):
    matrix, x = toy(units * width)
    found = removal_order(matrix, x.T @ x, units, damping=damping)
    expected_order, expected_costs = by_trying(matrix, x, width, damping)
    assert found.order.tolist() == expected_order
    expected = torch.tensor(expected_costs, dtype=torch.float64)
    torch.testing.assert_close(found.costs, expected, rtol=1e-6, atol=1e-7 * float(expected.max()))


def inputs(case, channels):
    """Inputs of a kind that calibration meets."""
    x = toy(channels, tokens=3 * channels)[1]
    match case:
        case "few tokens":
            return x[: channels // 3]
        case "dead channels":
            x[:, ::3] = 0
        case "outliers":
            x[:, 5] *= 1e4
            x[:2] *= 1e2
        case "copies":
            x[:, channels // 2 :] = x[:, : channels // 2]
    return x


CASES = ("plain", "few tokens", "dead channels", "outliers", "copies")


@pytest.mark.parametrize(
    ("case", "width", "block"),
    tiered(
        product(CASES, [1, 4], [1, 5, 16, 1000]),
        lambda case, width, block: block == 5,
    ),
)
def test_blocks_of_any_size_are_the_exact_order(case, width, block, monkeypatch):
    x = inputs(case, 96)
    matrix, gram = toy(96, outputs=20)[0], x.T @ x
    expected_order, expected_costs = by_inverting(matrix, gram, width)
    monkeypatch.setattr(obs, "BLOCK", block)
    found = removal_order(matrix, gram, 96 // width)
    assert found.order.tolist() == expected_order
    expected = torch.tensor(expected_costs, dtype=torch.float64)
    torch.testing.assert_close(found.costs, expected, rtol=1e-6, atol=1e-9 * float(expected.max()))


@pytest.mark.parametrize("stop", [0, 1, 7, 30, 47, 48])
@pytest.mark.parametrize("width", [1, 2])
def test_stopping_early_is_the_beginning_of_the_whole_order(width, stop):
    matrix, x = toy(48 * width, tokens=400)
    whole = removal_order(matrix, x.T @ x, 48)
    begun = removal_order(matrix, x.T @ x, 48, stop)
    assert begun.order.tolist() == whole.order[:stop].tolist()
    assert_close(begun.costs, whole.costs[:stop], SOLVE)
    assert begun.left.tolist() == sorted(whole.order[stop:].tolist())
    assert len(begun.prices) == 48 - stop
    if stop < 48:
        cheapest = begun.left[begun.prices.argmin()]
        assert cheapest == whole.order[stop]
        assert float(begun.prices.min()) == pytest.approx(float(whole.costs[stop]), rel=1e-8)


@pytest.mark.parametrize(
    ("dtype", "copies"),
    tiered([(torch.float32, 2), (torch.float64, 40)], lambda dtype, copies: copies == 2),
)
def test_of_equal_units_the_first_goes(dtype, copies):
    """Also where rounding tells them apart, and of more than rows are prepared for at once."""
    matrix, x = toy(8)
    matrix, x = torch.cat([matrix] * copies, dim=1), torch.cat([x] * copies, dim=1)
    order = removal_order(matrix.to(dtype), (x.T @ x).to(dtype), 8 * copies).order.tolist()
    for channel in range(8):
        alike = [unit for unit in order if unit % 8 == channel]
        assert alike == sorted(alike)


def test_of_two_copies_one_is_free_and_silent_channels_break_nothing():
    matrix, x = toy(8)
    x = torch.cat([x, x], dim=1)
    matrix = torch.cat([matrix, matrix], dim=1)
    found = removal_order(matrix, x.T @ x, 16, damping=1e-9)
    assert sorted(j % 8 for j in found.order[:8].tolist()) == list(range(8))
    assert float(found.costs[:8].sum()) < 1e-6 * float(found.costs[8:].min())
    matrix, x = toy(6)
    x[:, 2] = 0
    found = removal_order(matrix, x.T @ x, 6)
    assert int(found.order[0]) == 2
    assert found.costs.isfinite().all()
    found = removal_order(matrix, torch.zeros(6, 6, dtype=torch.float64), 6)
    assert sorted(found.order.tolist()) == list(range(6))
    assert found.costs.isfinite().all()


@pytest.mark.parametrize(
    ("case", "width"),
    tiered(product(CASES, [1, 6]), lambda case, width: (width == 1) == (case in CASES[:2])),
)
def test_float32_chooses_as_well_as_float64(case, width):
    """What is removed may differ between near ties; what it costs may not."""
    x = inputs(case, 300)
    matrix, gram = toy(300, outputs=40)[0].float(), (x.T @ x).float()
    single = removal_order(matrix, gram, 300 // width)
    double = removal_order(matrix, gram.double(), 300 // width)
    for share in (0.2, 0.4, 0.6):
        count = int(share * len(single.order))
        gone = set(single.order[:count].tolist())
        assert len(gone - set(double.order[:count].tolist())) <= 0.02 * count
        assert float(single.costs[:count].sum()) == pytest.approx(
            float(double.costs[:count].sum()), rel=1e-3
        )


@pytest.mark.parametrize(
    ("width", "scale"), tiered(product([1, 6], [1e-18, 1e18]), lambda *case: case == (1, 1e18))
)
def test_the_order_does_not_depend_on_the_scale_of_the_inputs(width, scale):
    matrix, x = toy(300, tokens=400, outputs=40)
    gram = (x.T @ x).float()
    found = removal_order(matrix.float(), gram, 300 // width)
    scaled = removal_order(matrix.float(), gram * scale, 300 // width)
    assert scaled.order.tolist() == found.order.tolist()
    torch.testing.assert_close(scaled.costs / scale, found.costs, rtol=1e-3, atol=0)


def test_float64_is_used_where_digits_lack_and_an_indefinite_matrix_refused():
    x = inputs("copies", 300)
    matrix, gram = toy(300, outputs=40)[0].float(), (x.T @ x).float()
    single = removal_order(matrix, gram, 300, damping=1e-6)
    double = removal_order(matrix, gram.double(), 300, damping=1e-6)
    assert torch.equal(single.order, double.order)
    assert torch.equal(single.costs, double.costs)
    with pytest.raises(NumericalError, match="not positive definite"):
        removal_order(torch.ones(2, 4), torch.diag(torch.tensor([1.0, 1, 1, -1])), 4)


def test_scores_rank_as_the_order_of_removal_and_the_best_are_kept():
    costs = torch.tensor([0.0, 0.0, 3.0, 1.0, 1.0, 2.0, 5.0, 1e-3], dtype=torch.float64)
    scores = strictly_increasing(costs)
    assert (scores[1:] > scores[:-1]).all()
    assert_close(scores, costs.cummax(0).values, SOLVE._replace(rtol=1e-6))
    assert scores[0] == 0
    assert (scores >= costs).all()
    model = tiny.build("llava-llama")
    data = [tiny.batch(model, 20, seed) for seed in range(3)]
    statistics = collect(model, data, "obs")
    scores = score(model, data, "obs")
    assert statistics.matrices
    for index in range(read_anatomy(model).num_layers):
        for unit, path in (("kv_group", "self_attn.o_proj"), ("neuron", "mlp.down_proj")):
            values = scores.of(unit)[index]
            found = removal_order(
                Parts(model).layers[index].get_submodule(path).weight.detach(),
                statistics.parts[index, path].gram / statistics.weight,
                len(values),
            )
            assert values.argsort().tolist() == found.order.tolist()
            assert float(values.max()) == pytest.approx(float(found.costs.max()), rel=1e-5)


def test_parts_of_the_layers_score_as_all_at_once(monkeypatch):
    model = tiny.build("llava-qwen2")
    batches = [tiny.batch(model, seed=seed) for seed in range(2)]
    whole = score(model, iter(batches), "obs")
    passes = []
    Parts(model).layers[0].register_forward_pre_hook(lambda *call: passes.append(1))
    monkeypatch.setattr(score_model, "PART_BYTES", 1)
    parts = score(model, iter(batches), "obs")
    assert len(passes) == len(batches) * read_anatomy(model).num_layers
    for unit in ("kv_group", "neuron"):
        for expected, found in zip(whole.of(unit), parts.of(unit), strict=True):
            assert torch.equal(expected, found)
