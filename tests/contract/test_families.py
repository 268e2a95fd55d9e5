"""The battery that every family passes: inspect, plan, prune, save, reload."""

import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers as hf
import yaml
from torch import Tensor
from transformers import PreTrainedModel

import slimvlm as sv
from slimvlm.core.errors import ImpossiblePlanError
from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.families import BACKBONES
from slimvlm.models.families import FAMILIES as ROWS
from slimvlm.models.load import auto_class
from slimvlm.models.parts import Parts, text_config_of
from slimvlm.planning.make import make_plan
from slimvlm.planning.plan import Plan
from slimvlm.pruning.cut import mask_, prune_
from slimvlm.runs.tables import as_markdown
from tests import tiny
from tests.handmade import (
    assert_equal,
    assert_untouched,
    logits,
    plan_by_hand,
    random_scores,
    snapshot,
)
from tests.tiers import ARCHETYPES, tiered
from tests.tolerances import FORWARD, assert_close

FAMILIES = list(tiny.CONFIGS)
TABLE = yaml.safe_load(Path(__file__).with_name("families.yaml").read_text())
RATIOS = {"depth": 0.4, "width": 0.3, "both": 0.5}
FEW_NEURONS_RATIOS = {"depth": 0.4, "width": 0.2, "both": 0.4}
PROJECTOR = re.compile("|".join(TABLE["projector"]))
VISION = re.compile(r"vision_tower|vision_model|visual|embed_tokens_extend|audio_tower")
PER_LAYER = re.compile(r"embed_tokens_per_layer|per_layer_model_projection")
CASES = [
    pytest.param(name, axis, id=f"{name}-{axis}")
    for name in FAMILIES
    for axis in RATIOS
    if axis == "depth" or name not in TABLE["only_depth"]
]
EXPERTS = {"experts": (0.25, 0.0), "half of the experts": (0.5, 0.0), "experts, both": (0.25, 0.4)}
"""How many of the experts go, and the ratio that is reached along both axes."""
CASES += [
    pytest.param(name, axis, id=f"{name}-{axis}")
    for name in TABLE["with_experts"]
    for axis in EXPERTS
]
TEXT_TOKENS = 24  # longer than the sliding windows of the tiny models

every_family = pytest.mark.parametrize("name", tiered(FAMILIES))


def by_default(name, axis):
    whole = axis == "both" or name in TABLE["only_depth"]
    return axis == "experts" or (whole and name in ARCHETYPES)


every_case = pytest.mark.parametrize(("name", "axis"), tiered(CASES, by_default))


@dataclass
class Case:
    """One family pruned along one axis, with what to compare it to."""

    plan: Plan
    model: PreTrainedModel
    batch: dict[str, Tensor]
    masked_logits: Tensor

    @property
    def inputs(self):
        return {name: value for name, value in self.batch.items() if name != "labels"}


def with_masked_logits(name, plan):
    batch = tiny.batch(tiny.build(name), TEXT_TOKENS)
    masked = tiny.build(name)
    mask_(masked, plan)
    model = tiny.build(name)
    prune_(model, plan)
    return Case(plan, model, batch, logits(masked, batch))


@cache
def pruned(name, axis):
    """Shared by the tests below, none of which changes it."""
    anatomy = read_anatomy(tiny.build(name))
    scores = random_scores(anatomy)
    if axis in EXPERTS:
        experts, ratio = EXPERTS[axis]
        plan = make_plan(anatomy, scores, ratio, "both", experts=experts)
    else:
        ratio = (FEW_NEURONS_RATIOS if name in TABLE["fixed_neurons"] else RATIOS)[axis]
        plan = make_plan(anatomy, scores, ratio, axis)
    return with_masked_logits(name, plan)


def test_every_family_of_the_table_has_a_tiny_model():
    configs = [make() for make in tiny.CONFIGS.values()]
    multimodal = {name for name, row in ROWS.items() if row.vision}
    assert multimodal <= {config.model_type for config in configs}
    inside = {text_config_of(config).model_type for config in configs}
    assert set(BACKBONES) <= inside


