"""A shared teacher says what a separate one says, and holds only what was pruned."""

import copy
import gc
import re
import shutil
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import nn

import slimvlm as sv
from slimvlm.data import chat
from slimvlm.data.vocabulary import TokenizerFile
from slimvlm.models import losses
from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.hidden import hidden_states
from slimvlm.models.load import load
from slimvlm.models.parts import Parts
from slimvlm.pruning.cut import prune_
from slimvlm.pruning.tokens import token_ids_of, trimmed_processor
from slimvlm.training.recover import recover
from slimvlm.training.teacher import plan_fits, seeing_once, share_
from slimvlm.training.trainer import plain_model, prepare_training
from tests import tiny, tiny_words
from tests import tiny_folder as folders
from tests.handmade import logits, plan_by_hand, random_scores
from tests.tiers import tiered
from tests.tiny_folder import KINDS, SEEING, short_samples
from tests.tolerances import FORWARD, Tolerance, assert_close
from tests.training.test_recover import NO_DROPOUT, changed, weights
from tests.training.test_recover import config as short

NO_HEADS = ("qwen2_vl", "qwen2_5_vl")  # their head counts are fixed
ONLY_LAYERS = (
    *("stablelm", "llava-stablelm", "glm4v", "idefics2", "mllama", "kosmos2_5"),
    *("qwen3_moe", "qwen3_vl_moe", "qwen3_5_moe", "llama4"),
)
"""Families that cannot have half of the KV groups or of the neurons in all layers."""
SAMPLES = short_samples(8)
TRAINED = Tolerance(torch.float32, 2e-5, 1e-3)
"""Weights after steps of AdamW, which turns rounding into differences of the learning rate."""
REORDERED = Tolerance(torch.float32, 3e-5, 3e-5)
"""The same sums in another order; hidden states of Gemma 4 are large."""
PER_LAYER = re.compile("embed_tokens_per_layer|per_layer_model_projection")
"""Weights with a slice for each layer: those of fewer layers are no part of the whole in memory."""


def config(**changes):
    return short(**{"learning_rate": 1e-3, "lora": NO_DROPOUT, **changes})


def plan_for(model, axis):
    """Half the layers, some scattered units, or both."""
    anatomy = read_anatomy(model)
    layers = sorted({0, 3, *anatomy.pinned_layers}) if axis != "width" else None
    heads = [0, 2] if model.config.model_type not in NO_HEADS else None
    if axis == "depth":
        return plan_by_hand(anatomy, layers)
    return plan_by_hand(anatomy, layers, heads, [*range(0, 64, 2), *range(64, 80)])


def pruned(name, axis):
    """A student, its teacher and the plan between them."""
    teacher = tiny.build(name)
    student, plan = copy.deepcopy(teacher), plan_for(teacher, axis)
    prune_(student, plan)
    return student, teacher, plan


def unmasked(batch):
    return {name: value for name, value in batch.items() if name != "labels"}


def disturbed(trained, size=1.0):
    """Adapters that change the student a lot; the teacher must not notice."""
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=size)
    return trained


def storages(*models):
    """Numbers held in memory by some models together."""
    found = {}
    for model in models:
        for parameter in model.parameters():
            storage = parameter.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes() // parameter.element_size()
    return sum(found.values())


@pytest.mark.parametrize(
    ("name", "axis"),
    tiered(
        [
            *((name, "depth" if name in ONLY_LAYERS else "both") for name in tiny.CONFIGS),
            *((name, axis) for name in ("llama", "phi", "phi3") for axis in ("depth", "width")),
        ]
    ),
)
def test_sharing_changes_nothing_that_a_teacher_says(name, axis):
    student, teacher, plan = pruned(name, axis)
    batch = tiny.batch(teacher)
    with torch.no_grad():
        hidden = hidden_states(teacher, unmasked(batch), range(4))
        before = logits(teacher, batch)
        alone = storages(student)
        missing = sum(p.numel() for p in teacher.parameters()) - alone
        projector = read_anatomy(student).projector_params
        slices = {n: p.numel() for n, p in student.named_parameters() if PER_LAYER.search(n)}
        trained = disturbed(prepare_training(student, config()))
        sharing = share_(teacher, trained, plan)
        for found, expected in zip(
            hidden_states(teacher, unmasked(batch), range(4)), hidden, strict=True
        ):
            assert_close(found, expected, REORDERED)
        assert_close(logits(teacher, batch), before, REORDERED)
    assert set(sharing.differing) == set(slices)
    own = missing + projector + sum(slices.values())
    assert storages(plain_model(trained), teacher) - storages(trained) == own
    assert sharing.own_params == own


