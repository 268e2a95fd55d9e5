"""Losses against their textbook forms and against what the study's trainer computes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.loss.loss_utils import ForCausalLMLoss

from slimvlm import losses
from tests.tolerances import HALF, LOSS, assert_close

B, T, V, D = 3, 11, 17, 8
Distance = Callable[..., Tensor]
KINDS = {"kl": losses.kl, "reverse_kl": losses.reverse_kl, "hidden_l2": losses.hidden_l2}
kinds = pytest.mark.parametrize("kind", KINDS)


def labelled(tokens: int = T) -> tuple[Tensor, Tensor]:
    """Logits and labels of three samples with different numbers of labels."""
    labels = torch.randint(0, V, (B, tokens))
    for row in range(B):
        labels[row, : 2 + 3 * row] = losses.IGNORE
    return torch.randn(B, tokens, V), labels


def textbook_kl(target: Tensor, other: Tensor, temperature: float) -> Tensor:
    """KL(target || other) of each position, as torch has it, times temperature squared."""
    log_p = (target.double() / temperature).log_softmax(-1)
    log_q = (other.double() / temperature).log_softmax(-1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1) * temperature**2


def test_cross_entropy_is_transformers_loss() -> None:
    logits, labels = labelled()
    expected = ForCausalLMLoss(logits, labels, vocab_size=V)
    assert_close(losses.cross_entropy(logits, labels), expected, LOSS)


def test_cross_entropy_gradient_is_transformers_gradient() -> None:
    logits, labels = labelled()
    gradients = []
    for loss in (losses.cross_entropy, lambda x, y: ForCausalLMLoss(x, y, vocab_size=V)):
        leaf = logits.clone().requires_grad_()
        loss(leaf, labels).backward()
        gradients.append(leaf.grad)
    assert_close(gradients[0], gradients[1], LOSS)


def test_cross_entropy_without_any_label_is_zero_not_nan() -> None:
    logits, labels = labelled()
    logits.requires_grad_()
    loss = losses.cross_entropy(logits, torch.full_like(labels, losses.IGNORE))
    assert loss.item() == 0


def test_cross_entropy_of_half_logits_is_computed_in_float32() -> None:
    logits, labels = labelled()
    loss = losses.cross_entropy(logits.bfloat16(), labels)
    assert loss.dtype == torch.float32
    assert_close(loss, losses.cross_entropy(logits, labels), HALF)


def test_token_losses_sit_at_their_tokens() -> None:
    logits, labels = labelled()
    per_token = losses.token_cross_entropy(logits, labels)
    assert per_token.shape == (B, T - 1)
    for row in range(B):
        for position in range(1, T):
            expected = torch.tensor(0.0)
            if labels[row, position] != losses.IGNORE:
                expected = F.cross_entropy(logits[row, position - 1], labels[row, position])
            assert_close(per_token[row, position - 1], expected, LOSS)


def test_label_counts_leave_out_the_first_token() -> None:
    labels = torch.tensor([[5, 6, 7], [5, -100, 7], [5, -100, -100]])
    assert losses.label_counts(labels).tolist() == [2, 1, 0]


@kinds
@pytest.mark.parametrize("reduction", ["token_mean", "paper"])
def test_a_model_has_no_distance_to_itself(kind: str, reduction: str) -> None:
    student = torch.randn(B, T, V, requires_grad=True)
    loss = KINDS[kind](student, student.detach().clone(), reduction=reduction)
    loss.backward()
    assert student.grad is not None
    assert abs(loss.item()) < 1e-6
    assert student.grad.abs().max() < 1e-6
    other = KINDS[kind](student, torch.randn(B, T, V), reduction=reduction)
    assert other.item() > 0.1  # the zero above means something


@kinds
def test_only_the_student_learns(kind: str) -> None:
    student = torch.randn(B, T, V, requires_grad=True)
    teacher = torch.randn(B, T, V, requires_grad=True)
    KINDS[kind](student, teacher).backward()
    assert student.grad is not None
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


@kinds
@pytest.mark.parametrize("mask_dtype", [torch.long, torch.bool])
def test_what_the_mask_hides_does_not_count(kind: str, mask_dtype: torch.dtype) -> None:
    student, teacher = torch.randn(B, T, V), torch.randn(B, T, V)
    mask = torch.ones(B, T, dtype=mask_dtype)
    mask[0, 4:] = 0
    mask[2, 0] = 0
    masked = KINDS[kind](student, teacher, mask)
    student[mask == 0] = 100 * torch.randn(int((mask == 0).sum()), V)
    assert_close(KINDS[kind](student, teacher, mask), masked, LOSS)
    assert KINDS[kind](student, teacher) > 1.5 * masked  # without the mask it would


@kinds
def test_padding_changes_nothing(kind: str) -> None:
    student, teacher = torch.randn(B, T, V), torch.randn(B, T, V)
    mask = torch.ones(B, T, dtype=torch.long)
    expected = KINDS[kind](student, teacher, mask)
    longer = [F.pad(x, (0, 0, 0, 5), value=3.0) for x in (student, teacher)]
    longer[0][:, T:] += torch.randn(B, 5, V)
    assert_close(KINDS[kind](*longer, F.pad(mask, (0, 5))), expected, LOSS)


@kinds
def test_token_mean_is_a_mean_over_tokens(kind: str) -> None:
    student, teacher = torch.randn(B, T, V), torch.randn(B, T, V)
    mask = torch.rand(B, T) < 0.6
    alone = [
        KINDS[kind](student[b : b + 1, t : t + 1], teacher[b : b + 1, t : t + 1])
        for b, t in mask.nonzero().tolist()
    ]
    assert_close(KINDS[kind](student, teacher, mask), torch.stack(alone).mean(), LOSS)


@kinds
def test_a_mask_of_nothing_gives_zero_not_nan(kind: str) -> None:
    nothing = torch.zeros(B, T, dtype=torch.bool)
    assert KINDS[kind](torch.randn(B, T, V), torch.randn(B, T, V), nothing).item() == 0


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_kl_is_teacher_first_and_reverse_kl_student_first(temperature: float) -> None:
    student, teacher = 3 * torch.randn(B, T, V), 3 * torch.randn(B, T, V)
    forward = losses.kl(student, teacher, temperature=temperature)
    backward = losses.reverse_kl(student, teacher, temperature=temperature)
    assert_close(forward, textbook_kl(teacher, student, temperature).mean(), LOSS)
    assert_close(backward, textbook_kl(student, teacher, temperature).mean(), LOSS)
    assert abs(forward - backward) > 0.01  # they are different things


@pytest.mark.parametrize("kind", ["kl", "reverse_kl"])
def test_gradients_are_those_of_the_textbook(kind: str) -> None:
    student, teacher = torch.randn(B, T, V), torch.randn(B, T, V)
    ours = student.clone().requires_grad_()
    KINDS[kind](ours, teacher, temperature=2.0).backward()
    theirs = student.double().requires_grad_()
    pair = (teacher.double(), theirs) if kind == "kl" else (theirs, teacher.double())
    textbook_kl(*pair, 2.0).mean().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    assert_close(ours.grad, theirs.grad, LOSS)


@pytest.mark.parametrize("kind", ["kl", "reverse_kl"])
def test_paper_reduction_sums_all_positions_over_the_batch_size(kind: str) -> None:
    student, teacher = torch.randn(B, T, V), torch.randn(B, T, V)
    mask = torch.zeros(B, T, dtype=torch.long)  # the study's trainer has no mask
    mask[:, :2] = 1
    pair = (teacher, student) if kind == "kl" else (student, teacher)
    expected = textbook_kl(*pair, 2.0).sum() / B
    assert_close(KINDS[kind](student, teacher, mask, reduction="paper"), expected, LOSS)


def test_paper_reduction_of_hidden_l2_is_plain_mse() -> None:
    student, teacher = torch.randn(B, T, D), torch.randn(B, T, D)
    mask = torch.zeros(B, T, dtype=torch.bool)
    mask[:, 0] = True
    loss = losses.hidden_l2(student, teacher, mask, reduction="paper")
    assert_close(loss, F.mse_loss(student, teacher), LOSS)
    assert not torch.allclose(loss, losses.hidden_l2(student, teacher, mask))


@pytest.mark.parametrize("tokens", [1023, 1024, 1025, 2049])
@pytest.mark.parametrize("kind", ["kl", "reverse_kl"])
def test_chunks_are_invisible(kind: str, tokens: int) -> None:
    student, teacher = torch.randn(1, tokens, V), torch.randn(1, tokens, V)
    pair = (teacher, student) if kind == "kl" else (student, teacher)
    assert_close(KINDS[kind](student, teacher), textbook_kl(*pair, 2.0).mean(), LOSS)


@pytest.mark.parametrize("tokens", [1024, 1025, 1026, 2050])
def test_chunks_of_cross_entropy_are_invisible(tokens: int) -> None:
    logits, labels = torch.randn(1, tokens, V), torch.randint(0, V, (1, tokens))
    expected = ForCausalLMLoss(logits, labels, vocab_size=V)
    assert_close(losses.cross_entropy(logits, labels), expected, LOSS)


@given(st.floats(0.5, 8), st.floats(0, 60), st.integers(0, 9))
def test_divergences_are_finite_and_not_negative(
    temperature: float, scale: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(2, 4, V, generator=generator) for _ in range(2))
    for divergence in (losses.kl, losses.reverse_kl):
        value = divergence(student, teacher, temperature=temperature)
        assert torch.isfinite(value)
        assert value >= -1e-5


@kinds
def test_half_precision_inputs_give_float32_losses(kind: str) -> None:
    student, teacher = torch.randn(B, T, V), torch.randn(B, T, V)
    loss = KINDS[kind](student.bfloat16(), teacher.bfloat16())
    assert loss.dtype == torch.float32
    assert_close(loss, KINDS[kind](student, teacher), HALF)