@every_family
def test_parts_are_counted_exactly(name):
    model = tiny.build(name)
    anatomy = read_anatomy(model)
    sizes = Counter[str]()
    for path, parameter in model.named_parameters():
        is_vision = "vision" if VISION.search(path) else "backbone"
        sizes["projector" if PROJECTOR.search(path) else is_vision] += parameter.numel()
    assert anatomy.vision_params == sizes["vision"]
    assert anatomy.projector_params == sizes["projector"]
    assert anatomy.backbone_params == sizes["backbone"]
    assert anatomy.total_params == sum(sizes.values())
    if tiny.is_multimodal(model.config):
        assert len(sizes) == 3
    layer_sizes = [sum(p.numel() for p in x.parameters()) for x in Parts(model).layers]
    slices = sum(p.numel() for n, p in model.named_parameters() if PER_LAYER.search(n))
    slice_size, rest = divmod(slices, anatomy.num_layers)
    assert rest == 0
    assert [shape.params for shape in anatomy.layers] == [size + slice_size for size in layer_sizes]


def configured_neurons(config, anatomy):
    """Read the MLP width of every layer from a text configuration."""
    said = getattr(config, anatomy.backbone.neuron_field, 0)
    return said if isinstance(said, list) else [said] * anatomy.num_layers


@every_family
def test_the_plan_of_nothing_changes_no_bit(name):
    model = tiny.build(name)
    batch = tiny.batch(model, TEXT_TOKENS)
    before, expected = snapshot(model), logits(model, batch)
    for apply in (prune_, mask_):
        apply(model, Plan.everything(read_anatomy(model)))
        assert_untouched(model, before)
        assert torch.equal(logits(model, batch), expected)


@every_case
def test_slicing_is_masking(name, axis):
    case = pruned(name, axis)
    dense = tiny.build(name)
    whole = logits(dense, case.batch)
    matters = 0.02 if axis in EXPERTS else 0.05
    assert not torch.allclose(case.masked_logits, whole, atol=matters)
    assert_close(logits(case.model, case.batch), case.masked_logits, FORWARD)


@every_case
def test_predicted_parameters_are_counted_and_the_config_says_what_modules_are(name, axis):
    case = pruned(name, axis)
    before, after = case.plan.before, case.plan.after
    counted = sum(p.numel() for p in case.model.parameters())
    assert after.total_params == counted
    assert case.plan.ratio == (before.total_params - counted) / before.backbone_params
    assert read_anatomy(case.model) == after
    layers = Parts(case.model).layers
    text_config = text_config_of(case.model.config)
    assert len(layers) == text_config.num_hidden_layers == after.num_layers
    assert case.model.config.get_text_config().num_hidden_layers == after.num_layers
    original = text_config_of(tiny.build(name).config)
    for field in after.backbone.layer_lists:
        if field != after.backbone.neuron_field and getattr(text_config, field, None) is not None:
            expected = [getattr(original, field)[i] for i in case.plan.layers]
            assert getattr(text_config, field) == expected
    for field in after.backbone.layer_indices:
        kept = [case.plan.layers[position] for position in getattr(text_config, field)]
        assert kept == [i for i in getattr(original, field) if i in case.plan.layers]
    for position, layer in enumerate(layers):
        numbers = [m.layer_idx for m in layer.modules() if hasattr(m, "layer_idx")]
        assert set(numbers) == {position}
    for position, shape in enumerate(after.layers):
        if after.backbone.attention:
            assert hasattr(layers[position], "self_attn") == bool(shape.num_kv_heads)
        if not shape.num_kv_heads:
            continue
        assert text_config.num_attention_heads == shape.num_heads
        assert getattr(text_config, "num_key_value_heads", 8) == shape.num_kv_heads
        attention = layers[position].get_submodule("self_attn")
        assert getattr(attention, "num_key_value_groups", 1) == shape.queries_per_group
        assert attention.head_dim == shape.head_dim
        assert attention.config is text_config
    for shape, neurons in zip(after.layers, configured_neurons(text_config, after), strict=True):
        assert shape.intermediate_size in (0, neurons)
    for _, _, linear in Parts(case.model).projections():
        assert linear.weight.shape == (linear.out_features, linear.in_features)


@every_case
def test_a_saved_model_is_the_model(name, axis, tmp_path):
    case = pruned(name, axis)
    case.model.save_pretrained(tmp_path)
    loaded, report = auto_class(case.model.config).from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert {kind: found for kind, found in report.items() if found} == {}
    assert_equal(loaded.state_dict(), case.model.state_dict())
    found, expected = logits(loaded.eval(), case.batch), logits(case.model, case.batch)
    if not has_experts(case.plan.before):
        assert torch.equal(found, expected)
    else:  # grouped matrix products of experts round by where a weight lies in memory
        assert_close(found, expected, FORWARD)
    assert read_anatomy(loaded) == case.plan.after


