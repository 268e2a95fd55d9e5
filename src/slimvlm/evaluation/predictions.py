"""Compute losses of answer tokens, and store final hidden states there to compare two models.

B batch, T token, N counted position, D hidden, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from slimvlm.core.documents import parse_json
from slimvlm.core.errors import ConfigError, DataError
from slimvlm.core.files import new_file
from slimvlm.core.progress import progress
from slimvlm.data.chat import encode_samples, process, tokenizer_of
from slimvlm.data.read import estimated_length
from slimvlm.data.roles import IGNORE
from slimvlm.data.samples import Sample
from slimvlm.models import losses
from slimvlm.models.hidden import (
    HeadWeights,
    as_inputs,
    evaluating,
    head_of,
    head_on,
    hidden_states,
    require_finite_values,
)
from slimvlm.models.losses import Head, Hidden
from slimvlm.scoring.batches import on_device

Given = Sample | str
"""A conversation, or plain text."""
States = tuple[Sequence[int], Hidden, Int[Tensor, "B T"]]
"""A batch: places of its samples, final hidden states, labels."""


@torch.no_grad()
def answer_losses(
    model: PreTrainedModel, encoded: Mapping[str, Any], where: str
) -> tuple[Float[Tensor, "B S 2"], Bool[Tensor, "B S"]]:
    """Compute each labelled token's cross-entropy, and 1 where another token is likelier.

    Returns both numbers, 0 without a label, and the mask of labels; errors name ``where``.
    """
    inputs = as_inputs(model, encoded)
    labels = inputs.pop("labels")
    (hidden,) = hidden_states(model, inputs)
    rows, wanted, counted = losses.predictions(hidden, labels)
    found = torch.zeros(*counted.shape, 2, device=hidden.device)
    found[counted] = losses.by_chunks(partial(row_losses, head_of(model)), rows, wanted)
    require_finite_values(found, where)
    return found, counted


def row_losses(
    head: Head, rows: Float[Tensor, "N D"], wanted: Int[Tensor, " N"]
) -> Float[Tensor, "N 2"]:
    """Compute the cross-entropy of each wanted token, and 1 if another one is likelier."""
    logits = head(rows).float()
    loss = F.cross_entropy(logits, wanted, reduction="none")
    return torch.stack([loss, (logits.argmax(-1) != wanted).float()], dim=-1)


@dataclass(frozen=True)
class Predictions:
    """Final hidden states at answer tokens, stored to compare two models without loading both."""

    model: str
    states: tuple[Float[Tensor, "_ D"], ...]  # by sample, on the CPU
    wanted: tuple[Int[Tensor, " _"], ...]  # the tokens that follow, likewise
    head: Head  # a function that takes states of any device, or weights on the CPU
    vocabulary: Mapping[str, int] = field(repr=False)

    @classmethod
    def of(cls, model: str, batches: Iterable[States], head: Head, processor: Any) -> Predictions:
        """Collect batches on the CPU, in the order of the samples."""
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for places, hidden, labels in batches:
            rows, wanted, counted = losses.predictions(hidden, labels)
            counts = counted.sum(1).tolist()
            pieces = zip(rows.cpu().split(counts), wanted.cpu().split(counts), strict=True)
            found |= dict(zip(places, pieces, strict=True))
        states, tokens = zip(*(found[place] for place in sorted(found)), strict=True)
        head = head_on(torch.device("cpu"), head)
        return cls(model, states, tokens, head, tokenizer_of(processor).get_vocab())

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; the head must be `HeadWeights`."""
        head = self.head
        assert isinstance(head, HeadWeights)
        tensors = {"states": torch.cat(self.states), "wanted": torch.cat(self.wanted)}
        tensors["weight"] = head.weight.contiguous()
        if head.bias is not None:
            tensors["bias"] = head.bias.contiguous()
        about = {
            "model": self.model,
            "counts": [len(wanted) for wanted in self.wanted],
            "bends": [head.scale, head.cap],
            "words": dict(self.vocabulary),
        }
        with new_file(Path(path)) as partial_file:
            save_file(tensors, partial_file, {"about": json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path) -> Predictions:
        """Read what `save` wrote."""
        with safe_open(path, framework="pt") as file:
            about = parse_json(file.metadata()["about"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        states, wanted = (tensors[name].split(about["counts"]) for name in ("states", "wanted"))
        head = HeadWeights(tensors["weight"], tensors.get("bias"), *about["bends"])
        return cls(about["model"], states, wanted, head, about["words"])


@torch.no_grad()
def predictions_of(
    model: PreTrainedModel,
    processor: Any,
    samples: Sequence[Given],
    batch_size: int = 8,
    name: str = "",
    head: Head | None = None,
) -> Predictions:
    """Run a model over samples and keep its predictions: two bytes a channel and token in bfloat16.

    ``head`` is for predictions that must outlive the model (`head_weights_of`).
    """
    if head is None:
        own, home = head_of(model), model.device
        head = lambda rows: own(rows.to(home)).to(rows.device)  # noqa: E731
    name = name or str(model.config._name_or_path)
    with evaluating(model):
        batches = states_of(model, processor, samples, batch_size)
        return Predictions.of(name, batches, head, processor)


def states_of(
    model: PreTrainedModel, processor: Any, samples: Sequence[Given], batch_size: int
) -> Iterator[States]:
    """Compute the final hidden states of samples, those of similar length together."""
    for places, inputs in batches_of(processor, samples, batch_size):
        batch = on_device(model, inputs)
        labels = batch.pop("labels")
        (hidden,) = hidden_states(model, batch)
        yield places, hidden, labels


def batches_of(
    processor: Any, samples: Sequence[Given], batch_size: int
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Encode samples with labels; those with as many pictures and a similar length run together."""
    if batch_size < 1:
        raise ConfigError(f"batch_size {batch_size} must be at least 1")
    if not samples:
        raise DataError("no sample was given")
    texts = [sample for sample in samples if isinstance(sample, str)]
    conversations = [sample for sample in samples if isinstance(sample, Sample)]
    if texts and conversations:
        raise ConfigError("samples must be conversations or plain texts, not both")
    lengths = [(0, len(text)) for text in texts]
    lengths += [(len(each.images), estimated_length(each, 0)) for each in conversations]
    order = sorted(range(len(samples)), key=lambda place: lengths[place])
    for start in progress(range(0, len(order), batch_size), "evaluate samples"):
        places = order[start : start + batch_size]
        if conversations:
            yield places, encode_samples(processor, [conversations[place] for place in places])
            continue
        inputs = process(processor, [texts[i] for i in places], [[] for _ in places], "right")
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORE)
        yield places, {**inputs, "labels": labels}
