"""One-shot repair of pruned models, from Gram matrices of the original one."""

import copy
from dataclasses import replace

import pytest
import torch

from slimvlm.core.errors import ConfigError
from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.parts import Parts
from slimvlm.pruning.cut import prune_
from slimvlm.pruning.repair import repair_
from slimvlm.pruning.walk.walk import walk_
from slimvlm.scoring.inputs import capture_grams
from slimvlm.scoring.score_model import collect
from slimvlm.scoring.statistics import Statistics
from tests import tiny
from tests.handmade import logits, plan_by_hand
from tests.pruning.pruned import batches, build, narrow, sliced, with_determined_neurons_
from tests.tolerances import SOLVE, assert_close


@pytest.mark.parametrize("in_one_shot", [True, False], ids=["one shot", "walk"])
@pytest.mark.parametrize("name", ["llama", "phi", "phi3", "qwen3_vl"])
def test_neurons_that_others_determine_are_replaced_exactly(name, in_one_shot):
    """Copies of other neurons and, where there are biases, constant ones."""
    model = build(name)
    with_determined_neurons_(model)
    data = batches(model, 8)
    plan = plan_by_hand(read_anatomy(model), neurons=range(64))
    expected, student = logits(model, data[0]), sliced(model, plan)
    assert not torch.allclose(logits(student, data[0]), expected, atol=1e-2)
    if in_one_shot:
        repair_(student, plan, capture_grams(model, data), ridge=0.0)
    else:
        student = model
        walk_(student, data, plan=plan, repair="width", ridge=0.0)
    torch.testing.assert_close(logits(student, data[0]), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["llama", "llava-phi"])
def test_one_shot_and_the_walk_agree_where_their_inputs_do(name):
    model = build(name)
    data, plan = batches(model), narrow(model)
    weights = {"image": 0.5, "prompt": 1.0, "answer": 2.0}
    one_shot = sliced(model, plan)
    report = repair_(one_shot, plan, capture_grams(model, data, weights), ridge=1e-2)
    walked = copy.deepcopy(model)
    walk_(walked, data, plan=plan, repair="width", token_weights=weights, ridge=1e-2)
    path = "self_attn.dense" if "phi" in name else "self_attn.o_proj"
    first, later = (
        [Parts(m).layers[i].get_submodule(path).weight for m in (one_shot, walked)] for i in (0, 1)
    )
    assert_close(first[0], first[1], SOLVE)
    assert (later[0] - later[1]).abs().max() > 1e-3
    assert len(report.refits) == 8
    assert all(row.repaired < row.sliced for row in report.refits.values())


def test_one_shot_refuses_what_does_not_fit():
    model, other = tiny.build("llama"), tiny.build("llava-llama")
    plan = narrow(model)
    statistics = collect(model, [tiny.batch(model)], "obs")
    gates = collect(other, [tiny.batch(other)], "gate")
    with pytest.raises(ConfigError, match="prune it first"):
        repair_(model, plan, statistics)
    prune_(model, plan)
    place, another = (0, "mlp.down_proj"), statistics.matrices[0, "self_attn.o_proj"]
    odd = replace(statistics, matrices={**statistics.matrices, place: another})
    for wrong, told in (
        (Statistics(), "only those of criterion 'obs' can"),
        (replace(statistics, parts={}, matrices={}), "o_proj"),
        (odd, r"'0.mlp.down_proj' is of another model"),
        (gates, "cannot repair"),
    ):
        with pytest.raises(ConfigError, match=told):
            repair_(model, plan, wrong)
