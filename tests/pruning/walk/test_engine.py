"""The walk from files is the walk in memory, and one that was stopped goes on where it was."""

import copy
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from slimvlm.core.errors import NumericalError, UnsupportedModelError
from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.load import auto_class, load
from slimvlm.pruning.save import prune_checkpoint, save
from slimvlm.pruning.walk.engine import (
    LayerWalk,
    Lesson,
    Steps,
    WalkConfig,
    distil_,
    relative_error,
    steps_for,
)
from slimvlm.pruning.walk.walk import plans_for, walk, walk_, walk_checkpoint
from slimvlm.scoring.layerwise import Live, open_checkpoint
from slimvlm.scoring.stores import Memory, Scratch
from slimvlm.scoring.unit_scores import Scores
from tests import tiny
from tests.handmade import (
    assert_equal,
    assert_untouched,
    plan_by_hand,
    random_scores,
    snapshot,
)
from tests.tiers import tiered

REFUSED = {
    **dict.fromkeys(("gemma3n_text", "gemma3n", "gemma4_text", "gemma4"), "read keys and values"),
    **{"molmo2": "cannot be read with low memory"},
}
EVERYTHING = Steps(repair="both", count=2)
CPU = torch.device("cpu")
BY_DEFAULT = ("qwen3_vl",)
"""Features added between layers."""


def by_default(name):
    return name in BY_DEFAULT


def batches(model, count=4):
    return [tiny.batch(model, 12 + seed, seed) for seed in range(count)]


def plans(model):
    """Of layers and widths; units are chosen by the walk where it can see what they give."""
    anatomy = read_anatomy(model)
    scores = random_scores(anatomy)
    ratio = 0.3 if anatomy.mlp_widths else 0.25
    axis = "depth" if model.config.model_type == "kosmos-2.5" else "both"  # its widths stay
    if any(layer.expert_neuron_params for layer in anatomy.layers):  # which no walk chooses
        return plans_for(anatomy, [scores], 0.5, axis, "balanced", experts=0.25)
    scores = Scores("by-hand", layer=scores.layer)
    return plans_for(anatomy, [scores], ratio, axis, "balanced")


def walked(source, store, data, chosen, steps=EVERYTHING, states=None):
    """A walk with one held-out batch."""
    config = WalkConfig(*chosen, data[:-1], data[-1:], steps)
    return walk(source, config, CPU, store, store if states is None else states)


def assert_same(actual, expected):
    """Plans, reports, scores and weights agree, bit for bit."""
    assert actual.plan == expected.plan
    assert actual.report == expected.report
    assert list(actual.weights) == list(expected.weights)
    assert_equal(*({str(k): v for k, v in each.weights.items()} for each in (actual, expected)))
    assert_equal(*({} if x.scores is None else x.scores.tensors() for x in (actual, expected)))


@pytest.mark.parametrize("name", tiered([n for n in tiny.CONFIGS if n not in REFUSED], by_default))
def test_the_walk_from_files_is_the_one_in_memory(name, tmp_path):
    tiny.build(name).save_pretrained(tmp_path / "model", max_shard_size="100KB")
    model, processor = load(tmp_path / "model")
    data, chosen = batches(model), plans(model)
    checkpoint, store = open_checkpoint(tmp_path / "model"), Scratch(tmp_path / "scratch")
    found = walked(checkpoint, store, data, chosen)
    assert found.weights
    assert_same(found, walked(Live(model), Memory(), data, chosen))
    assert all(parameter.is_meta for parameter in checkpoint.model.parameters())
    prune_checkpoint(tmp_path / "model", found.plan, tmp_path / "ours", weights=found.weights)
    found.apply_(model)
    save(model, processor, tmp_path / "theirs", found.plan)
    assert_equal(tmp_path / "ours", tmp_path / "theirs")


@pytest.mark.parametrize("name", tiered(REFUSED))
def test_what_cannot_walk_from_files_is_refused_by_name(name, tmp_path):
    model = tiny.build(name)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(
        UnsupportedModelError, match=f"'{model.config.model_type}'.*{REFUSED[name]}"
    ):
        walk_checkpoint(tmp_path / "model", batches(model), tmp_path / "out", 0.3, repair="none")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", tiered(["llama4", "qwen3_vl_moe"]))
def test_units_of_experts_are_not_chosen(name):
    model = tiny.build(name)
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match=r"layer [01] has experts"):
        walk_(model, batches(model, 5), 0.3)
    assert_untouched(model, before)


# Going on
@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of four small layers."""
    place = tmp_path_factory.mktemp("small") / "model"
    config = tiny.qwen3(hidden_size=16, intermediate_size=24, head_dim=4)
    torch.manual_seed(0)
    auto_class(config).from_config(config, dtype=torch.float32).save_pretrained(place)
    return place


class Clock:
    """Counts calls of functions, and kills the process at one of them."""

    def __init__(self, patch):
        self._patch, self.calls, self.stop_at = patch, 0, -1

    def watch(self, owner, name):
        """Count a function's calls."""
        honest = getattr(owner, name)

        def watched(*args, **options):
            self.calls += 1
            if self.calls == self.stop_at:
                raise KeyboardInterrupt
            return honest(*args, **options)

        self._patch.setattr(owner, name, watched)


