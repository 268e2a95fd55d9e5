"""A training whose batches do not fit on a card takes smaller ones, and learns the same."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import slimvlm as sv
from slimvlm.models.cost import release_memory
from tests import pretended_gpu
from tests import tiny_folder as folders
from tests.gpu.alike import assert_close

pytestmark = pytest.mark.skipif(pretended_gpu.REASON is not None, reason=str(pretended_gpu.REASON))


def trained(batch_size: int, card: torch.device, room: int = 0) -> tuple[dict[str, Tensor], int]:
    """The weights after two steps on a card, and the most bytes that these took beside them."""
    model, processor = sv.load(str(folders.folder("llava")), device="cpu")
    teacher = copy.deepcopy(model)
    config = sv.RecoverConfig(
        **{"train": "full", "loss": "sft+kl", "max_steps": 2, "batch_size": batch_size},
        **{"learning_rate": 1e-3, "bf16": False, "trainer": {"logging_steps": 1}},
    )
    model.to(card)
    release_memory()
    before = torch.cuda.memory_allocated(card)
    torch.cuda.reset_peak_memory_stats(card)
    with pretended_gpu.limit(room or 1 << 40, card):
        samples = folders.short_samples(12)
        history = sv.recover(model, teacher, samples, config, processor)
    assert len(history.steps) == 2
    peak = torch.cuda.max_memory_allocated(card) - before
    return {name: value.cpu() for name, value in model.state_dict().items()}, peak


@pytest.mark.parametrize("size", [6, pytest.param(4, marks=pytest.mark.slow)])
def test_batches_that_do_not_fit_are_divided(
    size: int, card: torch.device, capsys: pytest.CaptureFixture[str]
) -> None:
    expected, most = trained(size, card)
    _, least = trained(1, card)
    assert least < most
    capsys.readouterr()
    found, _ = trained(size, card, room=(3 * least + most) // 4)
    assert f"no memory on cuda:0 for batches of {size}: 2 batches of" in capsys.readouterr().err
    assert_close(found, expected)


def test_what_fits_in_no_batches_is_one_error(card: torch.device) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        trained(2, card, room=1000)
