import copy

import pytest
import torch
from PIL import Image

from slimvlm.core.errors import DataError, UnsupportedModelError
from slimvlm.data import chat
from slimvlm.data.samples import Sample
from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.cost import Picture
from slimvlm.models.families import FAMILIES, TOWERS
from slimvlm.models.hidden import as_inputs
from slimvlm.models.load import load_processor, sharing_copy
from slimvlm.models.parts import Parts, tower_path
from slimvlm.models.pictures import (
    budgets_for,
    knobs_of,
    picture_tokens,
    seen_once,
    steps_down,
    usual_picture,
    with_settings,
)
from tests import tiny, tiny_folder, tiny_pictures
from tests.handmade import Stopped
from tests.tiers import tiered

SHARES = {  # all of a small picture goes through the tower once, however few tiles it has
    **dict.fromkeys(("llava_next", "llava_onevision"), (0.65,)),
    **{"idefics2": (0.5,), "perception_lm": (0.5,), "phi4_multimodal": (0.5, 0.3)},
    "molmo2": (0.5, 0.4),
}


def sample_of(name):
    shown = Image.linear_gradient("L").resize(tiny_pictures.FAMILIES[name].size).convert("RGB")
    asked = tiny_folder.turn("user", None, "Which colour is shown?")
    return Sample(name, (asked, tiny_folder.turn("assistant", "It is red.")), (shown,))


def seen(name, processor, inputs):
    """The tokens that stand for a picture's features."""
    token = tiny_pictures.FAMILIES[name].counted
    number = chat.tokenizer_of(processor).convert_tokens_to_ids(token)
    return int((inputs["input_ids"] == number).sum())


def test_every_family_with_a_knob_is_tried_here():
    with_one = {name for name, row in FAMILIES.items() if not isinstance(row.pictures, str)}
    assert with_one == set(tiny_pictures.FAMILIES)


def test_today_s_tokens_need_no_settings_although_fewer_tiles_can_take_more():
    model, processor = tiny_pictures.made("llava_onevision")
    grids = [[32 * high, 32 * wide] for high in range(1, 7) for wide in range(1, 7)]
    sample = Sample("a", (), (Image.new("RGB", (617, 243)),))
    many = with_settings(processor, {"image_grid_pinpoints": grids})
    assert budgets_for(model.config, many, [sample])(1.0).settings == {}