def walk_of(folder, scratch, steps=EVERYTHING, states=None):
    checkpoint = open_checkpoint(folder)
    model = checkpoint.model
    return walked(checkpoint, Scratch(scratch), batches(model, 3), plans(model), steps, states)


@pytest.mark.parametrize(
    ("states", "repair"),
    tiered(
        product(["in files", "in memory"], ["auto", "both"]),
        lambda *case: case == ("in files", "auto"),
    ),
)
def test_a_walk_killed_at_any_layer_goes_on_behind_the_last_whole_one(
    states, repair, folder, tmp_path, monkeypatch
):
    """States in memory go with the process: no layer is walked, but some are run again."""
    steps = replace(EVERYTHING, repair=repair)

    def again(scratch):
        return walk_of(folder, scratch, steps, Memory(CPU) if states == "in memory" else None)

    expected = walk_of(folder, tmp_path / "whole", steps)
    clock = Clock(monkeypatch)
    clock.watch(LayerWalk, "go")
    for done in range(len(expected.plan.layers)):
        scratch = tmp_path / f"killed-{done}"
        clock.calls, clock.stop_at = 0, done + 1
        with pytest.raises(KeyboardInterrupt):
            again(scratch)
        clock.calls, clock.stop_at = 0, -1
        first = again(scratch)
        assert clock.calls == len(expected.plan.layers) - done
        for found in (first, again(scratch)):
            if states == "in files":
                assert_same(found, expected)
                continue
            assert found.plan == expected.plan
            assert list(found.weights) == list(expected.weights)
            for place, value in expected.weights.items():
                torch.testing.assert_close(found.weights[place], value)
            if expected.report.loss is not None:
                assert found.report.loss == pytest.approx(expected.report.loss, rel=1e-5)


def damaged(file, how):
    """Change an entry of a scratch folder that is a valid file still, but for a torn one."""
    if how == "torn":
        file.write_bytes(file.read_bytes()[:-1])
        return
    tensors = {key: value * 1 for key, value in load_file(file).items()}
    with safe_open(file, "pt") as opened:
        about = opened.metadata()
    if how == "key gone":
        tensors.popitem()
    for key, value in tensors.items():
        tensors[key] = value * 2 if how == "scaled" else value[..., :1].contiguous()
    save_file(tensors, file, about)


TABLE = yaml.safe_load(Path(__file__).with_name("walks.yaml").read_text())


@pytest.mark.parametrize(
    ("which", "how"),
    tiered(map(tuple, TABLE["damage"]), lambda which, _: which == "sliced-*"),
)
def test_damaged_entries_are_made_anew(which, how, folder, tmp_path, monkeypatch):
    steps = replace(EVERYTHING, repair="auto")
    expected = walk_of(folder, tmp_path / "whole", steps)
    clock = Clock(monkeypatch)
    clock.watch(LayerWalk, "go")
    clock.stop_at = 3
    with pytest.raises(KeyboardInterrupt):
        walk_of(folder, tmp_path / "killed", steps)
    clock.stop_at = -1
    files = [*(tmp_path / "killed").glob(f"**/{which}/*.safetensors")]
    assert files
    for file in files:
        damaged(file, how)
    assert_same(walk_of(folder, tmp_path / "killed", steps), expected)


@pytest.mark.slow
def test_walk_checkpoint_goes_on_and_leaves_what_save_writes(folder, tmp_path, monkeypatch):
    """With a depth score of its own, as `walk_`."""
    model, processor = load(folder)
    data = batches(model, 5)
    options = {"ratio": 0.4, "axis": "both", "local_steps": 1}
    clock = Clock(monkeypatch)
    clock.watch(LayerWalk, "go")
    clock.stop_at = 2
    place = {"out": tmp_path / "ours", "scratch": tmp_path / "scratch"}
    with pytest.raises(KeyboardInterrupt):
        walk_checkpoint(folder, data, **place, **options)
    found = walk_checkpoint(folder, data, **place, **options)
    assert clock.calls == 1 + len(found.plan.layers)
    assert not (tmp_path / "scratch").exists()
    expected = walk_(model, data, **options)
    assert (found.plan, found.report) == (expected.plan, expected.report)
    save(model, processor, tmp_path / "theirs", expected.plan)
    assert_equal(tmp_path / "ours", tmp_path / "theirs")


