"""Models whose last layers read keys and values of earlier ones: Gemma 3n and Gemma 4."""

from pathlib import Path

import pytest
import torch
import transformers as hf
import yaml

from slimvlm.core.errors import ImpossiblePlanError, UnsupportedModelError
from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.load import auto_class, empty_model
from slimvlm.models.parts import text_config_of
from slimvlm.planning.make import make_plan
from slimvlm.pruning.cut import prune_
from slimvlm.pruning.save import prune_checkpoint
from slimvlm.pruning.walk.walk import walk_
from slimvlm.scoring.score_model import score, score_checkpoint
from tests import tiny
from tests.handmade import logits, plan_by_hand, random_scores
from tests.tiers import tiered

GEMMAS = ["gemma3n_text", "gemma4_text"]
every_gemma = pytest.mark.parametrize("name", GEMMAS)


@every_gemma
def test_runs_of_layers_leave_those_that_others_read(name):
    model = tiny.build(name)
    scores = score(model, [tiny.batch(model)], "angular")
    assert make_plan(read_anatomy(model), scores, 0.3, "depth").layers == (2, 3, 4, 5)
    with pytest.raises(ImpossiblePlanError, match="no 3 layers in a row"):
        make_plan(read_anatomy(model), scores, 0.45, "depth")


@every_gemma
@pytest.mark.parametrize(("gone", "shared"), [(0, 2), (4, 1)])
def test_the_shared_tail_is_counted_anew(name, gone, shared):
    model = tiny.build(name)
    kept = [i for i in range(6) if i != gone]
    before = model.model.embed_tokens_per_layer.weight.detach().unflatten(1, (6, -1))
    prune_(model, plan_by_hand(read_anatomy(model), kept))
    assert text_config_of(model.config).num_kv_shared_layers == shared
    after = model.model.embed_tokens_per_layer.weight.unflatten(1, (5, -1))
    assert torch.equal(after, before[:, kept])


@every_gemma
@pytest.mark.parametrize("criterion", ["block_influence", "taylor", "gate", "activation", "obs"])
def test_criteria_see_every_unit(name, criterion):
    model = tiny.build(name)
    found = score(model, [tiny.batch(model)], criterion)
    for values in (found.layer, *(found.neuron or ())):
        assert values is None or len(values) == 0 or (values.isfinite().all() and values.std() > 0)


@every_gemma
def test_a_checkpoint_is_cut_on_disk_as_in_memory_and_layers_alone_are_refused(name, tmp_path):
    model = tiny.build(name)
    model.save_pretrained(tmp_path / "whole")
    with pytest.raises(UnsupportedModelError, match=r"low memory.*read keys"):
        score_checkpoint(tmp_path / "whole", [tiny.batch(model)], "activation")
    plan = plan_by_hand(read_anatomy(model), [1, 2, 3, 5], neurons=range(0, 96, 2))
    prune_checkpoint(tmp_path / "whole", plan, tmp_path / "cut")
    prune_(model, plan)
    loaded = auto_class(model.config).from_pretrained(tmp_path / "cut")
    batch = tiny.batch(model, 24)
    assert torch.equal(logits(loaded, batch), logits(model, batch))


@pytest.mark.parametrize("kind", [hf.Gemma3nTextConfig, hf.Gemma4TextConfig])
def test_a_seam_in_the_tail_is_looked_at_when_what_it_reads_is_there(kind):
    layers = {"num_hidden_layers": 8, "num_kv_shared_layers": 4}
    kinds = ["sliding_attention", "full_attention"] * 4
    config = kind(**{**tiny.GEMMA_TEXT, **layers, "layer_types": kinds})
    if kind is hf.Gemma3nTextConfig:
        config.activation_sparsity_pattern = [0.0] * 8
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    data = [tiny.batch(model, seed=seed) for seed in range(3)]
    plan = plan_by_hand(read_anatomy(model), [0, 1, 2, 3, 4, 5, 7], neurons=range(64))
    report = walk_(model, data, plan=plan, repair="both").report
    assert report.notes == ["layer 5 has a norm or a scale after its MLP: its seam is not repaired"]
    assert report.refits
    assert read_anatomy(model).layers == plan.after.layers


def test_doubled_mlps_stay_whole(tmp_path):
    config = hf.Gemma4TextConfig(**tiny.GEMMA_TEXT, use_double_wide_mlp=True)
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    anatomy = read_anatomy(model)
    assert anatomy.mlp_widths == []
    prune_(model, plan_by_hand(anatomy, [0, 2, 3, 4, 5]))
    model.save_pretrained(tmp_path)
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    batch = tiny.batch(model)
    assert torch.equal(logits(loaded, batch), logits(model, batch))


LARGE = yaml.safe_load(Path(__file__).with_name("gemmas.yaml").read_text())


@pytest.mark.parametrize("name", tiered(LARGE, lambda name: name in ("gemma3n", "gemma4")))
@pytest.mark.parametrize("axis", tiered(["depth", "width", "both"], lambda axis: axis == "both"))
def test_shapes_of_full_size(name, axis):
    kind, changes = LARGE[name]
    model = empty_model(getattr(hf, kind)(**changes))
    anatomy = read_anatomy(model)
    plan = make_plan(anatomy, random_scores(anatomy), 0.15, axis)
    prune_(model, plan)
    assert read_anatomy(model) == plan.after
    assert plan.after.total_params == sum(p.numel() for p in model.parameters())
    assert plan.ratio == pytest.approx(0.15, abs=0.03)
