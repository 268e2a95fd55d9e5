"""A student with fewer tokens learns from a teacher that has all of them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

import slimvlm as sv
from slimvlm.data.tokenizer_file import TokenizerFile
from slimvlm.models.anatomy import read_anatomy
from slimvlm.planning.plan import Plan
from slimvlm.pruning.tokens import token_ids_of, trimmed_processor
from slimvlm.training.offline import OfflineTeacher, write_cache
from tests import tiny_folder, tiny_words
from tests.handmade import random_scores

LOSSES = ("hidden", "cosine", "kl", "rkl", "jsd")


def pair(kind: str, words: int, ratio: float = 0.0) -> tuple[Any, Any, Any, Any, Plan]:
    """Student, teacher, their processors, and the plan between them.

    The student keeps what it must and ``words`` tokens more of what the samples have.
    """
    teacher, processor = sv.load(tiny_words.folder(kind), device="cpu")
    named = token_ids_of(teacher.config, teacher.generation_config)
    needed = TokenizerFile.of(processor).with_parts({*TokenizerFile.of(processor).needed, *named})
    tokens = sv.choose_tokens(processor, samples(kind), len(needed) + words, keep=named)
    anatomy = read_anatomy(teacher)
    plan = sv.make_plan(anatomy, random_scores(anatomy), ratio, "both", tokens=tokens)
    student = copy.deepcopy(teacher)
    sv.prune_(student, plan)
    return student, teacher, trimmed_processor(processor, plan), processor, plan


def samples(kind: str) -> list[sv.Sample]:
    return tiny_folder.short_samples(8, sees=kind == "llava")


def config(**changes: Any) -> sv.RecoverConfig:
    values = {
        "train": "lora",
        "max_steps": 2,
        "batch_size": 4,
        "learning_rate": 1e-3,
        "lora_rank": 2,
        "lora_alpha": 4,
        "lora_dropout": 0.0,
        "bf16": False,
        "logging_steps": 1,
    }
    return sv.RecoverConfig(**{**values, **changes})


@pytest.mark.parametrize("kind", ["text", "llava"])
@pytest.mark.parametrize("words", [0, 60])
@pytest.mark.parametrize("teacher_weights", ["auto", "separate"])
def test_a_student_that_lost_tokens_alone_says_what_its_teacher_says(
    kind: str, words: int, teacher_weights: str
) -> None:
    """Also on texts that it writes in other, shorter tokens than its teacher would."""
    student, teacher, processor, whole, plan = pair(kind, words)
    (ours,) = sv.calibration_batches(processor, samples(kind)[:1])
    (theirs,) = sv.calibration_batches(whole, samples(kind)[:1])
    if not words:
        assert ours["input_ids"].shape[1] > theirs["input_ids"].shape[1]
    asked = config(loss="+".join(f"0.2*{name}" for name in LOSSES), teacher_weights=teacher_weights)
    history = sv.recover(student, teacher, samples(kind), asked, processor, plan=plan)
    for name in LOSSES:
        assert history.steps[0][f"loss_{name}"] == pytest.approx(0, abs=1e-5)


def test_the_teacher_shares_all_but_the_rows_of_tokens() -> None:
    student, teacher, processor, _, plan = pair("text", 60, ratio=0.4)
    assert plan.cuts_layers
    asked = config(loss="sft+kl", teacher_weights="shared")
    history = sv.recover(student, teacher, samples("text"), asked, processor, plan=plan)
    assert history.teacher.startswith("the teacher shares")
    again, teacher, processor, _, plan = pair("text", 60, ratio=0.4)
    asked = config(loss="sft+kl", teacher_weights="separate")
    apart = sv.recover(again, teacher, samples("text"), asked, processor, plan=plan)
    for shared, separate in zip(history.steps[:2], apart.steps[:2], strict=True):
        assert shared["loss_kl"] == pytest.approx(separate["loss_kl"], abs=1e-5)
        assert shared["loss_kl"] > 1e-4


def test_without_the_plan_the_vocabularies_do_not_fit() -> None:
    student, teacher, processor, _, _ = pair("text", 60)
    with pytest.raises(sv.SlimError, match="vocab_size is"):
        sv.recover(student, teacher, samples("text"), config(loss="kl"), processor)


def test_a_teacher_on_disk_is_read_by_its_own_numbers(tmp_path: Path) -> None:
    student, teacher, processor, whole, plan = pair("text", 200)
    write_cache(teacher, whole, samples("text"), tmp_path / "said")
    said = OfflineTeacher(tmp_path / "said")
    history = sv.recover(
        student, said, samples("text"), config(loss="hidden"), processor, plan=plan
    )
    assert history.steps[0]["loss_hidden"] == pytest.approx(0, abs=1e-3)  # it lies in bfloat16
    student, _, processor, _, plan = pair("text", 0)
    with pytest.raises(sv.SlimError, match="had other tokens"):
        sv.recover(student, said, samples("text"), config(loss="hidden"), processor, plan=plan)