@pytest.mark.parametrize("name", tiny_pictures.BY_DEFAULT)
def test_a_family_keeps_the_most_tokens_within_each_budget_and_reads_them(name, tmp_path):
    model, processor = tiny_pictures.made(name)
    sample, config = sample_of(name), model.config
    shares = SHARES.get(name, (0.5, 0.25))
    whole, *budgets = map(budgets_for(config, processor, [sample]), (1.0, *shares))
    full, size = whole.tokens, sample.images[0].size
    assert whole.settings == {}
    steps = steps_down(processor, knobs_of(config))
    possible = {
        picture_tokens(with_settings(processor, step), size)
        for step in steps[:: max(len(steps) // 40, 1)]
    }
    inputs = chat.encode_samples(processor, [sample])
    before = seen(name, processor, inputs)
    for share, budget in zip(shares, budgets, strict=True):
        assert (budget.share, budget.tokens_before, budget.size) == (share, full, size)
        assert budget.tokens <= share * full
        assert budget.tokens >= max(each for each in possible if each <= share * full)
        small = sharing_copy(model)
        changed = budget.apply_(small, processor)
        changed.save_pretrained(tmp_path / str(share))
        (tmp_path / str(share) / "config.json").write_text("{}")
        again = load_processor(str(tmp_path / str(share)), config)
        assert again.image_processor.to_dict() == changed.image_processor.to_dict()
        again.chat_template = processor.chat_template  # Phi-4's class does not read it
        fewer = chat.encode_samples(again, [sample])
        assert 0 < seen(name, again, fewer) < before
        with torch.no_grad():  # a model counts the tokens that it has features for
            logits = small(**as_inputs(small, fewer)).logits
        assert logits.isfinite().all()
        before = seen(name, again, fewer)
    same = chat.encode_samples(with_settings(processor, whole.settings), [sample])
    assert all(torch.equal(inputs[key], same[key]) for key in inputs)


@pytest.mark.parametrize("name", ["paligemma", "gemma3", "mllama", "kosmos2_5"])
def test_a_family_without_a_knob_says_why(name):
    config = tiny.CONFIGS[name]()
    with pytest.raises(UnsupportedModelError, match=rf"{config.model_type} has no image-token"):
        knobs_of(config)


def test_text_has_no_budget():
    model, processor = tiny_pictures.made("qwen2_vl")
    with pytest.raises(DataError, match="no sample has an image"):
        budgets_for(model.config, processor, tiny_folder.short_samples(2, False))


UNSEEN = {*tiny.TEXT_ONLY, "kosmos2_5"}  # no picture in their batches here
SEEN = [n for n, config in tiny.CONFIGS.items() if n not in UNSEEN and tiny.is_multimodal(config())]


@pytest.mark.parametrize("name", tiered(SEEN))
@torch.no_grad()
def test_each_picture_is_seen_once_and_gives_the_same_to_the_last_bit(name):
    """A model with other weights outside the backbone computes its own features."""
    model = tiny.build(name)
    one = tiny.batch(model)
    (pixels,) = (key for key, value in one.items() if value.is_floating_point())
    batches = [one, {**one, pixels: one[pixels].flip(-1)}]
    runs = []
    tower = model.get_submodule(Parts(model).family.vision)
    tower.register_forward_hook(lambda *call: runs.append(call))
    other, same = copy.deepcopy(model), sharing_copy(model)
    for parameter in other.parameters():
        parameter.mul_(1.5)

    def logits(of):
        return torch.stack([of(**batch).logits for batch in batches])

    expected, known = {each: logits(each) for each in (model, other, same)}, {}
    assert name == "fast_vlm" or not torch.equal(*expected[model])  # so tiny, it sees no difference
    runs.clear()
    for _ in range(2):
        with seen_once(model, known):
            for each, wanted in expected.items():
                assert torch.equal(logits(each), wanted)
    assert len(known) == (0 if name == "mllama" else 2)  # it reads pictures in its own way
    assert len(runs) == (2 * 3 * 2 if name == "mllama" else 2 + 2 * 2)  # the other's, too


@pytest.mark.parametrize("name", tiny_pictures.BY_DEFAULT)
def test_an_image_of_usual_size_has_the_patches_that_the_tower_reads(name):
    model, processor = tiny_pictures.made(name)
    found, shape = usual_picture(model.config, processor), read_anatomy(model)
    inputs = as_inputs(model, chat.encode_questions(processor, [chat.plain_question(processor)]))
    assert picture_tokens(processor, chat.USUAL_SIZE) == found.tokens >= found.features > 0
    if shape.tower is None:  # of timm
        assert found.patches == found.features
        return
    row = TOWERS[shape.tower.model_type]
    tower = model.get_submodule(tower_path(model.config)).get_submodule(row.inside)
    read = []

    def stop(layer, given, named):
        states = next(iter((*given, *named.values())))
        read.append(states.shape[:-1])
        raise Stopped

    hook = getattr(tower, row.layers)[0].register_forward_pre_hook(stop, with_kwargs=True)
    with pytest.raises(Stopped):
        model(**inputs)
    hook.remove()
    assert (found.patches, found.reach) == (read[0].numel(), read[0][-1])


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llava-llama", Picture(17, 17, 16, 16)),  # 4 x 4 patches and a class token
        ("internvl-qwen2", Picture(17, 17, 4, 4)),
        ("idefics3", Picture(16, 16, 4, 4)),
        ("mllama", Picture(17, 17, 17, 1)),  # others attend to it
        ("qwen2_5_vl", Picture(4800, 4800, 1200, 1200)),  # 480 x 640 in patches of 8
        ("llama", Picture()),
    ],
)
def test_without_a_processor_the_configuration_says_what_an_image_becomes(family, expected):
    assert usual_picture(tiny.CONFIGS[family]()) == expected
