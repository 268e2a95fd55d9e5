"""Moments: sums over batches are whole sums; symmetric matrices against the plain products."""

import pytest
import torch

from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.parts import Parts
from slimvlm.pruning.cut import prune_
from slimvlm.scoring import moments
from slimvlm.scoring.forward import capture_grams
from slimvlm.scoring.moments import Moments, add_product_, invert_, mirror_
from tests import tiny
from tests.handmade import plan_by_hand
from tests.scoring.test_forward import inputs_of
from tests.tolerances import SOLVE, Tolerance, assert_close


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(moments, "SYMMETRIC_BLOCK", 8)


FAMILIES = ("llama", "phi", "llava-phi3", "gemma3")


def samples(name, lengths=(12, 12, 12)):
    model = tiny.build(name)
    return [tiny.batch(model, tokens, seed) for seed, tokens in enumerate(lengths)]


def double(batches):
    return [{k: v.double() if v.is_floating_point() else v for k, v in b.items()} for b in batches]


def sums_of(statistics):
    found = {"weight": statistics.weight}
    for (index, path), part in statistics.parts.items():
        for name in ("gram", "total", "count"):
            found[f"{index}.{path}.{name}"] = getattr(part, name)
    return found


def assert_same(ours, theirs, tolerance=SOLVE):
    expected = sums_of(theirs)
    assert sums_of(ours).keys() == expected.keys()
    for name, tensor in sums_of(ours).items():
        assert_close(tensor, expected[name], tolerance)


@pytest.mark.parametrize("name", FAMILIES)
def test_grams_are_the_products_of_inputs_in_any_parts(name):
    model = tiny.build(name).double()
    data = double(samples(name))
    statistics = capture_grams(model, data)
    matrices = {
        (index, projection.path): linear.weight
        for index, projection, linear in Parts(model).projections()
        if projection.path.rpartition(".")[2] in ("o_proj", "dense", "down_proj", "fc2")
    }
    assert len(matrices) == 2 * read_anatomy(model).num_layers
    assert statistics.parts.keys() == statistics.matrices.keys() == matrices.keys()
    for key, matrix in matrices.items():
        x = torch.cat([inputs_of(model, key[1], batch)[key[0]] for batch in data])
        part = statistics.parts[key]
        assert_close(part.gram, x.T @ x, SOLVE)
        assert_close(part.total, x.sum(0), SOLVE)
        assert float(part.count) == len(x)
        weight = statistics.matrices[key]
        assert weight.data_ptr() == matrix.data_ptr()
        assert not weight.requires_grad
    assert float(statistics.weight) == statistics.num_tokens == len(x)


def test_roles_add_up_and_tokens_of_weight_zero_are_gone_exactly():
    model, data = tiny.build("llava-llama").double(), double(samples("llava-llama"))
    whole = sums_of(capture_grams(model, data))
    none = {"image": 0.0, "prompt": 0.0, "answer": 0.0}
    parts = [sums_of(capture_grams(model, data, {**none, role: 1.0})) for role in none]
    assert [float(part["weight"]) for part in parts] == [3 * 16, 3 * 6, 3 * 6]
    scaled = sums_of(capture_grams(model, data, {"image": 0.25, "prompt": 3.0}))
    for key in whole:
        image, prompt, answer = (part[key] for part in parts)
        assert_close(image + prompt + answer, whole[key], SOLVE)
        assert_close(0.25 * image + 3 * prompt + answer, scaled[key], SOLVE)
    # answers come last, so that without them the other tokens are what they were
    model, data = tiny.build("llama").double(), double(samples("llama"))
    short = [{k: v[:, :6] for k, v in one.items()} for one in data]
    assert_same(capture_grams(model, data, {"answer": 0.0}), capture_grams(model, short))


def test_precision_follows_the_model_and_matrices_outlive_pruning():
    data = samples("llama")
    for dtype, expected in (
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float64),
    ):
        statistics = capture_grams(tiny.build("llama").to(dtype), data)
        place = 0, "mlp.down_proj"
        assert statistics.parts[place].gram.dtype == expected
        assert statistics.matrices[place].dtype == dtype
    model = tiny.build("llama")
    statistics = capture_grams(model, samples("llama"))
    before = {place: matrix.clone() for place, matrix in statistics.matrices.items()}
    prune_(model, plan_by_hand(read_anatomy(model), kv_groups=[0, 2], neurons=range(0, 96, 2)))
    assert all(torch.equal(statistics.matrices[place], before[place]) for place in before)


ROWS = torch.randn(90, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
WEIGHTS = {
    "ones": torch.ones(90),
    "ones and zeros": (torch.arange(90) % 3 > 0).float(),
    "any": torch.linspace(0, 2, 90),
}


def summed(rows, weights, dtype):
    """Of tokens that come in two parts, the second of which is looked at between."""
    found = Moments.zero(24, dtype=dtype)
    for part in (slice(0, 31), slice(31, None)):
        found.add(rows[part], weights[part])
        _ = found.gram
    return found.gram


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_sum_is_the_product_in_float64(dtype, weights):
    rows = ROWS.to(dtype)
    found = summed(rows, weights, torch.promote_types(dtype, torch.float32))
    expected = rows.double().T @ (rows.double() * weights[:, None])
    assert_close(found, expected, Tolerance(torch.float64, 1e-5 * float(expected.max()), 0))
    assert torch.equal(found, found.T)


@pytest.mark.parametrize("weights", ["ones and zeros", "any"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_tokens_of_weight_zero_change_no_bit(dtype, weights):
    weights = WEIGHTS[weights] * WEIGHTS["ones and zeros"]
    rows, counted = ROWS.to(dtype), weights > 0
    kind = torch.promote_types(dtype, torch.float32)
    found, expected = Moments.zero(24, dtype=kind), Moments.zero(24, dtype=kind)
    found.add(rows.masked_fill(~counted[:, None], torch.nan), weights)
    expected.add(rows[counted], weights[counted])
    for name in ("gram", "total", "count"):
        assert torch.equal(getattr(found, name), getattr(expected, name))


# Symmetric matrices

SIZES = (1, 7, 24, 61)


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("size", SIZES)
def test_a_product_is_whole_once_it_is_mirrored_and_the_inverse_is_one(size):
    left, right = drawn(2, 10, size)
    sides = torch.cat([left, right]), torch.cat([right, left])
    start = drawn(size, size)
    matrix = start + start.T
    add_product_(matrix, *sides, -1)
    mirror_(matrix)
    assert_close(matrix, start + start.T - left.T @ right - right.T @ left, SOLVE)
    assert torch.equal(matrix, matrix.T)
    x = drawn(size + 5, size)
    matrix = x.T @ x
    inverse = matrix.clone()
    assert invert_(inverse)
    assert_close(inverse, torch.linalg.inv(matrix), SOLVE)
    assert torch.equal(inverse, inverse.T)
