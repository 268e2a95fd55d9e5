"""Losses against their textbook forms and against what the study's trainer computes."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

from slimvlm.data.roles import IGNORE
from slimvlm.models import losses
from tests.tolerances import HALF, LOSS, Tolerance, assert_close

B, T, V, D = 3, 11, 17, 8
DIVERGENCES = {kind: partial(losses.divergence, kind=kind) for kind in ("kl", "rkl", "jsd")}
KINDS = {**DIVERGENCES, "hidden_l2": losses.hidden_l2, "hidden_cosine": losses.hidden_cosine}
kinds = pytest.mark.parametrize("kind", KINDS)
SAME = Tolerance(torch.float32, 1e-6, 1e-6)


def as_is(logits):
    return logits


def labelled(tokens=T):
    """Logits and labels of three samples with different numbers of labels."""
    labels = torch.randint(0, V, (B, tokens))
    for row in range(B):
        labels[row, : 2 + 3 * row] = IGNORE
    return torch.randn(B, tokens, V), labels


def textbook(kind, student, teacher, temperature=2.0):
    """Divergence of each position, as torch has it, times temperature squared."""
    ours, theirs = ((x.double() / temperature).log_softmax(-1) for x in (student, teacher))
    mixture = ((ours.exp() + theirs.exp()) / 2).log()
    pairs = {"kl": [(theirs, ours)], "rkl": [(ours, theirs)]}
    pairs["jsd"] = [(theirs, mixture), (ours, mixture)]
    found = [
        F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
        for log_p, log_q in pairs[kind]
    ]
    return torch.stack(found).mean(0) * temperature**2


def assert_same_gradients(found, expected, ours, theirs, tolerance):
    """Compare two losses and their gradients."""
    assert_close(found.detach(), expected.detach(), tolerance)
    pairs = zip(
        torch.autograd.grad(found, ours), torch.autograd.grad(expected, theirs), strict=True
    )
    for a, b in pairs:
        assert_close(a, b, tolerance)


def test_token_losses_sit_at_their_tokens_and_no_label_counts_at_the_first():
    logits, labels = labelled()
    per_token = losses.token_cross_entropy(logits, as_is, labels)
    assert per_token.shape == (B, T - 1)
    for row in range(B):
        for position in range(1, T):
            expected = torch.tensor(0.0)
            if labels[row, position] != IGNORE:
                expected = F.cross_entropy(logits[row, position - 1], labels[row, position])
            assert_close(per_token[row, position - 1], expected, LOSS)
    labels = torch.tensor([[5, 6, 7], [5, -100, 7], [5, -100, -100]])
    assert losses.label_counts(labels).tolist() == [2, 1, 0]


@kinds
def test_only_the_student_learns_and_half_precision_gives_float32(kind):
    student, teacher = (torch.randn(B, T, V, requires_grad=True) for _ in range(2))
    KINDS[kind](student, teacher).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None
    student, teacher = torch.randn(B, T, V), torch.randn(B, T, V)
    loss = KINDS[kind](student.bfloat16(), teacher.bfloat16())
    assert loss.dtype == torch.float32
    assert_close(loss, KINDS[kind](student, teacher), HALF)


@kinds
@pytest.mark.parametrize("mask_dtype", [torch.long, torch.bool])
def test_what_the_mask_hides_does_not_count(kind, mask_dtype):
    student, teacher = torch.randn(B, T, V), torch.randn(B, T, V)
    mask = torch.ones(B, T, dtype=mask_dtype)
    mask[0, 4:] = 0
    mask[2, 0] = 0
    masked = KINDS[kind](student, teacher, mask=mask)
    alone = [
        KINDS[kind](student[b : b + 1, t : t + 1], teacher[b : b + 1, t : t + 1])
        for b, t in mask.nonzero().tolist()
    ]
    assert_close(masked, torch.stack(alone).mean(), LOSS)
    student[mask == 0] = -100 * teacher[mask == 0]
    assert_close(KINDS[kind](student, teacher, mask=mask), masked, LOSS)
    assert KINDS[kind](student, teacher) > 1.2 * masked  # without the mask it would
    assert KINDS[kind](student, teacher, mask=torch.zeros(B, T, dtype=mask_dtype)).item() == 0
    student[mask == 0] = float("nan")  # attention to nothing but padding
    student.requires_grad_()
    KINDS[kind](student, teacher, mask=mask).backward()
    assert student.grad is not None
    assert not student.grad[mask == 0].any()
    assert student.grad[mask == 1].isfinite().all()


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize(
    ("samples", "tokens", "temperature"), [(B, T, 1.0), (B, T, 4.0), (1, 128, 2.0), (1, 257, 2.0)]
)
def test_divergences_and_their_gradients_are_those_of_the_textbook(
    kind, samples, tokens, temperature
):
    student, teacher = 3 * torch.randn(samples, tokens, V), 3 * torch.randn(samples, tokens, V)
    ours, theirs = (student.clone().requires_grad_() for _ in range(2))
    found = KINDS[kind](ours, teacher, temperature=temperature)
    expected = textbook(kind, theirs, teacher, temperature).mean()
    assert_same_gradients(found, expected, [ours], [theirs], LOSS)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_paper_reduction_sums_all_positions_over_the_batch_size(kind):
    student, teacher = torch.randn(B, T, V), torch.randn(B, T, V)
    mask = torch.zeros(B, T, dtype=torch.long)  # the study's trainer has no mask
    mask[:, :2] = 1
    expected = textbook(kind, student, teacher).sum() / B
    assert_close(KINDS[kind](student, teacher, mask=mask, reduction="paper"), expected, LOSS)


def test_hidden_distances_are_plain_mse_and_one_minus_the_cosine():
    student, teacher = torch.randn(B, T, D), torch.randn(B, T, D)
    mask = torch.zeros(B, T, dtype=torch.bool)
    mask[:, 0] = True
    loss = losses.hidden_l2(student, teacher, mask, reduction="paper")
    assert_close(loss, F.mse_loss(student, teacher), LOSS)
    assert not torch.allclose(loss, losses.hidden_l2(student, teacher, mask))
    expected = 1 - F.cosine_similarity(student.double(), teacher.double(), dim=-1).mean()
    assert_close(losses.hidden_cosine(student, teacher), expected, LOSS)
    assert_close(losses.hidden_cosine(5 * student, teacher), expected, LOSS)  # length is nothing
    assert_close(losses.hidden_cosine(-teacher, teacher), torch.tensor(2.0), LOSS)


@given(st.floats(0.5, 8), st.floats(0, 60), st.integers(0, 9))
def test_distances_are_finite_and_not_negative(temperature, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(2, 4, V, generator=generator) for _ in range(2))
    values = [d(student, teacher, temperature=temperature) for d in DIVERGENCES.values()]
    values += [distance(student, teacher) for distance in (losses.hidden_l2, losses.hidden_cosine)]
    for value in values:
        assert torch.isfinite(value)
        assert value >= -1e-5


@given(st.floats(0, 60), st.integers(0, 9))
def test_jsd_is_the_mean_divergence_from_the_mixture_bounded_and_symmetric(scale, seed):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(2, 4, V, generator=generator) for _ in range(2))
    value = DIVERGENCES["jsd"](student, teacher, temperature=2.0)
    assert value <= 4 * torch.tensor(2.0).log() + 1e-5
    assert_close(value, DIVERGENCES["jsd"](teacher, student), Tolerance(torch.float32, 1e-5, 1e-5))


@given(st.sets(st.integers(0, 11), min_size=1))
def test_a_layer_answers_for_the_removed_run_behind_it(kept):
    layers = sorted(kept)
    compared = losses.layer_map(layers, 12)
    reach = [set(range(a, b + 1)) for a, b in zip(layers, compared, strict=True)]
    assert all(run & kept == {start} for run, start in zip(reach, layers, strict=True))
    assert set().union(*reach) == set(range(layers[0], 12))


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", 4)
    return 4


def heads():
    """Hidden states of student and teacher, and a head for each."""
    wide = 2 * D
    made = nn.Linear(D, V, bias=False), nn.Linear(wide, V)
    return torch.randn(B, T, D), torch.randn(B, T, wide), *made


@pytest.mark.parametrize("reduction", ["token_mean", "paper"])
@pytest.mark.parametrize("kind", ["kl", "rkl", "jsd"])
def test_a_divergence_of_hidden_states_is_that_of_their_logits(kind, reduction, small_chunks):
    student, teacher, head, teacher_head = heads()
    student.requires_grad_()
    mask = torch.rand(B, T) < 0.6
    options = {"temperature": 1.5, "reduction": reduction}
    expected = DIVERGENCES[kind](head(student), teacher_head(teacher), mask=mask, **options)
    loss = losses.divergence(*(student, teacher, head, teacher_head, mask, kind), **options)
    leaves = [student, head.weight]
    assert_same_gradients(loss, expected, leaves, leaves, SAME)
    loss = losses.divergence(student, teacher.requires_grad_(), head, teacher_head, kind=kind)
    loss.backward()
    assert teacher.grad is teacher_head.weight.grad is None


@pytest.mark.parametrize("tokens", [T, 4, 5, 6, 10])
def test_cross_entropy_is_that_of_transformers_and_no_label_still_a_graph(tokens, small_chunks):
    """Chunks are invisible, whether the last one is full or not."""
    hidden, _, head, _ = heads()
    hidden = hidden[:, :tokens].requires_grad_()
    labels = labelled()[1][:, :tokens]
    leaves = [hidden, head.weight]
    loss = losses.cross_entropy(hidden, head, labels)
    expected = ForCausalLMLoss(head(hidden), labels, vocab_size=V)
    assert_same_gradients(loss, expected, leaves, leaves, SAME)
    # one rank of several may have no answer in its batch, and must take part in the backward
    student, teacher, head, teacher_head = heads()
    student.requires_grad_()
    labels = torch.full((B, T), IGNORE)
    nothing = torch.zeros(B, T, dtype=torch.bool)
    for loss in (
        losses.cross_entropy(student, head, labels),
        losses.divergence(student, teacher, head, teacher_head, nothing),
    ):
        assert loss.item() == 0
        loss.backward()
    assert student.grad is not None
    assert not student.grad.any()


def test_no_more_than_one_chunk_of_logits_exists(small_chunks):
    """No larger one comes from the head; only the last one waits for the backward pass."""
    student, teacher, head, teacher_head = heads()
    student.requires_grad_()
    seen = []
    kept = []

    def recorded(layer):
        def run(rows):
            seen.append(len(rows))
            return layer(rows)

        return run

    def pack(saved):
        kept.append(saved.shape)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        labels = torch.randint(0, V, (B, T))
        loss = losses.cross_entropy(student, recorded(head), labels)
        for kind in ("kl", "rkl", "jsd"):
            loss = loss + losses.divergence(
                student, teacher, recorded(head), recorded(teacher_head), kind=kind
            )
    assert loss.isfinite()
    assert max(seen) == small_chunks
    lasts = {B * (T - 1) % small_chunks, B * T % small_chunks}
    of_logits = [shape for shape in kept if shape[-1:] == (V,) and shape != (D, V)]
    assert {rows for rows, _ in of_logits} == lasts == {1, 2}  # (D, V) is the head's weight


def test_half_precision_hidden_states_give_float32_losses():
    student, teacher, head, teacher_head = heads()
    _, labels = labelled()
    expected = losses.divergence(student, teacher, head, teacher_head)
    entropy = losses.cross_entropy(student, head, labels)
    with torch.autocast("cpu", torch.bfloat16):
        loss = losses.divergence(student, teacher, head, teacher_head)
        half = losses.cross_entropy(student, head, labels)
    assert loss.dtype == half.dtype == torch.float32
    assert_close(loss, expected, HALF)
    assert_close(half, entropy, HALF)
