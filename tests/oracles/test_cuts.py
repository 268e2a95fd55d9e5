"""What is cut, by hand: kinds of layer, pictures that still count, caches, engines' positions.

A letter is a layer: ``f`` full attention, ``s`` a sliding window, ``c`` chunks, ``x`` attention to
a picture, ``l`` linear attention, ``v`` a convolution.
"""

from dataclasses import replace
from itertools import combinations

import pytest
import torch

from slimvlm.core.errors import ImpossiblePlanError
from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.cost import kv_cache_bytes
from slimvlm.models.load import empty_model
from slimvlm.models.parts import Parts, text_config_of
from slimvlm.models.serving import check
from slimvlm.planning.make import make_plan
from slimvlm.pruning.cut import prune_
from slimvlm.pruning.walk.walk import walk_
from slimvlm.scoring.unit_scores import Scores
from tests import tiny
from tests.handmade import logits, plan_by_hand, random_scores
from tests.tables import tables
from tests.tiers import ARCHETYPES

KINDS = {  # of the tiny models, as `tests.tiny` configures them
    **{"gemma2": "sfsf", "gemma3": "sfsf", "aya_vision": "sssf", "llama4": "cccf"},
    **{"mllama": "fxfxf", "qwen3_5": "lflf", "qwen3_5_moe": "lflf", "lfm2_vl": "vfvf"},
    **{"gemma3n_text": "sfsfsf", "gemma4_text": "sfsfsf"},
}
WORDS = {
    **{"f": "full_attention", "s": "sliding_attention", "c": "chunked_attention"},
    **{"x": "cross_attention", "l": "linear_attention", "v": "conv"},
}
READ_BY_LATER = {"gemma3n_text": {2, 3, 5}, "gemma4_text": {2, 3, 5}}
"""Layers whose keys the last ones read, and the last one."""
LONG = 40  # tokens of text: windows and chunks have 16


def subsets(kinds):
    return [kept for n in range(1, len(kinds)) for kept in combinations(range(len(kinds)), n)]


@pytest.mark.parametrize("name", KINDS)
def test_a_plan_that_ends_a_kind_is_refused_and_every_other_is_legal(name):
    kinds, anatomy = KINDS[name], read_anatomy(tiny.build(name))
    assert [shape.kind for shape in anatomy.layers] == [WORDS[letter] for letter in kinds]
    for kept in subsets(kinds):
        left = {kinds[index] for index in kept}
        if READ_BY_LATER.get(name, set()) <= set(kept) and left == set(kinds):
            assert plan_by_hand(anatomy, kept).layers == kept
        else:
            with pytest.raises(ImpossiblePlanError, match=r"stays; at least one|must stay"):
                plan_by_hand(anatomy, kept)
    for letter in set(kinds):  # scores that want all layers of a kind to go first
        order = torch.tensor([float(kind != letter) for kind in kinds])
        plan = make_plan(anatomy, Scores("x", layer=order), 0.6, "depth", counting="per_layer")
        assert {kinds[index] for index in plan.layers} == set(kinds)


SEEING = [n for n in (*ARCHETYPES, *KINDS) if "pixel_values" in tiny.batch(tiny.build(n))]


@pytest.mark.parametrize("name", dict.fromkeys(SEEING))
@pytest.mark.parametrize("axis", ["depth", "width", "both"])
def test_a_picture_counts_after_any_cut(name, axis):
    model = tiny.build(name)
    anatomy, batch = read_anatomy(model), tiny.batch(model)
    scores = random_scores(anatomy)
    for index, shape in enumerate(anatomy.layers):
        if shape.kind == "cross_attention":
            scores.layer[index] = -1.0  # as block influence says of them
    how = {"counting": "per_layer"} if axis == "depth" else {}
    prune_(model, make_plan(anatomy, scores, 0.5 if how else 0.2, axis, **how))
    other = {**batch, "pixel_values": -batch["pixel_values"]}
    change = (logits(model, batch) - logits(model, other))[:, -1].abs().max()
    assert change > 1e-5


def test_a_summary_warns_where_half_of_a_kind_goes():
    anatomy = read_anatomy(tiny.build("mllama"))
    assert "only" not in plan_by_hand(anatomy, (0, 1, 3, 4)).summary()
    assert "only 1 of 2 layers with cross_attention" in plan_by_hand(anatomy, (0, 2, 3)).summary()


