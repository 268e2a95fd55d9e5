"""Calibration samples become batches: each sample once, those alike together."""

import torch

from slimvlm.data.chat import encode_samples
from slimvlm.runs.stages import HELD_OUT_EVERY, Calibration
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
    assert tokens(calibration.held_out) == alone(samples()[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY])
    assert tokens([*calibration.fitted, *calibration.held_out]) == alone(samples())
