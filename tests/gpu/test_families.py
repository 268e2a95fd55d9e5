"""Models on a card, on two, or on a card and the host do as on the CPU."""

import copy
from functools import cache

import pytest
import torch
from accelerate import dispatch_model

import slimvlm as sv
from slimvlm.core.errors import ConfigError
from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.parts import Parts, shares_keys
from slimvlm.scoring.criteria import CRITERIA
from tests import tiny
from tests import tiny_folder as folders
from tests.evaluation.test_ask import PERPLEXITY, task
from tests.gpu.alike import assert_close, llava
from tests.handmade import logits, plan_by_hand
from tests.tiers import ARCHETYPES, tiered
from tests.tolerances import FORWARD, LOSS
from tests.tolerances import assert_close as assert_logits_close

DIVIDED = ("tied", "llava-llama", "qwen3_vl", "qwen3_moe")
"""The head of the first is its embedding: it lies on another card than the final norm."""
BY_DEFAULT = {"card": ("llava-llama", "llama4")}
"""One that sees, and one with experts, complex rotations and more to gather."""
PLACED = [(name, "card") for name in ARCHETYPES]
PLACED += [(name, place) for name in DIVIDED for place in ("two cards", "card and host")]
OPTIONS = {
    **{"plain": {}, "both": {"axis": "both", "repair": "both"}},
    "depth": {"axis": "depth", "local_steps": 4},
}
WALKED = [(name, "card", "plain") for name in ARCHETYPES]
WALKED += [(name, "two cards", how) for name in DIVIDED[:3] for how in OPTIONS]


def by_default(name, place, *_):
    return name in BY_DEFAULT.get(place, ("tied", "qwen3_moe"))


@cache
def model_of(name):
    """A tiny model on the CPU. Tests must not change it."""
    if name == "tied":
        return tiny.made(tiny.llama(tie_word_embeddings=True))
    model = tiny.build(name)
    if name == "qwen3_moe":  # the pretended card cannot run grouped products over two
        model.set_experts_implementation("eager")
    return model


def batches_of(name, count=2):
    return [tiny.batch(model_of(name), 12 + 3 * seed, seed) for seed in range(count)]


def has_experts(name):
    return any(shape.num_experts for shape in sv.anatomy(model_of(name)).layers)


def criteria_of(name, place):
    """Criteria of a model's widths and of its layers; every one where the model is divided."""
    if place == "card":
        return "activation" if has_experts(name) else "flap", "block_influence"
    is_about = {True: ("expert",), False: ("layer", "kv_group", "neuron")}[has_experts(name)]
    found = [c for c, row in CRITERIA.items() if row.needs_data or c == "magnitude"]
    return [c for c in found if set(CRITERIA[c].units) <= set(is_about)]