CACHED = ("llama", "gemma2", "gemma3n_text", "gemma4_text", "lfm2", "qwen3_5_text", "cohere2")


@pytest.mark.parametrize("name", CACHED)
@pytest.mark.parametrize("tokens", [12, LONG])
def test_a_cache_is_as_large_as_transformers_makes_it(name, tokens):
    model = tiny.build(name)
    with torch.no_grad():
        output = model(input_ids=torch.randint(32, 64, (1, tokens)), use_cache=True)
    held = [
        layer for layer in output.past_key_values.layers if getattr(layer, "keys", None) is not None
    ]
    shapes = [part.shape for layer in held for part in (layer.keys, layer.values)]
    # a window of 16 keeps 15 tokens beside the one that comes
    found = sum(4 * heads * (16 if n == 15 else n) * width for _, heads, n, width in shapes)
    assert kv_cache_bytes(read_anatomy(model), tokens, "float32") == found > 0


def test_layers_that_no_sample_runs_are_cut_by_their_weights_as_the_note_says():
    model = tiny.build("mllama")
    blind = [
        {k: v for k, v in tiny.batch(model, 24, seed).items() if k in ("input_ids", "labels")}
        for seed in range(4)
    ]
    found = walk_(model, blind, 0.2, units=("neuron",), repair="width")
    assert "layer 1, 3: units removed by the size of their weights" in found.report.summary()
    columns = Parts(tiny.build("mllama")).layers[1].mlp.down_proj.weight.detach().norm(dim=0)
    count = len(found.plan.neurons[1])
    assert found.plan.neurons[1] == tuple(columns.topk(count).indices.sort().values.tolist())


# Engines

POSITIONS = tables(__file__)


def configured(name, kinds):
    """The anatomy of a tiny model with other layers."""
    config = tiny.CONFIGS[name]()
    text = text_config_of(config)
    text.num_hidden_layers, text.layer_types = len(kinds), [WORDS[letter] for letter in kinds]
    if name == "llama4":
        text.no_rope_layers = [int(letter == "c") for letter in kinds]
        text.moe_layers = [i for i in text.moe_layers if i < len(kinds)]
    return read_anatomy(empty_model(config))


def level(shape, engine, rule):
    return {f.rule: f.level for f in check(shape, [engine])}.get(rule)


@pytest.mark.parametrize(("engine", "name"), [(e, n) for e in POSITIONS for n in POSITIONS[e]])
def test_an_engine_that_takes_kinds_from_positions_is_told_apart(engine, name):
    right, wrong = (kinds.split() for kinds in POSITIONS[engine][name])
    for kinds in (*right, *wrong):
        found = level(configured(name, kinds), engine, "layer kinds")
        assert (found == "fail") == (kinds in wrong)


SCALES = {  # (layers, heads, query_pre_attn_scalar) that are right, and others; llama.cpp
    # gemma2.cpp: 46 layers divide by hidden size / heads, any other number by head_dim
    "gemma2": ([(26, 8, 128), (46, 32, 144)], [(44, 32, 144), (46, 16, 144)]),
    # gemma3.cpp: 62
    "gemma3": ([(34, 8, 128), (62, 32, 144)], [(61, 32, 144)]),
}


@pytest.mark.parametrize("name", SCALES)
def test_llama_cpp_takes_the_scale_of_attention_from_the_layer_count(name):
    whole, (right, wrong) = read_anatomy(tiny.build(name)), SCALES[name]
    for layers, heads, scalar in (*right, *wrong):
        layer = replace(whole.layers[0], head_dim=128, num_kv_heads=heads, queries_per_group=1)
        shape = replace(whole.with_layers([layer] * layers), hidden_size=4608, query_scalar=scalar)
        found = level(shape, "gguf", "attention scale")
        assert (found == "fail") == ((layers, heads, scalar) in wrong)


def test_vllm_sizes_the_merger_of_glm_ocr_by_its_neurons():
    """vLLM glm_ocr.py: ``context_dim=text_config.intermediate_size``; the weights have 3 x 64."""
    shape = read_anatomy(tiny.build("glm_ocr"))
    for neurons, expected in ((192, "unknown"), (128, "fail")):
        layers = [replace(layer, intermediate_size=neurons) for layer in shape.layers]
        found = [f for f in check(shape.with_layers(layers), ["vllm"]) if f.rule == "MLP width"]
        assert expected in {f.level for f in found}
