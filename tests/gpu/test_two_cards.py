"""Models that accelerate has divided over two cards, or a card and the host, as on one card."""

import copy
from functools import partial

import pytest
import torch
from accelerate import dispatch_model

import slimvlm as sv
from slimvlm.core.errors import ConfigError
from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.parts import Parts
from slimvlm.scoring.criteria import CRITERIA
from tests import tiny
from tests import tiny_folder as folders
from tests.evaluation.test_ask import PERPLEXITY, task
from tests.handmade import logits, plan_by_hand
from tests.tiers import tiered
from tests.tolerances import FORWARD, LOSS, assert_close, assert_scores_close

pytestmark = pytest.mark.skipif(
    torch.accelerator.device_count() < 2, reason="needs two cards (PRETENDED_GPUS=2)"
)


MODELS = {
    "tied": lambda: tiny.made(tiny.llama(tie_word_embeddings=True)),
    **{name: partial(tiny.build, name) for name in ("llava-llama", "qwen3_vl", "qwen3_moe")},
}
"""The head of the first is its embedding: it lies on another card than the final norm."""


def divided(model, last=1):
    """A copy on card 0, except its last layers and its norm; a head goes with its weight."""
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


def batches(model):
    return [tiny.batch(model, 16 + seed, seed) for seed in range(6)]


def by_default(name, *_):
    return name == "tied"


SCORED = [
    (name, criterion)
    for name in MODELS
    for criterion, row in CRITERIA.items()
    if criterion not in ("spacing", "random") and (row.units == ("expert",)) == ("moe" in name)
]


@pytest.mark.parametrize("last", [1, "cpu"])
@pytest.mark.parametrize(
    ("name", "criterion"), tiered(SCORED, lambda name, _: name in ("tied", "qwen3_moe"))
)
def test_scores(name, criterion, last, card):
    model = MODELS[name]()
    if "moe" in name:  # the pretended card cannot run grouped products
        model.set_experts_implementation("eager")
    ours = sv.score(divided(model, last), batches(model), criterion)
    theirs = sv.score(model.to(card), batches(model), criterion)
    for unit in CRITERIA[criterion].units:
        for found, expected in zip(ours.of(unit), theirs.of(unit), strict=True):
            assert found.device.type == "cpu"
            if expected.numel():
                assert_scores_close(found, expected)


WALKS = [
    (name, options)
    for name in MODELS
    if "moe" not in name
    for options in (
        {"axis": "width"},
        {"axis": "both", "repair": "both"},
        {"axis": "depth", "local_steps": 4},
    )
]


@pytest.mark.parametrize(("name", "options"), tiered(WALKS, by_default), ids=str)
def test_walk(name, options, card):
    model = MODELS[name]()
    ours, theirs = divided(model), model.to(card)
    found, expected = (sv.walk_(m, batches(m), 0.25, **options) for m in (ours, theirs))
    assert found.plan == expected.plan
    assert [str(p.device) for _, p in ours.named_parameters()].count("cuda:1") > 0
    inputs = {key: value.to(card) for key, value in tiny.batch(theirs).items()}
    assert_close(logits(ours, inputs), logits(theirs, inputs), FORWARD)


@pytest.mark.parametrize("name", tiered([n for n in MODELS if "moe" not in n], by_default))
def test_prune_and_save(name, card, tmp_path):
    model = MODELS[name]()
    plan = plan_by_hand(read_anatomy(model), (0, 2, 3), (0,), range(32))
    masked, cut, alone = divided(model), divided(model), model.to(card)
    inputs = {key: value.to(card) for key, value in tiny.batch(alone).items()}
    sv.mask_(masked, plan)
    for each in (cut, alone):
        sv.prune_(each, plan)
    for each in (masked, cut):
        assert_close(logits(each, inputs), logits(alone, inputs), FORWARD)
    sv.save(cut, None, tmp_path / "out", plan)


@pytest.mark.parametrize("last", [1, "cpu"])
@pytest.mark.parametrize("kind", tiered(["text", "llava"], lambda kind: kind == "llava"))
def test_evaluate(kind, last, card, unhurried):
    model, processor = sv.load(str(folders.folder(kind)), device="cpu")
    ours, theirs = divided(model, last), model.to(card)
    samples = folders.short_samples(3, sees=kind == "llava")
    for pair in ((ours, theirs), (theirs, ours)):
        result = sv.evaluate_data(pair[0], processor, samples, baseline=pair[1])
        for sample in result.samples:
            assert sample.loss == pytest.approx(sample.baseline_loss, rel=LOSS.rtol)
            assert sample.divergence == pytest.approx(0, abs=LOSS.atol)
    asked = [task(count=2, sees=kind == "llava"), PERPLEXITY]
    found, expected = (sv.evaluate(each, processor, asked) for each in (ours, theirs))
    for name in expected.tasks:
        assert found.tasks[name].replies == expected.tasks[name].replies
        assert found.tasks[name].scores == pytest.approx(expected.tasks[name].scores, rel=1e-5)


def test_a_model_that_cannot_be_pruned_or_trained_is_refused_by_name(card):
    model = divided(MODELS["tied"](), "cpu")
    plan = plan_by_hand(read_anatomy(model), (0, 2, 3))
    for prune in (
        lambda: sv.prune_(model, plan),
        lambda: sv.mask_(model, plan),
        lambda: sv.walk_(model, batches(model), 0.25),
        lambda: sv.walk_(model, batches(model), plan=plan),
    ):
        with pytest.raises(ConfigError, match=r"^model: its device_map divides it over 0, cpu"):
            prune()
    folder = folders.folder("text")
    model, processor = sv.load(str(folder))
    apart, samples = divided(model), folders.short_samples(2, sees=False)
    for student, teacher, field in ((apart, None, "model"), (model, apart, "teacher")):
        loss = "sft" if teacher is None else "hidden"
        config = sv.RecoverConfig(train="lora", loss=loss, max_steps=1)
        with pytest.raises(ConfigError, match=rf"^{field}: its device_map divides it over 0, 1"):
            sv.recover(student, teacher, samples, config, processor)


def test_an_option_divides_a_model_that_is_read(card):
    folder = str(folders.folder("llava"))
    (ours, processor), (alone, _) = sv.load(folder, device_map="balanced"), sv.load(folder)
    assert set(ours.hf_device_map.values()) == {0, 1}
    data = list(sv.calibration_batches(processor, folders.short_samples(2)))
    for batch in data:
        inputs = {key: value.to(card) for key, value in batch.items()}
        assert_close(logits(ours, inputs), logits(alone, inputs), FORWARD)
