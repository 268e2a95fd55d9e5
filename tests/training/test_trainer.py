"""Targets of losses travel with their batch."""

import torch
from accelerate.utils import send_to_device

from slimvlm.models.load import load
from slimvlm.training.trainer import SUPERVISION, Collator
from tests import tiny_folder as folders
from tests.tiny_folder import short_samples


def test_it_goes_where_accelerate_sends_the_batch():
    _, processor = load(folders.folder("llava"))
    samples = short_samples(2)
    batch = Collator(processor, "answer")(samples)
    assert batch[SUPERVISION].ids == tuple(sample.id for sample in samples)
    assert "labels" not in batch
    sent = send_to_device(batch, torch.device("meta"), non_blocking=True)[SUPERVISION]
    assert sent.ids == batch[SUPERVISION].ids
    for tensor in (sent.labels, sent.compared, sent.counts):
        assert tensor.is_meta
    assert batch[SUPERVISION].counts.tolist() == [
        int((batch[SUPERVISION].labels[:, 1:] != -100).sum()),
        int(batch[SUPERVISION].compared.sum()),
    ]
