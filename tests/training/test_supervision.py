"""What losses are measured against travels with its batch."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate.utils import send_to_device

from slimvlm.models.load import load
from slimvlm.training.offline import OfflineTeacher, write_cache
from slimvlm.training.supervision import SUPERVISION, Collator
from tests import tiny_folder as folders
from tests.tiny_folder import short_samples


def test_it_goes_where_accelerate_sends_the_batch(tmp_path: Path) -> None:
    model, processor = load(folders.folder("llava"))
    samples = short_samples(2)
    write_cache(model, processor, samples, tmp_path / "cache")
    collate = Collator(processor, model.config, "answer", OfflineTeacher(tmp_path / "cache"))
    batch = collate(samples)
    assert batch[SUPERVISION].ids == tuple(sample.id for sample in samples)
    assert "labels" not in batch
    sent = send_to_device(batch, torch.device("meta"), non_blocking=True)[SUPERVISION]
    assert sent.ids == batch[SUPERVISION].ids
    for tensor in (sent.labels, sent.compared, sent.offline, sent.counts):
        assert tensor.is_meta
    assert batch[SUPERVISION].counts.tolist() == [
        int((batch[SUPERVISION].labels[:, 1:] != -100).sum()),
        int(batch[SUPERVISION].compared.sum()),
    ]