SEEING_FAMILIES = [
    name
    for name in tiny.CONFIGS
    if name in tiny.COMMON and tiny.is_multimodal(tiny.CONFIGS[name]())
]


def sees_by_default(name):
    """One for each way into the text: a projector, its line breaks, a merger, a connector."""
    return name in ("llava-llama", "llava_next", "qwen2_5_vl", "idefics3")


def moved_projector(student):
    """A projector that has learned something."""
    for path in read_anatomy(student).family.projector:
        parent, _, name = path.rpartition(".")
        part = getattr(student.get_submodule(parent), name, None)
        parameters = [part] if isinstance(part, nn.Parameter) else getattr(part, "parameters", list)
        with torch.no_grad():
            for parameter in parameters if isinstance(parameters, list) else parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))


def tower_calls(model):
    """A list that grows whenever a matrix inside the vision tower's blocks is used."""
    calls = []
    family = read_anatomy(model).family
    for name, module in model.named_modules():
        in_block = re.search(r"\.(layers?|blocks)\.\d+\.", name.removeprefix(family.vision or ""))
        if name.startswith(family.vision or "") and in_block and isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *call, name=name: calls.append(name))
    return calls


@pytest.mark.parametrize("name", tiered(SEEING_FAMILIES, sees_by_default))
def test_a_picture_is_looked_at_once_also_through_the_student_s_projector(name):
    """Twice in a row, so that nothing old is left; each side through its own projector."""
    student, teacher, _ = pruned(name, "depth")
    moved_projector(student)
    prepare_training(student, config(train="projector"))
    calls, own_calls = tower_calls(teacher), tower_calls(student)
    with torch.no_grad():
        for seed in (0, 1):
            batch = unmasked(tiny.batch(teacher, seed=seed))
            batch["pixel_values"] = batch["pixel_values"] + seed
            (expected,) = hidden_states(teacher, batch)
            assert calls
            calls.clear()
            with seeing_once(student, teacher):
                hidden_states(student, batch)
                (found,) = hidden_states(teacher, batch)
            assert calls == []
            assert own_calls
            assert torch.equal(found, expected)
        (again,) = hidden_states(teacher, batch)
    assert torch.equal(again, expected)
    # as the study's trainers do it: equal to a teacher that has the student's projector
    student, teacher, _ = pruned(name, "depth")
    moved_projector(student)
    prepare_training(student, config(train="projector"))
    batch = unmasked(tiny.batch(teacher))
    borrowed = copy.deepcopy(teacher)
    for path in read_anatomy(student).family.projector:
        parent, _, part = path.rpartition(".")
        if hasattr(student.get_submodule(parent), part):
            ours = getattr(student.get_submodule(parent), part)
            setattr(borrowed.get_submodule(parent), part, ours)
    with torch.no_grad():
        (expected,) = hidden_states(borrowed, batch)
        (other,) = hidden_states(teacher, batch)
        with seeing_once(student, teacher, through_students_projector=True):
            hidden_states(student, batch)
            (found,) = hidden_states(teacher, batch)
        (again,) = hidden_states(teacher, batch)
    assert torch.equal(found, expected)
    assert float((found - other).abs().max()) > 1e-3
    assert torch.equal(again, other)


@pytest.mark.parametrize("layers", [(0, 1, 2, 3, 4), (1, 3), (2,)])
def test_layers_that_read_pictures_change_nothing_where_there_are_none(layers):
    model = tiny.build("mllama")
    text = {name: tiny.batch(model)[name][:, :2] for name in ("input_ids", "attention_mask")}
    final, *caught = hidden_states(model, text, layers)
    _, *alone = hidden_states(model, text, (0, 2, 4))
    after = {0: alone[0], 1: alone[0], 2: alone[1], 3: alone[1], 4: alone[2]}
    assert all(torch.equal(after[layer], seen) for layer, seen in zip(layers, caught, strict=True))
    assert torch.equal(final, model.model(**text, use_cache=False).last_hidden_state)


def test_another_tower_is_not_taken_for_the_teacher_s():
    student, teacher, _ = pruned("llava-llama", "depth")
    prepare_training(student, config())
    with torch.no_grad():
        next(student.get_submodule("model.vision_tower").parameters()).add_(0.1)
        batch = unmasked(tiny.batch(teacher))
        (expected,) = hidden_states(teacher, batch)
        with seeing_once(student, teacher):
            hidden_states(student, batch)
            (found,) = hidden_states(teacher, batch)
    assert torch.equal(found, expected)


