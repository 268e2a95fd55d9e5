"""Calibration samples become batches: each sample once, those alike together."""

from __future__ import annotations

from typing import Any

import torch

from slimvlm.data.chat import encode_samples
from slimvlm.data.samples import Sample
from slimvlm.runs.stages import HELD_OUT_EVERY, Calibration
from tests import tiny_folder as folders


def samples() -> list[Sample]:
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


def tokens(batches: list[dict[str, Any]]) -> list[list[int]]:
    """The unpadded tokens of all samples."""
    return sorted(
        ids[mask.bool()].tolist()
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    )


def test_samples_that_are_alike_share_a_batch() -> None:
    processor, given = folders.processor("llava"), samples()
    batches = Calibration(processor, given, hold_out=False).fitted
    assert tokens(batches) == tokens([encode_samples(processor, [each]) for each in given])
    for batch in batches:
        assert batch["attention_mask"].all()  # nothing is padded
        assert len(batch.get("pixel_values", torch.empty(0))) in (0, len(batch["input_ids"]))


def test_held_out_samples_are_every_fourth_of_the_data() -> None:
    processor, given = folders.processor("llava"), samples()
    calibration = Calibration(processor, given, hold_out=True)
    apart = [
        encode_samples(processor, [each]) for each in given[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    ]
    assert tokens(calibration.held_out) == tokens(apart)
    both = [*calibration.fitted, *calibration.held_out]
    assert tokens(both) == tokens([encode_samples(processor, [each]) for each in given])
