"""A teacher on the card or on the CPU: the student on the card learns what it learns on the CPU."""

import copy
from functools import cache

import pytest
import torch

import slimvlm as sv
from slimvlm.models.load import load
from tests import tiny_folder as folders
from tests.handmade import plan_by_hand

SAMPLES = folders.short_samples(6)


def config(**changes):
    values = {
        **{"train": "lora", "loss": "0.5*sft+0.5*kl", "max_steps": 2, "batch_size": 2},
        **{"learning_rate": 1e-3, "lora_rank": 4, "lora": {"lora_alpha": 8, "lora_dropout": 0.0}},
        **{"bf16": False},
    }
    return sv.RecoverConfig(**{**values, **changes})


def pruned(device="cpu"):
    """A student on a device, what it was before it was pruned, their processor, and the plan."""
    teacher, processor = load(folders.folder("llava"), device="cpu")
    student = copy.deepcopy(teacher)
    plan = plan_by_hand(sv.anatomy(student), [0, 1, 3], [0, 2], [*range(0, 64, 2), *range(64, 80)])
    sv.prune_(student, plan)
    return student.to(device), teacher, processor, plan


def learnt(device, of_teacher, share=True, **changes):
    """Weights after a short training, and the line on the teacher."""
    student, teacher, processor, plan = pruned(device)
    teacher.to(of_teacher)
    options = config(**changes)
    history = sv.recover(student, teacher, SAMPLES, options, processor, plan=plan, share=share)
    (place,) = {parameter.device.type for parameter in student.parameters()}
    assert place == torch.device(device).type
    weights = {name: value.cpu() for name, value in student.state_dict().items()}
    return weights, history.teacher


@cache
def on_cpu(loss, share):
    """What is learnt on the CPU. Tests must not change it."""
    return learnt("cpu", "cpu", share, loss=loss)


@pytest.mark.parametrize("where", ["card", "cpu"])
@pytest.mark.parametrize(
    ("share", "loss"),
    [
        (True, "0.5*sft+0.5*kl"),
        pytest.param(True, "hidden+cosine", marks=pytest.mark.slow),
        pytest.param(False, "jsd+rkl", marks=pytest.mark.slow),
    ],
)
def test_wherever_the_teacher_was_the_same_is_learnt(where, share, loss, card):
    of_teacher = card if where == "card" else torch.device("cpu")
    found, line = learnt(card, of_teacher, share, loss=loss)
    expected, same_line = on_cpu(loss, share)
    assert line == same_line
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)
