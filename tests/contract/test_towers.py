"""Vision towers of every family: neurons and layers go, and what is left is what it should be."""

import copy
import re
from dataclasses import replace

import pytest
import torch

import slimvlm as sv
from slimvlm.core.errors import ConfigError, ImpossiblePlanError
from slimvlm.models.load import auto_class
from tests import tiny
from tests import tiny_folder as folders
from tests.gpu.alike import config
from tests.handmade import assert_equal, logits, plan_by_hand, random_scores, refused
from tests.tiers import tiered
from tests.tolerances import FORWARD, assert_close

WHOLE = {
    "qwen2_vl": "whole multiple of its hidden size",
    "glm4v": "hidden size of the language model",
    "llama4": "adapter",
    "minicpmv4_6": "merger",
    "phi4_multimodal": "head that nobody reads",
    "mllama": "two stacks",
    **dict.fromkeys(("gemma3n", "fast_vlm", "perception_lm"), "not known"),
}
"""Families whose towers must stay whole, and a word of the reason."""
SEEING = [name for name, make in tiny.CONFIGS.items() if tiny.is_multimodal(make())]
NAMES = [name for name in SEEING if name not in WHOLE]
KINDS = {getattr(tiny.CONFIGS[n]().vision_config, "model_type", n): n for n in reversed(NAMES)}
"""One family for each type of tower."""
few_towers = pytest.mark.parametrize(
    "name", tiered(NAMES, ("llava-llama", "qwen3_vl").__contains__)
)
every_tower = pytest.mark.parametrize("name", tiered(NAMES, {*KINDS.values()}.__contains__))


def patches(count=16, size=192, seed=1):
    return torch.randn(1, count, size, generator=torch.Generator().manual_seed(seed))


def tower_inputs(model):
    """What the tower itself takes, of families through which `tiny.batch` sends text alone."""
    at = torch.tensor([[[x, y] for y in range(4) for x in range(4)]])
    return {
        "molmo2": lambda: {"pixel_values": patches()},
        "gemma4": lambda: {"pixel_values": patches(), "pixel_position_ids": at},
        "kosmos-2.5": lambda: {
            "flattened_patches": torch.cat([at.flip(-1).float() + 1, patches()], -1)
        },
        "lfm2_vl": lambda: {
            **{"pixel_values": patches(), "spatial_shapes": torch.tensor([[4, 4]])},
            "pixel_attention_mask": torch.ones(1, 16, dtype=torch.long),
        },
    }[model.config.model_type]()


@torch.no_grad()
def said(model):
    """The answer to a picture, or what the tower makes of one."""
    if model.config.model_type not in tiny.TEXT_ONLY:
        return logits(model, tiny.batch(model))
    path = sv.anatomy(model.config).family.vision
    return model.get_submodule(path)(**tower_inputs(model)).last_hidden_state


def plan_of(anatomy, layers=None, count=None, decoder=None):
    """Keep these layers of the tower, with so many neurons: other ones in each layer."""
    tower, generator = anatomy.tower, torch.Generator().manual_seed(5)
    plan = plan_by_hand(tower, layers)
    kept = tuple(
        tuple(sorted(torch.randperm(len(all_), generator=generator)[:count].tolist()))
        for all_ in plan.neurons
    )
    return replace(decoder or sv.Plan.everything(anatomy), tower=replace(plan, neurons=kept))


def tower_params(model):
    """Parameters of the tower, counted by their names; a merger inside it is no part of it."""
    names = sv.anatomy(model.config).family
    return sum(
        parameter.numel()
        for path, parameter in model.named_parameters()
        if path.startswith(f"{names.vision}.")
        and not any(path.startswith(f"{part}.") for part in names.projector)
    )


