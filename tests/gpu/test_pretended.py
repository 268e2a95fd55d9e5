"""The pretended card itself: its values are the CPU's, and it refuses what a card refuses."""

import pytest
import torch

from tests import pretended_gpu
from tests.gpu.alike import pretended

pytestmark = pretended


def test_what_a_card_refuses_is_refused(card):
    """Two devices in one operator, a generator of the CPU, and numpy."""
    for error, told, use in (
        (RuntimeError, "same device", lambda x: x + torch.ones(3)),
        (RuntimeError, "same device", lambda x: x.index_select(0, torch.tensor([1]))),
        (RuntimeError, "generator", lambda x: x.normal_(generator=torch.Generator())),
        (TypeError, "numpy", lambda x: x.numpy()),
    ):
        with pytest.raises(error, match=told):
            use(torch.ones(3, device=card))
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(3, device=card, generator=torch.Generator())
    drawn = torch.randn(3, device=card, generator=torch.Generator(card).manual_seed(3))
    assert torch.equal(drawn.cpu(), torch.randn(3, generator=torch.Generator().manual_seed(3)))


def test_bytes_are_counted_freed_and_limited(card):
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    x = torch.empty(1 << 20, dtype=torch.uint8, device=card)
    assert torch.cuda.memory_allocated() - before == 1 << 20
    del x
    assert torch.cuda.memory_allocated() == before
    assert torch.cuda.max_memory_allocated() - before == 1 << 20
    with pretended_gpu.limit(1000), pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        torch.empty(2000, dtype=torch.uint8, device=card)
    torch.empty(2000, dtype=torch.uint8, device=card)


def test_what_waits_for_the_card_is_counted(card):
    x = torch.ones(4, device=card)

    assert pretended_gpu.waits_of(lambda: x + x) == 0
    assert pretended_gpu.waits_of(lambda: x.sum().item()) == 1
    assert pretended_gpu.waits_of(lambda: x.tolist()) == 1
    assert pretended_gpu.waits_of(lambda: x[x > 0]) >= 1
    assert pretended_gpu.waits_of(lambda: x[torch.tensor([1, 2], device=card).long()]) <= 1
    assert pretended_gpu.waits_of(lambda: torch.ones(3).to(card)) == 1
    pinned = torch.ones(3).pin_memory()
    assert pinned.is_pinned()
    assert pretended_gpu.waits_of(lambda: pinned.to(card, non_blocking=True)) == 0


def test_two_cards_refuse_each_other():
    if torch.cuda.device_count() < 2:
        pytest.skip("PRETENDED_GPUS=2 makes two cards")
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(3, device="cuda:0") + torch.ones(3, device="cuda:1")
