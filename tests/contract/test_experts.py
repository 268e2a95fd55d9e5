"""Experts as units: what a plan of fewer experts means, and that it is all that happens."""

import json
from dataclasses import replace
from functools import cache

import pytest
import torch

import slimvlm as sv
from slimvlm.core.errors import ConfigError, ImpossiblePlanError
from slimvlm.models.parts import Parts
from tests import tiny
from tests.handmade import assert_untouched, random_scores, snapshot
from tests.tiers import tiered

BY_DEFAULT = ("qwen3_vl_moe", "llama4", "gemma4-experts")
ROUTERS = {
    **dict.fromkeys(("qwen3_vl_moe", "qwen3_moe", "qwen3_5_moe"), ("mlp.gate", 2)),
    **{"gemma4-experts": ("router", 2), "llama4": ("feed_forward.router", None)},
}
"""Where routers are, and which of their results are the experts that tokens take; where it is none,
the first one weighs all experts, and tokens take the best."""


@cache
def plan_of(name, experts=0.25, ratio=0.0, axis="width"):
    anatomy = sv.anatomy(tiny.build(name))
    return sv.make_plan(anatomy, random_scores(anatomy), ratio, axis, experts=experts)


def pruned(name, plan):
    model = tiny.build(name)
    sv.prune_(model, plan)
    return model


@pytest.mark.parametrize("name", tiered(ROUTERS, lambda name: name in BY_DEFAULT))
def test_a_router_picks_what_it_would_have(name):
    """The best of what is left, in the same order, by the weights that these had."""
    plan = plan_of(name)
    path, place = ROUTERS[name]
    hidden = torch.randn(64, 64, generator=torch.Generator().manual_seed(3))
    whole, small = (Parts(m).layers for m in (tiny.build(name), pruned(name, plan)))
    for index, kept in enumerate(plan.experts):
        if not kept:
            continue
        router = whole[index].get_submodule(path)
        (rows,) = (p for p in router.parameters() if p.shape == (4, 64))
        weight = rows.detach()
        given = hidden
        if name.startswith("gemma4"):
            given = router.norm(hidden) * router.scale * router.scalar_root_size
        left = (given @ weight.T)[:, list(kept)]
        results = small[index].get_submodule(path)(hidden)
        taken = results[0].argmax(1, True) if place is None else results[place]
        expected = torch.tensor(kept)[left.topk(taken.shape[1]).indices]
        assert torch.equal(torch.tensor(kept)[taken], expected)


def test_the_best_scores_stay_and_the_axis_gives_the_rest_of_the_ratio():
    anatomy = sv.anatomy(tiny.build("qwen3_vl_moe"))
    scores = random_scores(anatomy)
    plan = sv.make_plan(anatomy, scores, 0.0, experts=0.5)
    for values, kept in zip(scores.expert, plan.experts, strict=True):
        assert set(kept) == set(values.topk(2).indices.tolist())
    assert plan.criteria["expert"] == "by-hand"
    alone = plan_of("qwen3_vl_moe", 0.25)
    for axis in ("depth", "width", "both"):
        plan = plan_of("qwen3_vl_moe", 0.25, 0.35, axis)
        assert plan.experts[0] == alone.experts[0]
        step = max(shape.params for shape in plan.before.layers) if axis == "depth" else 8 * 4 * 768
        assert abs(plan.ratio - 0.35) * plan.before.backbone_params <= step
    assert plan_of("qwen3_vl_moe", 0.25, 0.1).experts == alone.experts  # no less than asked


def test_a_plan_file_keeps_experts_and_old_ones_keep_all(tmp_path):
    plan = plan_of("llama4")
    plan.save(tmp_path / "plan.json")
    assert sv.Plan.load(tmp_path / "plan.json") == plan
    assert "3 of 4 experts" in plan.summary()
    values = json.loads((tmp_path / "plan.json").read_text())
    assert values["experts"][0] == []
    assert len(values["experts"][1]) == 3
    del values["experts"], values["tokens"]
    (tmp_path / "old.json").write_text(json.dumps(values))
    old = sv.Plan.load(tmp_path / "old.json")
    assert old.experts == ((), (0, 1, 2, 3)) * 2
    assert old.tokens is None
    assert "experts" not in old.summary()


def test_what_cannot_be_is_refused_by_name_and_a_pruned_model_can_lose_more():
    model = tiny.build("qwen3_vl_moe")
    before, plan = snapshot(model), plan_of("qwen3_vl_moe")
    anatomy = plan.before
    with pytest.raises(ImpossiblePlanError, match=r"leaves 1 in a layer.*takes 2: at most 0\.5"):
        sv.make_plan(anatomy, random_scores(anatomy), 0.0, experts=0.75)
    with pytest.raises(ImpossiblePlanError, match=r"experts\[1\] keeps 1, but each token takes 2"):
        plan.with_units(1, {"expert": (3,)})
    with pytest.raises(ConfigError, match=r"experts\[1\] must be sorted, unique, below 4"):
        plan.with_units(1, {"expert": (2, 4)})
    with pytest.raises(ConfigError, match=r"experts 1\.0 must be at least 0 and below 1"):
        sv.make_plan(anatomy, random_scores(anatomy), 0.0, experts=1.0)
    with pytest.raises(ConfigError, match=r"experts 0\.5 needs scores of expert; given: 'by-hand'"):
        sv.make_plan(anatomy, replace(random_scores(anatomy), expert=None), 0.0, experts=0.5)
    with pytest.raises(ImpossiblePlanError, match="must stay equally wide"):
        sv.prune_(model, plan.with_units(1, {"expert": (0, 1)}))
    llama = sv.anatomy(tiny.build("llama"))
    with pytest.raises(ConfigError, match=r"experts 0\.5: 'llama' has none that can be removed"):
        sv.make_plan(llama, random_scores(llama), 0.0, experts=0.5)
    assert_untouched(model, before)
    plan = plan_of("qwen3_vl_moe")
    model = pruned("qwen3_vl_moe", plan)
    with pytest.raises(ConfigError, match=r"4 experts, but the model is .* 3 experts"):
        sv.prune_(model, plan)
    again = sv.make_plan(plan.after, random_scores(plan.after), 0.0, experts=0.3)
    sv.prune_(model, again)
    assert sv.anatomy(model) == again.after
    assert sv.anatomy(model).expert_counts == [2]