def assert_applied(config, plan, tmp_path):
    """Masked is cut is written from files is read by transformers; the forecasts are right."""
    whole, masked, cut = (tiny.made(copy.deepcopy(config)) for _ in range(3))
    sv.mask_(masked, plan)
    sv.prune_(cut, plan)
    expected = said(masked)
    assert not torch.allclose(expected, said(whole), atol=1e-3), "nothing was removed"
    assert_close(said(cut), expected, FORWARD)
    assert sv.anatomy(cut.config) == plan.after
    assert sum(p.numel() for p in cut.parameters()) == plan.after.total_params
    before, after = tower_params(whole), tower_params(cut)
    assert plan.tower.ratio == pytest.approx((before - after) / before)
    assert plan.after.vision_params == plan.before.vision_params - before + after
    assert sv.Plan.from_dict(plan.to_dict()) == plan
    plan.save(tmp_path / "plan.json")
    assert sv.Plan.load(tmp_path / "plan.json") == plan
    whole.save_pretrained(tmp_path / "whole")
    if config.model_type in ("molmo2",):  # is not read in parts
        sv.save(cut, None, tmp_path / "cut", plan)
    else:
        sv.prune_checkpoint(tmp_path / "whole", plan, tmp_path / "cut")
    loaded, report = auto_class(cut.config).from_pretrained(
        tmp_path / "cut", output_loading_info=True
    )
    assert {kind: found for kind, found in report.items() if found} == {}
    assert_equal(loaded.state_dict(), cut.state_dict())
    if plan.before.experts_per_token:
        assert_close(said(loaded.eval()), said(cut), FORWARD)  # as in the battery of families
    else:
        assert torch.equal(said(loaded.eval()), said(cut))
    assert sv.anatomy(loaded.config) == plan.after
    return loaded


@every_tower
def test_masked_is_cut_is_saved(name, tmp_path):
    config = tiny.CONFIGS[name]()
    assert_applied(config, plan_of(sv.anatomy(config), count=20), tmp_path)


@few_towers
def test_with_the_decoder_by_ratio(name, tmp_path):
    config = tiny.CONFIGS[name]()
    anatomy = sv.anatomy(config)
    plan = sv.make_plan(anatomy, random_scores(anatomy), 0.4, "depth", tower_ratio=0.2)
    assert plan.ratio > 0.3
    assert plan.tower.ratio > 0.15
    assert_applied(config, plan, tmp_path)


# Layers that nobody reads, and numbers of layers in configurations.

SIX = {"num_hidden_layers": 6}


def configured(name, tower=(), **fields):
    """A tiny configuration with other fields, and other fields of its tower."""
    config = tiny.CONFIGS[name](**fields)
    for field, value in dict(tower).items():
        setattr(config.vision_config, field, value)
    return config


def with_siglip(layer, strategy="full", **tower):
    return configured(
        *("llava-phi", {**SIX, **tower}),
        **{"vision_feature_layer": layer, "vision_feature_select_strategy": strategy},
    )


