"""A shared teacher says what a separate one says, and holds only what was pruned."""

from __future__ import annotations

import copy
import gc
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from slimvlm.cli import main
from slimvlm.core.errors import ConfigError
from slimvlm.core.options import Divergence, RecoverConfig
from slimvlm.data.samples import Sample
from slimvlm.models import losses
from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.hidden import head_of, hidden_states
from slimvlm.models.load import load
from slimvlm.models.parts import projections
from slimvlm.planning.plan import Plan
from slimvlm.pruning.cut import prune_
from slimvlm.training import offline as offline_teacher
from slimvlm.training.offline import OfflineTeacher, digest_of_sample, write_cache
from slimvlm.training.recover import History, recover
from slimvlm.training.shared_vision import seeing_once
from slimvlm.training.teacher import share_, why_not_shared
from slimvlm.training.trainable import plain_model, prepare_training
from tests import tiny, tiny_rare
from tests import tiny_folder as folders
from tests.handmade import logits, plan_by_hand
from tests.tiers import tiered
from tests.tiny_folder import KINDS, SEEING, short_samples
from tests.tolerances import FORWARD, Tolerance, assert_close

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


def config(**changes: Any) -> RecoverConfig:
    """Short, exact and without surprises."""
    values: dict[str, Any] = {
        **{"train": "lora", "loss": "sft+hidden", "max_steps": 3, "batch_size": 2},
        **{"learning_rate": 1e-3, "lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.0},
        **{"bf16": False, "logging_steps": 1, "save_steps": 2},
    }
    return RecoverConfig(**{**values, **changes})


def plan_for(model: Any, axis: str) -> Plan:
    """Half the layers, some scattered units, or both."""
    anatomy = read_anatomy(model)
    layers = sorted({0, 3, *anatomy.pinned_layers}) if axis != "width" else None
    heads = [0, 2] if model.config.model_type not in NO_HEADS else None
    if axis == "depth":
        return plan_by_hand(anatomy, layers)
    return plan_by_hand(anatomy, layers, heads, [*range(0, 64, 2), *range(64, 80)])


def pruned(name: str, axis: str) -> tuple[Any, Any, Plan]:
    """A student, its teacher and the plan between them."""
    teacher = tiny.build(name)
    student, plan = copy.deepcopy(teacher), plan_for(teacher, axis)
    prune_(student, plan)
    return student, teacher, plan


def unmasked(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name != "labels"}


def disturbed(trained: Any, size: float = 1.0) -> Any:
    """Adapters that change the student a lot; the teacher must not notice."""
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=size)
    return trained


def storages(*models: nn.Module) -> int:
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
def test_sharing_changes_nothing_that_a_teacher_says(name: str, axis: str) -> None:
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


HEADS = {"MHA": 8, "GQA": 4}


