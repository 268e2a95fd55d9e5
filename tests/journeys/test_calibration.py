"""Calibration samples become batches: each sample once, those alike together."""

import math

import pytest
import torch

from slimvlm.data.chat import encode_samples
from slimvlm.data.general import general_samples
from slimvlm.runs.stages import Calibration
from slimvlm.scoring.batches import mean_answer_loss
from tests import tiny_folder as folders


def samples():
    """Long and short ones, with pictures and without, in turn."""
    kinds = [(1, 1), (40, 0), (3, 1), (2, 0)]
    return [
        folders.sample(
            f"{words}-{images}-{number}",
            folders.turn("user", *[None] * images, "word " * words),
            folders.turn("assistant", "yes"),
            images=images,
        )
        for number in range(4)
        for words, images in kinds
    ]


def tokens(batches):
    """The unpadded tokens of all samples."""
    return sorted(
        ids[mask.bool()].tolist()
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    )


def alone(given):
    return tokens([encode_samples(folders.processor("llava"), [each]) for each in given])


def test_samples_that_are_alike_share_a_batch_and_every_fourth_is_held_out():
    batches = Calibration(folders.processor("llava"), samples(), hold_out=False).fitted
    assert tokens(batches) == alone(samples())
    for batch in batches:
        assert batch["attention_mask"].all()  # nothing is padded
        assert len(batch.get("pixel_values", torch.empty(0))) in (0, len(batch["input_ids"]))
    calibration = Calibration(folders.processor("llava"), samples(), hold_out=True)
    assert tokens(calibration.held_out) == alone(samples()[3::4])
    assert tokens([*calibration.fitted, *calibration.held_out]) == alone(samples())


def test_general_text_is_fitted_and_judges_nothing():
    processor, own, texts = folders.processor("llava"), samples(), general_samples(4, 0, 120)
    calibration = Calibration(processor, [*texts, *own], hold_out=True)
    assert tokens(calibration.held_out) == alone(own[3::4])
    assert tokens(calibration.general) == alone(texts[3:])
    assert tokens([*calibration.fitted, *calibration.held_out]) == alone([*own, *texts[:3]])


def test_a_validation_loss_weighs_samples_alike():
    """Two samples of one and of three answer tokens, whose losses are known."""
    head = torch.nn.Linear(2, 2, bias=False)
    head.weight.data = torch.eye(2)
    hidden = torch.tensor([[[9.0, 0.0]] * 4, [[0.0, 0.0]] * 4])
    labels = torch.tensor([[-100, 1, -100, -100], [-100, 0, 0, 0]])
    wrong, even = math.log(1 + math.exp(9)), math.log(2)
    assert mean_answer_loss([(hidden, labels)], head) == pytest.approx((wrong + even) / 2)
    found = mean_answer_loss([(hidden, labels)], head, [torch.tensor([3, 6])])  # other tokens
    assert found == pytest.approx((wrong / 3 + 3 * even / 6) / 2)