# Training.
def models(kind, axis):
    """A student, its teacher, the plan and the processor of a complete model."""
    teacher, processor = load(folders.folder(kind))
    student, plan = copy.deepcopy(teacher), plan_for(teacher, axis)
    prune_(student, plan)
    return student, teacher, plan, processor


def run(kind, axis, share=True, **changes):
    """Weights and history after training, and what is left of the teacher."""
    student, teacher, plan, processor = models(kind, axis)
    samples = short_samples(8, kind in SEEING)
    options = config(**changes)
    history = recover(student, teacher, samples, options, processor, plan=plan, share=share)
    return weights(student), history, teacher


def assert_same_training(first, second):
    for ours, theirs in zip(first.steps, second.steps, strict=True):
        names = [name for name in ours if name.startswith("loss")]
        assert len(names) > 2
        for name in names:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name


ALL_LOSSES = "sft+hidden+cosine+kl+rkl+jsd"


@pytest.mark.parametrize(
    ("kind", "axis"),
    tiered(
        [*((kind, "both") for kind in KINDS), ("llava", "depth"), ("llava", "width")],
        lambda kind, axis: (kind, axis) == ("llava", "both"),
    ),
)
@pytest.mark.parametrize(
    "loss", [ALL_LOSSES, pytest.param("hidden+cosine+kl", marks=pytest.mark.slow)]
)
def test_training_with_a_shared_teacher_is_training_with_a_separate_one(kind, axis, loss):
    """At answers and at the end, and without answers at every position and layer."""
    ours, shared, _ = run(kind, axis, loss=loss)
    theirs, separate, _ = run(kind, axis, share=False, loss=loss)
    assert "shares" in shared.teacher
    assert separate.teacher == "separate"
    assert_same_training(shared, separate)
    for name in theirs:
        assert_close(ours[name], theirs[name], TRAINED)