@pytest.mark.parametrize("axis", ["depth", "width"])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("backbone", [tiny.llama, tiny.phi, tiny.phi3], ids=lambda f: f.__name__)
def test_a_shared_teacher_gives_the_losses_of_a_separate_one(
    backbone: Any, heads: str, axis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients, as training computes them: from hidden states and the heads."""
    made = backbone(num_key_value_heads=HEADS[heads])
    monkeypatch.setitem(tiny.CONFIGS, "backbone", lambda: made)
    student, separate, plan = pruned("backbone", axis)
    shared = copy.deepcopy(separate)
    batch = unmasked(tiny.batch(separate))
    # larger adapters saturate the attention, whose gradients are then made of rounding
    trained = disturbed(prepare_training(student, config()), 0.1)
    share_(shared, trained, plan)
    for name in ("hidden", "cosine", "kl", "rkl", "jsd"):
        found = [loss_and_gradient(name, trained, teacher, batch) for teacher in (shared, separate)]
        (loss, gradient), (expected, expected_gradient) = found
        assert float(expected) > 1e-3, name
        assert_close(loss, expected, FORWARD)
        scale = expected_gradient.abs().max()
        assert_close(gradient / scale, expected_gradient / scale, FORWARD)


def loss_and_gradient(
    name: str, trained: Any, teacher: Any, batch: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """A distillation loss, and its gradient in all LoRA matrices."""
    trained.zero_grad()
    (ours,) = hidden_states(plain_model(trained), batch)
    with torch.no_grad():
        (theirs,) = hidden_states(teacher, batch)
    if name in ("hidden", "cosine"):
        loss = {"hidden": losses.hidden_l2, "cosine": losses.hidden_cosine}[name](ours, theirs)
    else:
        heads = head_of(plain_model(trained)), head_of(teacher)
        loss = losses.divergence(ours, theirs, *heads, kind=cast(Divergence, name))
    loss.backward()
    gradients = [p.grad.flatten() for n, p in trained.named_parameters() if "lora_" in n]
    return loss.detach(), torch.cat(gradients)


SEEING_FAMILIES = [
    name
    for name in tiny.CONFIGS
    if name not in tiny_rare.CONFIGS and tiny.is_multimodal(tiny.CONFIGS[name]())
]


def sees_by_default(name: str) -> bool:
    """One for each way into the text: a projector, its line breaks, a merger, a connector."""
    return name in ("llava-llama", "llava_next", "qwen2_5_vl", "idefics3")


def moved_projector(student: Any) -> None:
    """A projector that has learned something."""
    for path in read_anatomy(student).family.projector:
        parent, _, name = path.rpartition(".")
        part = getattr(student.get_submodule(parent), name, None)
        parameters = [part] if isinstance(part, nn.Parameter) else getattr(part, "parameters", list)
        with torch.no_grad():
            for parameter in parameters if isinstance(parameters, list) else parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))


def tower_calls(model: Any) -> list[str]:
    """A list that grows whenever a matrix inside the vision tower's blocks is used."""
    calls: list[str] = []
    family = read_anatomy(model).family
    for name, module in model.named_modules():
        in_block = re.search(r"\.(layers?|blocks)\.\d+\.", name.removeprefix(family.vision or ""))
        if name.startswith(family.vision or "") and in_block and isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *call, name=name: calls.append(name))
    return calls


@pytest.mark.parametrize("name", tiered(SEEING_FAMILIES, sees_by_default))
def test_a_picture_is_looked_at_once(name: str) -> None:
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


@pytest.mark.parametrize("name", tiered(SEEING_FAMILIES, sees_by_default))
def test_the_teacher_can_see_through_the_student_s_projector(name: str) -> None:
    """As the study's trainers do it: equal to a teacher that has the student's projector."""
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
def test_layers_that_read_pictures_change_nothing_where_there_are_none(
    layers: tuple[int, ...],
) -> None:
    model = tiny.build("mllama")
    text = {name: tiny.batch(model)[name][:, :2] for name in ("input_ids", "attention_mask")}
    final, *caught = hidden_states(model, text, layers)
    _, *alone = hidden_states(model, text, (0, 2, 4))
    after = {0: alone[0], 1: alone[0], 2: alone[1], 3: alone[1], 4: alone[2]}
    assert all(torch.equal(after[layer], seen) for layer, seen in zip(layers, caught, strict=True))
    assert torch.equal(final, model.model(**text, use_cache=False).last_hidden_state)


def test_another_tower_is_not_taken_for_the_teacher_s() -> None:
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


def models(kind: str, axis: str) -> tuple[Any, Any, Plan, Any]:
    """A student, its teacher, the plan and the processor of a complete model."""
    teacher, processor = load(folders.folder(kind))
    student, plan = copy.deepcopy(teacher), plan_for(teacher, axis)
    prune_(student, plan)
    return student, teacher, plan, processor