def with_siglip_head():
    """Its head is as wide as its layers, and no language model reads it."""
    return tiny.llava(
        vision_config=tiny.siglip(vision_use_head=True),
        text_config=tiny.llama(),
        **{"vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
    )


def with_siglip2_head():
    config = tiny.CONFIGS["lfm2_vl"]()
    config.vision_config.vision_use_head = True
    return config


@pytest.mark.parametrize("make", [with_siglip_head, with_siglip2_head])
def test_a_head_of_the_same_width_shrinks_with_the_layers(make, tmp_path):
    assert_applied(make(), plan_of(sv.anatomy(make()), count=24), tmp_path)


UNREAD = {
    "clip": (lambda: configured("llava-llama", SIX), 1, 5),
    "clip, two layers": (lambda: configured("llava-llama"), 1, 1),
    "tiles": (lambda: configured("llava_next", SIX), 1, 5),
    "more": (lambda: configured("llava-qwen2", SIX, vision_feature_layer=-4), 3, 3),
    "positive": (lambda: configured("llava-qwen2", SIX, vision_feature_layer=2), 4, 2),
    "list": (lambda: configured("llava-llama", SIX, vision_feature_layer=[-3, 1]), 2, [4, 1]),
    "siglip": (lambda: with_siglip(-2), 1, 5),
    "vip": (
        lambda: configured("vipllava", SIX, vision_feature_layers=[-2, -4, 0, 2]),
        *(1, [5, 3, 0, 2]),
    ),
    "pixtral": (lambda: configured("llava-pixtral", SIX, vision_feature_layer=-2), 1, 5),
    "mistral3": (lambda: configured("mistral3", SIX, vision_feature_layer=-3), 2, 4),
    "internvl": (lambda: configured("internvl-qwen2", SIX, vision_feature_layer=-2), 1, 5),
    "internvl, normed": (
        lambda: configured(
            *("internvl-qwen2", {**SIX, "use_mean_pooling": False}), vision_feature_layer=-2
        ),
        *(1, 5),
    ),
    "onevision": (lambda: configured("llava_onevision", SIX, vision_feature_layer=-2), 1, 5),
    "aya": (lambda: configured("aya_vision", SIX, vision_feature_layer=-2), 1, 5),
}
"""Configurations, how many last layers nobody reads, and the number once these are gone."""


@torch.no_grad()
def features(model):
    seen = tiny.batch(model)
    given = {n: v for n, v in seen.items() if n in ("pixel_values", "image_sizes")}
    found = model.model.get_image_features(**given, return_dict=True).pooler_output
    return torch.cat([each.flatten(0, -2) for each in found])


@pytest.mark.parametrize("case", UNREAD)
def test_what_nobody_reads_goes_first_and_changes_no_bit(case, tmp_path):
    make, unread, number = UNREAD[case]
    config = make()
    model, anatomy = tiny.made(make()), sv.anatomy(config)
    depth = config.vision_config.num_hidden_layers
    # a share so small that nothing else has to go
    plan = sv.make_plan(anatomy, [], 0.0, tower_ratio=0.01)
    assert plan.tower.layers == tuple(range(depth - unread))
    assert plan.ratio == 0
    assert {len(plan.tower.neurons[i]) for i in plan.tower.layers} == {48}
    before, shown = logits(model, tiny.batch(model)), features(model)
    sv.prune_(model, plan)
    sv.save(model, None, tmp_path / "out", plan)
    loaded = auto_class(config).from_pretrained(tmp_path / "out").eval()
    for each in (model, loaded):
        assert torch.equal(features(each), shown)
        assert torch.equal(logits(each, tiny.batch(each)), before)
        assert each.config.vision_feature_layer == number
        assert each.config.vision_config.num_hidden_layers == depth - unread
    again = sv.make_plan(sv.anatomy(loaded.config), [], 0.0, tower_ratio=0.01)
    assert len(again.tower.layers) == depth - unread


@pytest.mark.parametrize(
    "name", [n for n in KINDS.values() if n not in ("vipllava", "llava-llama")]
)
def test_a_layer_that_is_read_stays(name):
    anatomy = sv.anatomy(tiny.CONFIGS[name]())
    plan = sv.make_plan(anatomy, [], 0.0, tower_ratio=0.05)
    assert plan.tower.layers == tuple(range(anatomy.tower.num_layers))


QWEN = {"depth": 6}
DEEP = {
    "qwen2_5_vl": (
        lambda: configured("qwen2_5_vl", {**QWEN, "fullatt_block_indexes": [1, 3, 5]}),
        [((0, 1, 3, 4), {"vision_config.fullatt_block_indexes": [1, 2]}),
         ((0, 2, 4, 5), {"vision_config.fullatt_block_indexes": [3]})],
    ),
    "qwen3_vl": (
        lambda: configured("qwen3_vl", {**QWEN, "deepstack_visual_indexes": [1, 4]}),
        [((1, 2, 4, 5), {"vision_config.deepstack_visual_indexes": [0, 2]}),
         ((0, 1, 3, 4), {"vision_config.deepstack_visual_indexes": [1, 3]})],
    ),
    "qwen3_vl, unsorted": (
        lambda: configured("qwen3_vl", {**QWEN, "deepstack_visual_indexes": [4, 1]}),
        [((1, 2, 4, 5), {"vision_config.deepstack_visual_indexes": [2, 0]})],
    ),
    "qwen3_5": (lambda: configured("qwen3_5", QWEN), [((0, 2, 5), {"vision_config.depth": 3})]),
    "glm_ocr": (lambda: configured("glm_ocr", QWEN), [((1, 2, 5), {"vision_config.depth": 3})]),
    "clip": (
        lambda: configured("llava-llama", SIX),
        [((0, 2, 4), {"vision_feature_layer": 3}),
         ((1, 3), {"vision_feature_layer": 2}),  # the layer that was read may go, too
         ((0, 2, 4, 5), {"vision_feature_layer": 3})],  # one that nobody reads may stay
    ),
    "siglip": (lambda: with_siglip(-2), [((0, 2, 4), {"vision_feature_layer": 3})]),
    "vip": (
        lambda: configured("vipllava", SIX, vision_feature_layers=[-2, -4, 0]),
        [((1, 2, 4), {"vision_feature_layer": [3, 2, 0]})],
    ),
    "pixtral": (
        lambda: configured("llava-pixtral", SIX),
        [((0, 3, 5), {"vision_feature_layer": -1}), ((2, 3), {"vision_feature_layer": -1})],
    ),
    "internvl": (
        lambda: configured("internvl-llama", {**SIX, "use_mean_pooling": False}),
        [((0, 3, 5), {"vision_feature_layer": -1})],
    ),
    "idefics3": (
        lambda: configured("idefics3", SIX), [((1, 4), {"vision_config.num_hidden_layers": 2})]
    ),
    "molmo2": (
        lambda: configured("molmo2", SIX, adapter_config={
            **tiny.ROWS["others"]["molmo2"]["adapter_config"], "vision_feature_layer": [-2, 1],
        }),
        [((1, 3, 4), {"adapter_config.vision_feature_layer": [2, 0]})],
    ),
}  # fmt: skip
"""Deeper towers: layers to keep, and what their numbers are then."""
REMOVED = [
    pytest.param(
        *(make, layers, fields),
        id=f"{case}-{len(layers)}{layers[-1]}",
    )
    for case, (make, rows) in DEEP.items()
    for layers, fields in rows
]


@pytest.mark.parametrize(("make", "layers", "fields"), REMOVED)
def test_numbers_of_layers_follow_them(make, layers, fields, tmp_path):
    plan = plan_of(sv.anatomy(make()), layers, 32)
    loaded = assert_applied(make(), plan, tmp_path)
    for path, value in fields.items():
        owner, _, field = path.rpartition(".")
        assert getattr(getattr(loaded.config, owner) if owner else loaded.config, field) == value


@pytest.mark.parametrize(
    ("case", "kept"), [("qwen3_vl", (0, 2, 4)), ("vip", (0, 1, 4)), ("molmo2", (0, 2, 4))]
)
def test_a_layer_whose_output_is_read_must_stay(case, kept):
    with pytest.raises(ImpossiblePlanError, match=r"layers \[\d\] of .* must stay"):
        plan_of(sv.anatomy(DEEP[case][0]()), kept)


# Ratios, and what is refused.


@pytest.mark.parametrize("width", [4304, 3072, 5632])
@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.4, 0.6, 0.75])
def test_widths_are_multiples_and_layers_go_where_few_neurons_would_stay(ratio, width):
    """Shapes of real towers, without weights."""
    config = configured("idefics3", {"num_hidden_layers": 12, "intermediate_size": width})
    config.vision_config.hidden_size = 768
    anatomy = sv.anatomy(config)
    plan = sv.make_plan(anatomy, [], 0.0, tower_ratio=ratio).tower
    (left,) = {len(plan.neurons[index]) for index in plan.layers}
    assert left % 64 == 0
    assert 4 * left >= width - 4 * 64
    each = [shape.params for shape in anatomy.tower.layers]
    narrower = sum(each) - 12 * (width - width // 4) * (2 * 768 + 1)
    wanted = (1 - ratio) * anatomy.tower.backbone_params
    fits = wanted >= narrower + anatomy.tower.backbone_params - sum(each)
    assert (len(plan.layers) == 12) == fits
    step = 64 * 12 * (2 * 768 + 1) / anatomy.tower.backbone_params
    assert plan.ratio == pytest.approx(ratio, abs=step)


@pytest.mark.parametrize("name", WHOLE)
def test_a_tower_that_must_stay_whole_is_refused_by_name(name):
    config = tiny.CONFIGS[name]()
    anatomy = sv.anatomy(config)
    with pytest.raises(ImpossiblePlanError) as refusal:
        sv.make_plan(anatomy, random_scores(anatomy), 0.2, "depth", tower_ratio=0.2)
    assert WHOLE[name] in str(refusal.value)
    kind = getattr(config.vision_config, "model_type", "?")
    assert name.partition("_tower")[0] in str(refusal.value) or kind in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert sv.make_plan(anatomy, random_scores(anatomy), 0.2, "depth").tower is None


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5])
def test_a_share_out_of_range_is_refused(ratio):
    anatomy = sv.anatomy(tiny.CONFIGS["idefics3"]())
    with pytest.raises(ConfigError, match="tower_ratio"):
        sv.make_plan(anatomy, [], 0.0, tower_ratio=ratio)


