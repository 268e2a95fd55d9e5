"""Make training batches: model inputs, and the targets of the losses.

B sample, T token.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from slimvlm.core.processes import num_ranks
from slimvlm.data.chat import encode_samples
from slimvlm.data.roles import predicts_label, role_masks
from slimvlm.data.samples import Sample
from slimvlm.models.losses import label_counts

SUPERVISION = "supervision"
"""Key of the supervision in a batch."""
LEAST_SHARED = 2**30
"""Bytes of free shared memory that batches from other processes need."""


@dataclass(frozen=True)
class Supervision:
    """Targets of a batch's losses."""

    ids: tuple[str, ...]  # of the samples
    labels: Int[Tensor, "B T"]
    compared: Bool[Tensor, "B T"]  # positions where the student is compared with its teacher

    @property
    def counts(self) -> Float[Tensor, 2]:
        """Number of positions that count for sft, and for the other losses."""
        return torch.stack([label_counts(self.labels).sum(), self.compared.sum()]).float()

    def to(self, device: torch.device, non_blocking: bool = False) -> Supervision:
        """Move to a device; Accelerate calls this as it does for tensors."""
        moved = (
            each.to(device, non_blocking=non_blocking) for each in (self.labels, self.compared)
        )
        return Supervision(self.ids, *moved)

    def pin_memory(self) -> Supervision:
        """Copy to pinned memory; DataLoader calls this as it does for tensors."""
        return Supervision(self.ids, self.labels.pin_memory(), self.compared.pin_memory())


@dataclass(frozen=True)
class Collator:
    """Encode samples as model inputs and their `Supervision`; distillation reads ``positions``."""

    processor: Any
    model_config: Any
    positions: str

    def __call__(self, samples: list[Sample]) -> dict[str, Any]:
        """Encode and pad some samples."""
        inputs = encode_samples(self.processor, samples)
        labels = inputs.pop("labels")
        if self.positions == "answer":
            compared = predicts_label(labels)
        else:
            roles = role_masks(self.model_config, {**inputs, "labels": labels})
            compared = roles["prompt"] | roles["answer"]
            if self.positions == "all":
                compared = compared | roles["image"]
        ids = tuple(sample.id for sample in samples)
        return {**inputs, SUPERVISION: Supervision(ids, labels, compared)}


def num_workers(device: torch.device) -> int:
    """Count the processes that collate batches while a device trains; 0 for none.

    At most four, and none for a CPU, which they would slow down. They must be forked, since spawned
    ones would read everything again, and need shared memory, which a container may lack.
    """
    shared = Path("/dev/shm")
    if device.type == "cpu" or multiprocessing.get_start_method() != "fork" or not shared.is_dir():
        return 0
    if shutil.disk_usage(shared).free < LEAST_SHARED * num_ranks():
        return 0
    return max(min(4, len(os.sched_getaffinity(0)) // num_ranks() - 1), 0)