def weights(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def run(kind: str, axis: str, **changes: Any) -> tuple[dict[str, Tensor], History, Any]:
    """Weights and history after training, and what is left of the teacher."""
    student, teacher, plan, processor = models(kind, axis)
    samples = short_samples(8, kind in SEEING)
    history = recover(student, teacher, samples, config(**changes), processor, plan=plan)
    return weights(student), history, teacher


def assert_same_training(first: History, second: History) -> None:
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
        lambda kind, axis: (kind, axis) in (("llava", "both"), ("text", "both")),
    ),
)
def test_training_with_a_shared_teacher_is_training_with_a_separate_one(
    kind: str, axis: str
) -> None:
    changes = {"loss": ALL_LOSSES, "hidden_layers": "mapped"}
    ours, shared, _ = run(kind, axis, teacher_weights="shared", **changes)
    theirs, separate, _ = run(kind, axis, teacher_weights="separate", **changes)
    assert "shares" in shared.teacher
    assert separate.teacher == "separate"
    assert_same_training(shared, separate)
    for name in theirs:
        assert_close(ours[name], theirs[name], TRAINED)


@pytest.mark.parametrize(
    ("loss", "meaning"),
    [
        ("sft+kl+cosine", {"kd_on": "answer", "hidden_layers": "final"}),
        ("kl+cosine", {"kd_on": "all", "hidden_layers": "mapped"}),
    ],
)
def test_what_is_compared_follows_from_the_loss(loss: str, meaning: dict[str, Any]) -> None:
    """Answers that are learnt are compared, too; a teacher alone is followed everywhere."""
    ours, _, _ = run("llava", "both", loss=loss)
    same, _, _ = run("llava", "both", loss=loss, **meaning)
    other, _, _ = run("llava", "both", loss=loss, **{**meaning, "kd_on": "text"})
    assert all(torch.equal(ours[name], same[name]) for name in same)
    assert not all(torch.equal(ours[name], other[name]) for name in other)


@pytest.mark.parametrize("train", tiered(["projector", "full"], lambda train: train == "full"))
def test_sharing_follows_what_learns(train: str) -> None:
    """Full training leaves the tower alone to share; the projector's leaves all but itself."""
    ours, shared, _ = run("llava", "width", train=train)
    theirs, separate, _ = run("llava", "width", train=train, teacher_weights="separate")
    percent = int(re.findall(r"(\d+)%", shared.teacher)[0])
    assert percent < 30 if train == "full" else percent > 40
    assert_same_training(shared, separate)
    for name in theirs:
        assert_close(ours[name], theirs[name], TRAINED)


def test_frozen_tensors_stay_bit_equal_and_a_used_up_teacher_is_gone() -> None:
    before = weights(models("llava", "width")[0])
    after, _, teacher = run("llava", "width")
    learning = r"multi_modal_projector\.|language_model\.layers\.\d+\.(self_attn|mlp)\..*_proj\."
    frozen = [name for name in before if not re.search(learning, name)]
    assert [name for name in frozen if not torch.equal(after[name], before[name])] == []
    assert {parameter.device.type for parameter in teacher.parameters()} == {"meta"}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_a_shared_teacher_s_file_is_let_go(tmp_path: Path) -> None:
    """Weights are read by mapping their file, whose pages count as long as one tensor is used."""
    student, _, plan, _ = models("llava", "width")
    folder = shutil.copytree(folders.folder("llava"), tmp_path / "teacher")
    teacher, _ = load(folder)
    file = str(folder / "model.safetensors")
    assert file in Path("/proc/self/maps").read_text()
    share_(teacher, prepare_training(student, config()), plan)
    gc.collect()
    assert file not in Path("/proc/self/maps").read_text()


def test_a_separate_teacher_is_left_alone() -> None:
    _, teacher, _, _ = models("llava", "width")
    before = weights(teacher)
    _, _, same = run("llava", "width", teacher_weights="separate")
    now = weights(same)
    assert [name for name in before if not torch.equal(now[name], before[name])] == []