@pytest.mark.parametrize("name", ["idefics3", "qwen2_5_vl", "vipllava"])
def test_too_large_a_share_says_what_is_possible(name):
    anatomy = sv.anatomy(tiny.CONFIGS[name]())
    with pytest.raises(ImpossiblePlanError, match=r"at most 0\.\d+") as refusal:
        sv.make_plan(anatomy, [], 0.0, tower_ratio=0.9)
    most = float(re.search(r"at most (0\.\d+)", str(refusal.value))[1])
    assert sv.make_plan(anatomy, [], 0.0, tower_ratio=most).tower.ratio == pytest.approx(
        most, abs=0.03
    )


@pytest.mark.parametrize(
    ("name", "share", "told"),
    [
        ("qwen2_vl", 0.3, "qwen2_vl"),
        ("perception_lm", 0.3, "perception_lm"),
        ("llama", 0.3, "no vision tower"),
        ("idefics3", 0.9, "at most"),
        ("idefics3", 1.5, "tower"),
    ],
)
def test_the_command_line_refuses_in_one_line(name, share, told, tmp_path):
    tiny.build(name).save_pretrained(tmp_path / "model")
    for words in (("--ratio", 0.2), ()):
        asked = ("--tower-ratio", share, "--out", tmp_path / "out")
        line = refused("prune", tmp_path / "model", *words, *asked)
        assert told in line
        assert not (tmp_path / "out").exists()