def has_experts(anatomy):
    return any("experts" in projection.path for projection in anatomy.backbone.mlp)


def generated(case, use_cache):
    return case.model.generate(
        **case.inputs, max_new_tokens=5, do_sample=False, use_cache=use_cache
    )


@every_case
def test_the_cache_changes_no_answer(name, axis):
    case = pruned(name, axis)
    cached = generated(case, use_cache=True)
    assert cached.shape[1] == case.batch["input_ids"].shape[1] + 5
    assert torch.equal(cached, generated(case, use_cache=False))


@pytest.mark.parametrize("name", ["gemma2", "paligemma", "gemma3"])
def test_tied_heads_stay_tied_and_frozen_weights_frozen(name):
    model, plan = tiny.build(name).requires_grad_(False), pruned(name, "both").plan
    prune_(model, plan)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert not any(parameter.requires_grad for parameter in model.parameters())


# Llama's configuration refuses head counts that do not divide the hidden size. Mistral is the
# same function without that rule.
@pytest.mark.parametrize("name", tiered(TABLE["llama_inside"], lambda name: name[-5:] == "llama"))
def test_retyping_changes_no_bit_and_nothing_is_retyped_without_need(name, tmp_path, monkeypatch):
    model, stays_llama = tiny.build(name), tiny.build(name)
    plan = plan_by_hand(read_anatomy(model), kv_groups=[0, 2, 3], neurons=range(7, 77))
    assert plan.needs_retype
    prune_(model, plan)
    monkeypatch.setattr("slimvlm.models.load.retype_modules_", lambda *_: None)
    prune_(stays_llama, plan)
    batch = tiny.batch(model, TEXT_TOKENS)
    assert torch.equal(logits(model, batch), logits(stays_llama, batch))
    assert {type(layer).__name__ for layer in Parts(model).layers} == {"MistralDecoderLayer"}
    assert {type(layer).__name__ for layer in Parts(stays_llama).layers} == {"LlamaDecoderLayer"}
    model.save_pretrained(tmp_path)
    loaded = auto_class(model.config).from_pretrained(tmp_path)
    text_config = text_config_of(loaded.config)
    assert text_config.model_type == "mistral"
    assert text_config.sliding_window is None
    assert type(loaded) is type(model)
    place = {"_name_or_path": None}
    assert {**loaded.config.to_dict(), **place} == {**model.config.to_dict(), **place}
    model = tiny.build(name)
    plan = plan_by_hand(read_anatomy(model), kv_groups=[0, 2], neurons=range(50))
    assert not plan.needs_retype
    prune_(model, plan)
    assert text_config_of(model.config).model_type == "llama"


def llama_with(**changes):
    torch.manual_seed(0)
    config = tiny.llama(**changes)
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval()


def test_scaled_rope_survives_retyping_and_biases_forbid_it(tmp_path):
    scaled = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope = {"rope_type": "llama3", "rope_theta": 500.0, **scaled}
    rope["original_max_position_embeddings"] = 16
    changes = {"rope_parameters": rope, "rms_norm_eps": 1e-3, "tie_word_embeddings": True}
    model, masked = llama_with(**changes), llama_with(**changes)
    plan = plan_by_hand(read_anatomy(model), kv_groups=[0, 1, 3], neurons=range(40))
    masked.load_state_dict(model.state_dict())
    mask_(masked, plan)
    prune_(model, plan)
    batch = tiny.batch(model, TEXT_TOKENS)
    assert_close(logits(model, batch), logits(masked, batch), FORWARD)
    model.save_pretrained(tmp_path)
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    model = llama_with(attention_bias=True)
    anatomy = read_anatomy(model)
    assert anatomy.legal_kv_heads() == [1, 2, 4]
    before = snapshot(model)
    with pytest.raises(ImpossiblePlanError, match="1, 2, 4"):
        prune_(model, plan_by_hand(anatomy, kv_groups=[0, 1, 2]))
    assert_untouched(model, before)
    plan = make_plan(anatomy, random_scores(anatomy), 0.3, "width")
    assert len(plan.kv_groups[0]) in (1, 2, 4)
    prune_(model, plan)
    assert read_anatomy(model) == plan.after