def test_repaired_matrices_are_copied_and_named() -> None:
    student, teacher, plan, processor = models("llava", "width")
    batch = {"input_ids": torch.arange(5, 25)[None], "attention_mask": torch.ones(1, 20).long()}
    repaired = [m for i, p, m in projections(student) if p.path == "mlp.down_proj" and i < 2]
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
    _, teacher, _, _ = models("llava", "width")
    with pytest.raises(ConfigError, match=r"teacher_weights 'shared' is not possible.*down_proj"):
        recover(student, teacher, SAMPLES, config(teacher_weights="shared"), processor, plan=plan)


def test_a_plan_of_another_teacher_is_not_used() -> None:
    student, teacher, _, processor = models("llava", "depth")
    other = plan_by_hand(read_anatomy(student), [0])
    assert why_not_shared(student, teacher, other) == "the model's plan is for another teacher"
    history = recover(student, teacher, SAMPLES, config(max_steps=1), processor, plan=other)
    assert history.teacher == "separate"
    alone = config(max_steps=1, loss="cosine")  # compared at the end, where no plan maps layers
    recover(student, teacher, SAMPLES, alone, processor, plan=other)
    for name, value in (("teacher_weights", "shared"), ("hidden_layers", "mapped")):
        options = config(**{name: value})
        with pytest.raises(ConfigError, match=f"{name} {value!r} needs the plan"):
            recover(student, teacher, SAMPLES, options, processor, plan=other)


# A teacher on disk.


def cached(out: Path, samples: Sequence[Sample] = SAMPLES, **options: Any) -> OfflineTeacher:
    teacher, processor = load(folders.folder("llava"))
    write_cache(teacher, processor, samples, out, **{"batch_size": 3, **options})
    return OfflineTeacher(out)


def offline_run(offline: Any, **changes: Any) -> History:
    student, teacher, plan, processor = models("llava", "both")
    teacher = teacher if offline is None else offline
    options = config(fraction=0.75, **changes)
    return recover(student, teacher, SAMPLES, options, processor, plan=plan)


@pytest.mark.parametrize("kd_on", tiered(["answer", "all"], lambda kd_on: kd_on == "answer"))
def test_stored_hidden_states_are_the_teacher(tmp_path: Path, kd_on: str) -> None:
    """Up to bfloat16; samples are found again in another order, and in a part of the data."""
    changes = {"loss": ALL_LOSSES, "kd_on": kd_on}
    found = offline_run(cached(tmp_path / "cache", kd_on=kd_on), **changes)
    expected = offline_run(None, **changes)
    assert found.teacher.startswith("offline")
    for ours, theirs in zip(found.steps, expected.steps, strict=True):
        for name in theirs:
            assert ours[name] == pytest.approx(theirs[name], rel=2e-2, abs=1e-3), name
    assert found.steps[0]["loss_sft"] == expected.steps[0]["loss_sft"]


def test_a_cache_says_which_positions_are_compared(tmp_path: Path) -> None:
    offline = cached(tmp_path / "cache", kd_on="text")
    found = offline_run(offline, loss="cosine")
    assert found.steps == offline_run(offline, loss="cosine", kd_on="text").steps


