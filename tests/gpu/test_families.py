"""Models of every archetype score, walk and run from files on the card as on the CPU."""

import copy
from functools import cache

import pytest

import slimvlm as sv
from slimvlm.models.parts import shares_keys
from tests import tiny
from tests.gpu.alike import assert_close
from tests.tiers import ARCHETYPES, tiered

FAST = ("llava-llama", "llama4")
"""By default: one that sees, and one with experts, complex rotations and more to gather."""
archetypes = pytest.mark.parametrize("name", tiered(ARCHETYPES, lambda name: name in FAST))


@cache
def model_of(name):
    """A tiny model on the CPU. Tests must not change it."""
    return tiny.build(name)


def batches_of(name):
    return [tiny.batch(model_of(name), 12 + 3 * seed, seed) for seed in range(2)]


def has_experts(name):
    return any(shape.num_experts for shape in sv.anatomy(model_of(name)).layers)


def criteria_of(name):
    """Criteria of a model's widths and of its layers."""
    return "activation" if has_experts(name) else "flap", "block_influence"


@archetypes
def test_scores(name, card):
    models = model_of(name), copy.deepcopy(model_of(name)).to(card)
    for criterion in criteria_of(name):
        expected, found = (sv.score(model, batches_of(name), criterion) for model in models)
        assert_close(found.tensors(), expected.tensors())


@archetypes
def test_a_walk(name, card):
    models = [copy.deepcopy(model_of(name)).to(device) for device in ("cpu", card)]
    how = {"held_out": batches_of(name)[1:]}
    if has_experts(name):
        how["scores"] = sv.score(model_of(name), batches_of(name), "activation")
    if name == "kosmos2_5":
        how["axis"] = "depth"  # its widths are fixed
    here, there = (sv.walk_(model, batches_of(name), 0.2, **how) for model in models)
    assert there.plan == here.plan
    assert {parameter.device for parameter in models[1].parameters()} == {card}
    assert_close(models[1].state_dict(), models[0].state_dict())


@archetypes
def test_from_files(name, card, tmp_path):
    """Every tensor that a layer reads is on the card while it runs, buffers without files, too."""
    model = model_of(name)
    model.save_pretrained(tmp_path)
    if shares_keys(model.config) or name == "molmo2":
        with pytest.raises(sv.SlimError, match="low memory"):
            sv.score_checkpoint(tmp_path, batches_of(name), device=card)
        return
    for criterion in criteria_of(name):
        found = sv.score_checkpoint(tmp_path, batches_of(name), criterion, device=card)
        assert_close(found.tensors(), sv.score(model, batches_of(name), criterion).tensors())
