"""What the losses of a batch are measured against, gathered where the batch is put together.

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
from slimvlm.data.samples import Sample
from slimvlm.models.hidden import compared_positions
from slimvlm.models.losses import label_counts
from slimvlm.training.offline import OfflineTeacher

SUPERVISION = "supervision"
"""Its key in a batch, beside the model's inputs."""
LEAST_SHARED = 2**30
"""Bytes of free shared memory that batches from other processes need."""


@dataclass(frozen=True)
class Supervision:
    """What the losses of a batch are measured against.

    Attributes:
        ids: Names of the samples.
        labels: Tokens to predict.
        compared: Positions at which the student is compared with its teacher.
        offline: An offline teacher's final hidden states at these positions, in their order; None
            if there is no such teacher.
    """

    ids: tuple[str, ...]
    labels: Int[Tensor, "B T"]
    compared: Bool[Tensor, "B T"]
    offline: Float[Tensor, "N D"] | None = None

    @property
    def counts(self) -> Float[Tensor, 2]:
        """How many positions count for sft, and for the other losses."""
        return torch.stack([label_counts(self.labels).sum(), self.compared.sum()]).float()

    def to(self, device: torch.device, non_blocking: bool = False) -> Supervision:
        """The same on a device; Accelerate calls this as it does for tensors."""
        return Supervision(
            self.ids,
            self.labels.to(device, non_blocking=non_blocking),
            self.compared.to(device, non_blocking=non_blocking),
            None if self.offline is None else self.offline.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> Supervision:
        """The same in pinned memory; DataLoader calls this as it does for tensors."""
        offline = None if self.offline is None else self.offline.pin_memory()
        return Supervision(self.ids, self.labels.pin_memory(), self.compared.pin_memory(), offline)


@dataclass(frozen=True)
class Collator:
    """Samples → a batch: the model's inputs and their `Supervision`.

    Attributes:
        processor: The model's processor or tokenizer.
        model_config: The model's configuration.
        kd_on: Positions that distillation compares.
        offline: The cache of an offline teacher, if there is one.
        tokens: The teacher's number of each of the student's tokens, if that has fewer.
    """

    processor: Any
    model_config: Any
    kd_on: str
    offline: OfflineTeacher | None = None
    tokens: Int[Tensor, " V"] | None = None

    def __call__(self, samples: list[Sample]) -> dict[str, Any]:
        """The batch."""
        inputs = encode_samples(self.processor, samples)
        labels = inputs.pop("labels")
        compared = compared_positions(self.model_config, inputs, labels, self.kd_on)
        said = None
        if self.offline is not None:
            said = self.offline.targets(samples, as_teacher_reads(inputs, self.tokens), compared)
        ids = tuple(sample.id for sample in samples)
        return {**inputs, SUPERVISION: Supervision(ids, labels, compared, said)}


def num_workers(device: torch.device) -> int:
    """How many processes put batches together while a device trains; 0: the training one does.

    At most four, and none for a CPU, which they would slow down. They are forked: where Python
    starts processes anew, they would read everything again. Batches come through shared memory,
    of which a container may have too little.
    """
    shared = Path("/dev/shm")
    if device.type == "cpu" or multiprocessing.get_start_method() != "fork" or not shared.is_dir():
        return 0
    if shutil.disk_usage(shared).free < LEAST_SHARED * num_ranks():
        return 0
    return max(min(4, len(os.sched_getaffinity(0)) // num_ranks() - 1), 0)


def as_teacher_reads(
    inputs: dict[str, Tensor], tokens: Int[Tensor, " V"] | None
) -> dict[str, Tensor]:
    """A batch as the teacher reads it: its own numbers for the student's tokens."""
    if tokens is None:
        return inputs
    ids = inputs["input_ids"]
    return {**inputs, "input_ids": tokens.to(ids.device)[ids]}