def test_every_kept_layer_is_compared_where_no_answers_are_learnt():
    """A kept layer answers for the removed ones behind it; without a plan only the end counts."""
    student, teacher, plan, processor = models("llava", "depth")
    options = config(max_steps=1, loss="cosine", batch_size=1)
    inputs = chat.encode_samples(processor, SAMPLES[:1])
    inputs.pop("labels")
    after = [*(index - 1 for index in plan.layers[1:]), plan.before.num_layers - 1]
    with torch.no_grad():
        ours = hidden_states(student, inputs, range(len(plan.layers)))
        theirs = hidden_states(teacher, inputs, after)
    apart = [float(losses.hidden_cosine(a, b)) for a, b in zip(ours, theirs, strict=True)]
    at_the_end = recover(student, copy.deepcopy(teacher), SAMPLES[:1], options, processor)
    assert at_the_end.steps[0]["loss_cosine"] == pytest.approx(apart[0], rel=1e-3)
    assert apart[0] != pytest.approx(sum(apart) / len(apart), rel=1e-2)
    for exact, expected in ((False, sum(apart) / len(apart)), (True, apart[0])):
        student, teacher, plan, processor = models("llava", "depth")
        options = config(max_steps=1, loss="cosine", batch_size=1, paper_exact=exact)
        history = recover(student, teacher, SAMPLES[:1], options, processor, plan=plan)
        assert history.steps[0]["loss_cosine"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("train", tiered(["projector", "full"], lambda train: train == "full"))
def test_sharing_follows_what_learns(train):
    """Full training leaves the tower alone to share; the projector's leaves all but itself."""
    ours, shared, _ = run("llava", "width", train=train)
    theirs, separate, _ = run("llava", "width", share=False, train=train)
    percent = int(re.findall(r"(\d+)%", shared.teacher)[0])
    assert percent < 30 if train == "full" else percent > 40
    assert_same_training(shared, separate)
    for name in theirs:
        assert_close(ours[name], theirs[name], TRAINED)


def test_a_used_up_teacher_goes_and_a_separate_one_stays():
    *_, teacher = run("llava", "width")
    assert {parameter.device.type for parameter in teacher.parameters()} == {"meta"}
    before = weights(models("llava", "width")[1])
    assert changed(run("llava", "width", share=False)[2], before) == set()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_a_shared_teacher_s_file_is_let_go(tmp_path):
    """Weights are read by mapping their file, whose pages count as long as one tensor is used."""
    student, _, plan, _ = models("llava", "width")
    folder = shutil.copytree(folders.folder("llava"), tmp_path / "teacher")
    teacher, _ = load(folder)
    file = str(folder / "model.safetensors")
    assert file in Path("/proc/self/maps").read_text()
    share_(teacher, prepare_training(student, config()), plan)
    gc.collect()
    assert file not in Path("/proc/self/maps").read_text()


def test_repaired_matrices_are_copied_and_a_plan_of_another_teacher_is_not_used():
    student, teacher, plan, processor = models("llava", "width")
    batch = {"input_ids": torch.arange(5, 25)[None], "attention_mask": torch.ones(1, 20).long()}
    repaired = [
        m for i, p, m in Parts(student).projections() if p.path == "mlp.down_proj" and i < 2
    ]
    with torch.no_grad():
        for linear in repaired:
            linear.weight.add_(0.01)
        (expected,) = hidden_states(teacher, batch)
        trained = prepare_training(copy.deepcopy(student), config())
        sharing = share_(teacher, trained, plan)
        (found,) = hidden_states(teacher, batch)
    assert_close(found, expected, FORWARD)
    prefix = "model.language_model.layers"
    assert sharing.differing == tuple(f"{prefix}.{i}.mlp.down_proj" for i in (0, 1))
    _, teacher, _, _ = models("llava", "width")
    history = recover(student, teacher, SAMPLES, config(max_steps=1), processor, plan=plan)
    assert "layers.0.mlp.down_proj' and 1 more" in history.teacher
    student, teacher, _, processor = models("llava", "depth")
    other = plan_by_hand(read_anatomy(student), [0])
    assert not plan_fits(other, student, teacher)
    history = recover(student, teacher, SAMPLES, config(max_steps=1), processor, plan=other)
    assert history.teacher == "separate"
    alone = config(max_steps=1, loss="cosine")  # compared at the end, where no plan maps layers
    recover(student, teacher, SAMPLES, alone, processor, plan=other)


# A student with fewer tokens.


LOSSES = ("hidden", "cosine", "kl", "rkl", "jsd")


def fewer_tokens(kind, words, ratio=0.0):
    """Student, teacher, their processors, and the plan between them.

    The student keeps what it must and ``words`` tokens more of what the samples have.
    """
    teacher, processor = sv.load(tiny_words.folder(kind), device="cpu")
    named = token_ids_of(teacher.config, teacher.generation_config)
    needed = TokenizerFile.of(processor).with_parts({*TokenizerFile.of(processor).needed, *named})
    texts = short_samples(8, kind == "llava")
    tokens = sv.choose_tokens(processor, texts, len(needed) + words, keep=named)
    anatomy = read_anatomy(teacher)
    plan = sv.make_plan(anatomy, random_scores(anatomy), ratio, "both", tokens=tokens)
    student = copy.deepcopy(teacher)
    prune_(student, plan)
    return student, teacher, trimmed_processor(processor, plan), processor, plan


@pytest.mark.parametrize(
    ("share", "words", "kind"),
    tiered(
        product([True, False], [0, 60], ["text", "llava"]),
        lambda share, words, kind: kind == "text" and share == (words == 0),
    ),
)
def test_a_student_that_lost_tokens_alone_says_what_its_teacher_says(kind, words, share):
    """Also on texts that it writes in other, shorter tokens than its teacher would."""
    student, teacher, processor, whole, plan = fewer_tokens(kind, words)
    texts = short_samples(8, kind == "llava")
    (ours,) = sv.calibration_batches(processor, texts[:1])
    (theirs,) = sv.calibration_batches(whole, texts[:1])
    if not words:
        assert ours["input_ids"].shape[1] > theirs["input_ids"].shape[1]
    asked = config(loss="+".join(f"0.2*{name}" for name in LOSSES), batch_size=4)
    history = recover(student, teacher, texts, asked, processor, plan=plan, share=share)
    for name in LOSSES:
        assert history.steps[0][f"loss_{name}"] == pytest.approx(0, abs=1e-5)


def test_the_teacher_shares_all_but_the_rows_of_tokens_which_needs_the_plan():
    texts, found = short_samples(8, sees=False), []
    for share in (True, False):
        student, teacher, processor, _, plan = fewer_tokens("text", 60, ratio=0.4)
        assert plan.cuts_layers
        asked = config(loss="sft+kl", batch_size=4, max_steps=2)
        found.append(recover(student, teacher, texts, asked, processor, plan=plan, share=share))
    assert found[0].teacher.startswith("the teacher shares")
    for shared, separate in zip(found[0].steps[:2], found[1].steps[:2], strict=True):
        assert shared["loss_kl"] == pytest.approx(separate["loss_kl"], abs=1e-5)
        assert shared["loss_kl"] > 1e-4
    student, teacher, processor, _, _ = fewer_tokens("text", 60)
    with pytest.raises(sv.SlimError, match="vocab_size is"):
        recover(student, teacher, short_samples(8, sees=False), config(loss="kl"), processor)