@pytest.mark.parametrize(
    "change", tiered(TABLE["changes"], lambda change: "data" in change), ids="".join
)
def test_another_request_does_not_reuse_old_work(change, folder, tmp_path, monkeypatch):
    model, _ = load(folder)
    asked = {"ratio": 0.4, "axis": "both", "scores": 0, "data": 0}

    def walk_from(scratch, out, data, scores, **options):
        given = random_scores(read_anatomy(model), scores)
        shown = [tiny.batch(model, 12, 5 * data + seed) for seed in range(5)]
        layers = Scores("by-hand", layer=given.layer)
        return walk_checkpoint(folder, shown, out, scores=layers, scratch=scratch, **options)

    with monkeypatch.context() as patch:
        clock = Clock(patch)
        clock.watch(LayerWalk, "go")
        clock.stop_at = 3
        with pytest.raises(KeyboardInterrupt):
            walk_from(tmp_path / "old", tmp_path / "out", **asked)
    found = walk_from(tmp_path / "old", tmp_path / "one", **{**asked, **change})
    expected = walk_from(tmp_path / "new", tmp_path / "two", **{**asked, **change})
    assert (found.plan, found.report) == (expected.plan, expected.report)
    assert_equal(tmp_path / "one", tmp_path / "two")


# Local distillation of one layer.


def lessons(layer, target, seeds):
    """A layer is to give what another one gives."""
    found = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        dtype = next(layer.parameters()).dtype
        x = torch.randn(2, 8, 16, generator=generator).to(dtype)
        with torch.no_grad():
            goal = target(x)
        found.append(Lesson(partial(layer, x), partial(Tensor.clone, goal), torch.ones(16)))
    return found


def pair(dtype):
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 16)).to(dtype)
    target = copy.deepcopy(layer)
    with torch.no_grad():
        layer[2].weight.mul_(0.5)
    return layer, target


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_learns_in_any_precision_and_keeps_its_own(dtype):
    layer, target = pair(dtype)
    before = [parameter.detach().clone() for parameter in layer.parameters()]
    known = list(layer.parameters())
    old, new = distil_(
        layer,
        lessons(layer, target, range(4)),
        lessons(layer, target, range(4, 6)),
        count=60,
        rate=1e-2,
    )
    assert new < 0.3 * old
    assert {parameter.dtype for parameter in layer.parameters()} == {dtype}
    assert all(torch.equal(a, b) for a, b in zip(known, before, strict=True))


@pytest.mark.parametrize("scale", [1 / 64, 16.0])
def test_a_layer_learns_alike_whatever_the_scale_of_its_matrices(scale):
    ends = []
    for factor in (1.0, scale):  # powers of two: the same function to the last bit
        layer, target = pair(torch.float32)
        for each in (layer, target):
            each[1] = nn.ReLU()
            with torch.no_grad():
                each[0].weight.mul_(factor)
                each[2].weight.div_(factor)
            each[0].bias = each[2].bias = None
        learnt, exams = lessons(layer, target, range(4)), lessons(layer, target, range(4, 6))
        ends.append(distil_(layer, learnt, exams, count=60, rate=0.05))
    (old, new), scaled = ends
    assert new < 0.3 * old
    assert scaled == pytest.approx((old, new), rel=1e-2)


@pytest.mark.parametrize("is_too_fast", [False, True], ids=["nothing to learn", "destroyed"])
def test_held_out_tokens_refuse_what_does_not_help_them(is_too_fast):
    layer, target = pair(torch.float32)
    before = copy.deepcopy(layer.state_dict())
    exams = lessons(layer, target if is_too_fast else layer, range(4, 6))
    rate = 1e30 if is_too_fast else 1e-2
    old, new = distil_(layer, lessons(layer, target, range(4)), exams, 20, rate)
    assert old == new
    assert (old == 0) == (not is_too_fast)
    assert_equal(layer.state_dict(), before)


def test_a_layer_without_a_finite_output_is_refused():
    layer, target = pair(torch.float32)
    layer[2].bias.data.fill_(float("nan"))
    with pytest.raises(NumericalError, match="its outputs are NaN or infinite"):
        distil_(layer, lessons(layer, target, range(2)), (), 1, 1e-2)


def test_errors_count_relative_to_each_token_and_linearly_where_they_are_large():
    target = torch.tensor([[[1.0, 0.0], [0.0, 1000.0], [0.0, 1.0]]])
    output = torch.tensor([[[0.5, 0.0], [0.0, 500.0], [0.0, 11.0]]])
    weights = torch.tensor([1.0, 1.0, 0.0])
    assert float(relative_error(output, target, weights)) == pytest.approx(0.25)
    assert float(relative_error(output, target, torch.tensor([0.0, 0.0, 1.0]))) == pytest.approx(19)


def test_more_steps_are_made_the_more_goes():
    anatomy = read_anatomy(tiny.build("llama"))
    plans = [plan_by_hand(anatomy, range(kept)) for kept in (4, 3, 2)]
    none, few, many = (steps_for(plan, batches=100) for plan in plans)
    assert none == 0 < few < many
