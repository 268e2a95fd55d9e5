"""Gradients that are summed over batches, where not every batch runs every layer."""

import pytest

from slimvlm.scoring.score_model import score
from tests import tiny
from tests.tolerances import SCORE_SHARE_OF_MAXIMUM, assert_scores_close


@pytest.mark.parametrize("criterion", ["taylor", "taylor_mix"])
def test_a_last_batch_without_a_picture_drops_no_layer(criterion):
    """Mllama's layers that read pictures run only in batches with some."""
    model = tiny.build("mllama")
    seeing, blind = tiny.batch(model, 12, 0), tiny.batch(model, 12, 1)
    blind = {name: blind[name] for name in ("input_ids", "attention_mask", "labels")}
    blind["input_ids"] = blind["input_ids"].clamp(max=90)
    expected, found = (score(model, data, criterion) for data in ([blind, seeing], [seeing, blind]))
    for ours, theirs in zip(found.neuron, expected.neuron, strict=True):
        assert len(ours) == len(theirs) > 0
        assert_scores_close(ours, theirs, SCORE_SHARE_OF_MAXIMUM)