# Refusals: the message names the legal counts and no bit of the model has changed.
@pytest.mark.parametrize("name", [*TABLE["no_heads"], *TABLE["dividing_heads"]])
def test_impossible_head_counts_are_refused_and_legal_ones_accepted(name):
    model = tiny.build(name)
    anatomy = read_anatomy(model)
    legal = anatomy.legal_kv_heads()
    illegal = [count for count in range(1, 4) if count not in legal]
    assert illegal
    before, batch = snapshot(model), tiny.batch(model, TEXT_TOKENS)
    expected = logits(model, batch)
    for count in illegal:
        with pytest.raises(ImpossiblePlanError) as refusal:
            prune_(model, plan_by_hand(anatomy, layers=[0, 1], kv_groups=range(count)))
        assert f"{count} KV groups" in str(refusal.value)
        assert ", ".join(map(str, legal)) in str(refusal.value)
    assert_untouched(model, before)
    assert torch.equal(logits(model, batch), expected)
    for count in legal if name in TABLE["dividing_heads"] else ():
        model, plan = tiny.build(name), plan_by_hand(anatomy, kv_groups=range(count))
        prune_(model, plan)
        assert read_anatomy(model) == plan.after


def test_pinned_layers_are_never_chosen_and_stay():
    anatomy = read_anatomy(tiny.build("qwen3_vl"))
    assert anatomy.pinned_layers == (0,)
    for seed in range(10):
        scores = random_scores(anatomy, seed)
        assert scores.layer is not None
        scores.layer[0] = -1  # the first to go, if it could
        for ratio in (0.2, 0.4, 0.6):
            for axis in ("depth", "both"):
                assert make_plan(anatomy, scores, ratio, axis).layers[0] == 0
    unpinned = read_anatomy(tiny.build("llava-qwen3"))
    assert make_plan(unpinned, scores, 0.2, "depth").layers == (1, 2, 3)
    config = tiny.qwen3_vl()
    config.vision_config.deepstack_visual_indexes = [0, 1]
    anatomy = read_anatomy(hf.AutoModelForImageTextToText.from_config(config))
    assert anatomy.pinned_layers == (0, 1)
    assert make_plan(anatomy, random_scores(anatomy), 0.4, "depth").layers[:2] == (0, 1)
    with pytest.raises(ImpossiblePlanError, match=r"layers \[0\] of 'qwen3_vl' must stay"):
        plan_by_hand(anatomy, layers=[1, 2, 3])
    assert plan_by_hand(anatomy, layers=[0, 1, 3]).layers == (0, 1, 3)


# The table of docs/families.md; ``--update-golden`` rewrites it.

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
BEGIN, END = "<!-- families: begin -->\n", "<!-- families: end -->\n"
HEADER = (
    *("battery", "model", "backbone", "layers", "KV groups", "neurons", "uneven"),
    *("reload", "input"),
)


def row(name):
    """Describe the units of the tiny model that can be removed."""
    shape = sv.anatomy(tiny.CONFIGS[name]())
    sees = shape.family.vision is not None and shape.model_type not in tiny.TEXT_ONLY
    pinned = ", ".join(map(str, shape.pinned_layers))
    legal = shape.legal_kv_heads()
    groups = {0: "none", 1: "fixed"}.get(len(legal), "of 4: " + ", ".join(map(str, legal)))
    if len(legal) > 1:
        groups = "any" if legal == list(range(1, legal[-1] + 1)) else groups
        groups += " (as Mistral)" * shape.retypable
    multiple = shape.backbone.neuron_multiple
    neurons = "any" if multiple == 1 else f"multiples of {multiple}"
    if not shape.mlp_widths or shape.fixed_neurons is not None:
        neurons = "fixed" if shape.mlp_widths else "none"
    return [
        *(name, f"`{shape.model_type}`", f"`{shape.text_type}`"),
        f"all but {pinned} of {shape.num_layers}" if pinned else "any",
        *(groups, neurons, "yes" if shape.backbone.can_be_uneven else "no"),
        "1e-5" if has_experts(shape) else "bit-equal",
        "picture and text" if sees else "text",
    ]


def test_the_page_has_the_table_of_the_battery(pytestconfig):
    table = as_markdown(HEADER, [row(name) for name in FAMILIES])
    before, _, rest = PAGE.read_text().partition(BEGIN)
    written, _, after = rest.partition(END)
    if pytestconfig.getoption("--update-golden"):
        PAGE.write_text(before + BEGIN + table + END + after)
    else:
        assert written == table, "run pytest with --update-golden and look at the difference"