# Training.

TOWER, PROJECTOR = r"model\.vision_tower\.", r"multi_modal_projector\."
LEARNS = {
    "projector+tower": rf"{TOWER}|{PROJECTOR}",
    "full+tower": rf"{TOWER}|{PROJECTOR}|language_model\.|lm_head\.",
    "full": rf"{PROJECTOR}|language_model\.|lm_head\.",
    "projector": PROJECTOR,
}


def student_and_teacher():
    """A student of whose tower half of the neurons are gone, and nothing else."""
    teacher, processor = sv.load(str(folders.folder("llava")))
    student = copy.deepcopy(teacher)
    plan = plan_of(sv.anatomy(student.config), (0,), 20)
    sv.prune_(student, plan)
    return student, teacher, processor, plan


@pytest.mark.parametrize("train", tiered(LEARNS, "projector+tower".__eq__))
def test_what_learns_with_a_tower(train):
    student, teacher, processor, plan = student_and_teacher()
    samples, before = folders.short_samples(4), copy.deepcopy(student.state_dict())
    settings = config(train=train, loss="sft+hidden", learning_rate=5e-3)
    sv.recover(student, teacher, samples, settings, processor, plan=plan)
    now = student.state_dict()
    moved = {name for name in before if not torch.equal(now[name], before[name])}
    expected = {name for name in before if re.search(LEARNS[train], name)}
    # the norm behind the class token is read by nobody
    assert moved == {name for name in expected if "post_layernorm" not in name}


@pytest.mark.parametrize("train", tiered(LEARNS, "projector+tower".__eq__))
@pytest.mark.parametrize("knows_plan", [True, False])
def test_the_teacher_sees_with_the_original_s_tower(train, knows_plan):
    """The first divergence is that of the two models side by side."""
    student, teacher, processor, plan = student_and_teacher()
    samples = folders.short_samples(2)[:1]
    (batch,) = sv.calibration_batches(processor, samples)
    ours, theirs = (logits(each, batch)[0].log_softmax(-1) for each in (student, teacher))
    expected = float((theirs.exp() * (theirs - ours)).sum(-1).mean())  # no token is padding
    settings = config(train=train, loss="kl", temperature=1.0, max_steps=1, batch_size=1)
    given = {"plan": plan} if knows_plan else {}
    history = sv.recover(student, teacher, samples, settings, processor, **given)
    first = history.steps[0]["loss_kl"]
    assert expected > 1e-4
    assert first == pytest.approx(expected, rel=1e-2)