def divided(model, last):
    """A copy on card 0, except its last layers and its norm; a head goes with its weight."""
    if torch.accelerator.device_count() < 2:
        pytest.skip("needs two cards (PRETENDED_GPUS=2)")
    anatomy = read_anatomy(model)
    text, count = anatomy.family.backbone, anatomy.num_layers
    embedding, head = Parts(model).token_matrices()
    places = {
        **{f"{text}.layers.{i}": 0 if i < count // 2 else last for i in range(count)},
        f"{text}.norm": last,
        anatomy.family.head: 0 if head.weight is embedding.weight else last,
    }
    for name, _ in model.named_modules():
        holds_some = not name or any(place.startswith(f"{name}.") for place in places)
        is_placed = any(f"{name}.".startswith(f"{place}.") for place in places)
        if not holds_some and not is_placed:
            places[name] = 0
    return dispatch_model(copy.deepcopy(model), places)


def placed(model, place, card):
    if place == "card":
        return copy.deepcopy(model).to(card)
    return divided(model, 1 if place == "two cards" else "cpu")


@pytest.mark.parametrize(("name", "place"), tiered(PLACED, by_default))
def test_scores(name, place, card):
    there = placed(model_of(name), place, card)
    for criterion in criteria_of(name, place):
        here = sv.score(model_of(name), batches_of(name), criterion)
        assert_close(sv.score(there, batches_of(name), criterion).tensors(), here.tensors())


@pytest.mark.parametrize(("name", "place", "how"), tiered(WALKED, by_default))
def test_a_walk(name, place, how, card):
    here, there = copy.deepcopy(model_of(name)), placed(model_of(name), place, card)
    data, options = batches_of(name, 5), dict(OPTIONS[how])
    if has_experts(name):
        options["scores"] = sv.score(model_of(name), data, "activation")
    if name == "kosmos2_5":
        options["axis"] = "depth"  # its widths are fixed
    expected, found = (
        sv.walk_(model, data[1:], 0.25, held_out=data[:1], **options) for model in (here, there)
    )
    assert found.plan == expected.plan
    cards = 1 if place == "card" else 2
    assert len({parameter.device for parameter in there.parameters()}) == cards
    assert_close(there.state_dict(), here.state_dict())


TOWERS = ("idefics3", "internvl-qwen2", "qwen2_5_vl")


@pytest.mark.parametrize("name", tiered(TOWERS, "idefics3".__eq__))
def test_a_walk_of_a_tower(name, card, tmp_path):
    here, there = copy.deepcopy(model_of(name)), placed(model_of(name), "card", card)
    here.save_pretrained(tmp_path / "whole")
    data = batches_of(name, 5)
    options = {"tower_ratio": 0.2, "held_out": data[:1], "local_steps": 2}
    expected, found = (sv.walk_(model, data[1:], 0.25, **options) for model in (here, there))
    paths = tmp_path / "whole", data[1:], tmp_path / "out"
    in_parts = sv.walk_checkpoint(*paths, 0.25, device=card, **options)
    assert found.plan == expected.plan == in_parts.plan
    assert len(expected.plan.tower.neurons[0]) < 48
    assert_close(there.state_dict(), here.state_dict())
    loaded, _ = sv.load(str(tmp_path / "out"))
    assert_close(loaded.state_dict(), here.state_dict())


@pytest.mark.parametrize("name", tiered(ARCHETYPES, BY_DEFAULT["card"].__contains__))
def test_from_files(name, card, tmp_path):
    """Every tensor that a layer reads is on the card while it runs, buffers without files, too."""
    model = model_of(name)
    model.save_pretrained(tmp_path)
    if shares_keys(model.config) or name == "molmo2":
        with pytest.raises(sv.SlimError, match="low memory"):
            sv.score_checkpoint(tmp_path, batches_of(name), device=card)
        return
    for criterion in criteria_of(name, "card"):
        found = sv.score_checkpoint(tmp_path, batches_of(name), criterion, device=card)
        assert_close(found.tensors(), sv.score(model, batches_of(name), criterion).tensors())


@pytest.mark.parametrize("name", tiered(DIVIDED[:3], lambda name: name == "tied"))
def test_a_divided_model_is_masked_pruned_and_saved(name, card, tmp_path):
    model = copy.deepcopy(model_of(name))
    plan = plan_by_hand(read_anatomy(model), (0, 2, 3), (0,), range(32))
    masked, cut, alone = divided(model, 1), divided(model, 1), model.to(card)
    inputs = {key: value.to(card) for key, value in tiny.batch(alone).items()}
    sv.mask_(masked, plan)
    for each in (cut, alone):
        sv.prune_(each, plan)
    for each in (masked, cut):
        assert_logits_close(logits(each, inputs), logits(alone, inputs), FORWARD)
    sv.save(cut, None, tmp_path / "out", plan)


@pytest.mark.parametrize("last", [1, "cpu"])
@pytest.mark.parametrize("kind", tiered(["text", "llava"], lambda kind: kind == "llava"))
def test_a_divided_model_is_evaluated(kind, last, card, unhurried):
    model, processor = sv.load(str(folders.folder(kind)), device="cpu")
    ours, theirs = divided(model, last), model.to(card)
    samples = folders.short_samples(3, sees=kind == "llava")
    for pair in ((ours, theirs), (theirs, ours)):
        result = sv.evaluate_data(pair[0], processor, samples, baseline=pair[1])
        for sample in result.samples:
            assert sample.loss == pytest.approx(sample.baseline_loss, rel=LOSS.rtol)
            assert sample.divergence == pytest.approx(0, abs=LOSS.atol)
    asked = [task(count=2, sees=kind == "llava"), PERPLEXITY]
    found, expected = (sv.evaluate(each, processor, asked).tasks for each in (ours, theirs))
    for name, its in expected.items():
        assert found[name].replies == its.replies
        assert found[name].scores == pytest.approx(its.scores, rel=1e-5)


def test_a_model_that_cannot_be_pruned_or_trained_is_refused_by_name(card):
    model, data = divided(model_of("tied"), "cpu"), batches_of("tied", 6)
    plan = plan_by_hand(read_anatomy(model), (0, 2, 3))
    for prune in (
        lambda: sv.prune_(model, plan),
        lambda: sv.mask_(model, plan),
        lambda: sv.walk_(model, data, 0.25),
        lambda: sv.walk_(model, data, plan=plan),
    ):
        with pytest.raises(ConfigError, match=r"^model: its device_map divides it over 0, cpu"):
            prune()
    model, processor = sv.load(str(folders.folder("text")))
    apart, samples = divided(model, 1), folders.short_samples(2, sees=False)
    for student, teacher, field in ((apart, None, "model"), (model, apart, "teacher")):
        loss = "sft" if teacher is None else "hidden"
        config = sv.RecoverConfig(train="lora", loss=loss, max_steps=1)
        with pytest.raises(ConfigError, match=rf"^{field}: its device_map divides it over 0, 1"):
            sv.recover(student, teacher, samples, config, processor)


def test_an_option_divides_a_model_that_is_read(card):
    if torch.accelerator.device_count() < 2:
        pytest.skip("needs two cards (PRETENDED_GPUS=2)")
    ours, processor = sv.load(str(folders.folder("llava")), device_map="balanced")
    assert set(ours.hf_device_map.values()) == {0, 1}
    alone, _ = llava(card)
    for batch in sv.calibration_batches(processor, folders.short_samples(2)):
        inputs = {key: value.to(card) for key, value in batch.items()}
        assert_logits_close(logits(ours, inputs), logits(alone, inputs), FORWARD)