def test_a_stopped_cache_goes_on_and_only_a_whole_one_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slimvlm.training.offline.SHARD_SAMPLES", 3)
    out = tmp_path / "cache"
    cached(out)
    whole = {path.name: path.read_bytes() for path in out.iterdir()}
    assert len(whole) == 4
    (out / "shard-00001.safetensors").unlink()
    with pytest.raises(ConfigError, match="2 of 3 shards are there"):
        OfflineTeacher(out)
    teacher, processor = load(folders.folder("llava"))
    assert write_cache(teacher, processor, SAMPLES, out, batch_size=3) == 1
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole
    with pytest.raises(ConfigError, match="a cache with other kd_on"):
        write_cache(teacher, processor, SAMPLES, out, kd_on="all")
    with torch.no_grad():
        teacher.lm_head.weight[0] += 1
    with pytest.raises(ConfigError, match="a cache with other teacher and head"):
        write_cache(teacher, processor, SAMPLES, out)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kd_on": "text"}, "holds kd_on 'answer', not 'text'"),
        ({"paper_exact": True}, "lacks positions that paper_exact compares"),
        ({"hidden_layers": "mapped"}, "not hidden_layers 'mapped'"),
        ({"loss": "kl", "train": "full"}, "'kl' from them needs a model with the teacher's head"),
    ],
)
def test_a_cache_refuses_what_it_cannot_answer(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        offline_run(cached(tmp_path / "cache"), **changes)


def test_a_cache_of_other_data_is_refused(tmp_path: Path) -> None:
    """Lacking samples, changed answers, other pictures, and tokens that moved."""
    student, _, plan, processor = models("llava", "both")
    offline = cached(tmp_path / "few", SAMPLES[:4])
    with pytest.raises(ConfigError, match="lacks sample 's4' of the data and 3 more samples"):
        recover(student, offline, SAMPLES, config(), processor, plan=plan)
    offline = cached(tmp_path / "cache")
    changed = copy.deepcopy(SAMPLES)
    changed[2].messages[-1]["content"][0]["text"] = "It is something else."
    with pytest.raises(ConfigError, match="lacks sample 's2' with other content"):
        recover(student, offline, changed, config(), processor, plan=plan)
    blank = Sample("s3", SAMPLES[3].messages, (folders.picture(99),))
    assert digest_of_sample(blank) != digest_of_sample(SAMPLES[3])
    processor.chat_template = processor.chat_template.replace("'<image>\n'", "'<image>'")
    with pytest.raises(ConfigError, match="had other tokens or positions"):
        recover(student, offline, SAMPLES, config(), processor, plan=plan)


def test_a_cache_is_replaced_when_the_new_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slimvlm.training.offline.SHARD_SAMPLES", 2)
    data, folder = folders.write_llava_data(tmp_path / "data", 4), str(folders.folder("llava"))
    command = ["cache-teacher", folder, "--data", str(data), "--out", str(tmp_path / "cache")]
    main(command)
    before = {path.name: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
    renewed = [*command, "--kd-on", "all", "--force"]
    honest = offline_teacher.encode_samples
    calls: list[int] = []

    def stops(*args: Any) -> Any:
        calls.append(len(calls))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return honest(*args)

    monkeypatch.setattr(offline_teacher, "encode_samples", stops)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        main(renewed)
    assert {path.name: path.read_bytes() for path in (tmp_path / "cache").iterdir()} == before
    main(renewed)
    assert len(calls) == 3  # the first shard was kept
    assert OfflineTeacher(tmp_path / "cache").index.kd_on == "all"
    assert list(tmp_path.glob(".*")) == []


def test_the_command_line_trains_from_a_cache(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, folder = folders.write_llava_data(tmp_path / "data", 4), str(folders.folder("llava"))
    given = ["--data", str(data)]
    cache, pruned, out = (str(tmp_path / name) for name in ("cache", "pruned", "out"))
    main(["prune", folder, "--ratio", "0.2", "--criterion", "magnitude", "--out", pruned])
    main(["cache-teacher", folder, *given, "--out", cache])
    short = ["--max-steps", "1", "--lora-rank", "4", "--keep-adapter"]
    main(["recover", pruned, *given, "--teacher", cache, "--out", out, *short])
    assert f"teacher: offline ({cache})" in capsys.readouterr().err
    assert (Path(out) / "adapter" / "adapter_config.json").is_file()
    assert list(tmp_path.glob(".*")) == []
    again = str(tmp_path / "again")
    main(["recover", pruned, *given, "--teacher", folder, "--out", again, *short])
    assert "of its weights with the model" in capsys.readouterr().err
