"""What a conversion is made of: which native tensor comes from where, and what is left out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from slimvlm.core.errors import UnsupportedModelError
from slimvlm_tools.convert.source import OriginalWeights

EMBEDDINGS, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"

Rules = Mapping[str, tuple[str, ...]]
"""Regular expressions of whole source names, and the native names (with groups of the expression)
that a tensor goes to. Several share equal blocks of its rows; without any it is left out. The first
expression that matches decides."""


@dataclass(frozen=True)
class Piece:
    """One native tensor: a source tensor, one of its equal blocks of rows, or it with new rows."""

    weights: OriginalWeights
    name: str
    block: int = 0
    blocks: int = 1
    new_rows: int = 0

    @property
    def shape(self) -> torch.Size:
        """Shape of the native tensor."""
        shape = self.weights.tensors[self.name].shape
        if not shape:
            return shape
        return torch.Size([-(-shape[0] // self.blocks) + self.new_rows, *shape[1:]])

    def read(self) -> Tensor:
        """The native tensor. New rows are the mean row, so that their logit is the mean logit."""
        tensor = self.weights.read(self.name, self.block, self.blocks)
        if not self.new_rows:
            return tensor
        total = torch.zeros(tensor.shape[1:], dtype=torch.float64)
        for rows in tensor.split(4096):
            total += rows.double().sum(0)
        mean = (total / len(tensor)).to(tensor.dtype)
        return torch.cat([tensor, mean.expand(self.new_rows, *mean.shape)])


@dataclass(frozen=True)
class Conversion:
    """A whole conversion, before any weight is read.

    Attributes:
        config: The native configuration.
        pieces: Native name to where its tensor comes from.
        generation: Values of ``generation_config.json`` that win over the source's.
        processor: The native processor.
    """

    config: PreTrainedConfig
    pieces: Mapping[str, Piece]
    generation: Mapping[str, Any]
    processor: Any


def place(weights: OriginalWeights, names: Iterable[str], rules: Rules) -> dict[str, Piece]:
    """Find the native place of source tensors."""
    pieces: dict[str, Piece] = {}
    for name in names:
        for pattern, targets in rules.items():
            match = re.fullmatch(pattern, name)
            if match is None:
                continue
            for block, target in enumerate(targets):
                pieces[match.expand(target)] = Piece(weights, name, block, len(targets))
            break
        else:
            raise UnsupportedModelError(
                f"weights: {name!r} has no place in the native class, and no reason to be left out"
            )
    return pieces


def check_complete(model: PreTrainedModel, pieces: Mapping[str, Piece]) -> None:
    """Check that pieces are the native model's tensors: all, no more, in the right shapes.

    A tied tensor may have one too, which is not read.
    """
    tied = model.all_tied_weights_keys
    wanted = {name: t.shape for name, t in model.state_dict().items() if name not in tied}
    if lost := [name for name in wanted if name not in pieces]:
        raise UnsupportedModelError(
            f"weights: nothing in the checkpoint becomes {lost[0]!r} ({len(lost)} such tensors)"
        )
    for name, piece in pieces.items():
        if name in tied:
            continue
        if name not in wanted:
            raise UnsupportedModelError(
                f"weights: {piece.name!r} has no counterpart in the native class with this "
                "config.json"
            )
        if piece.shape != wanted[name]:
            raise UnsupportedModelError(
                f"weights: {piece.name!r} has shape {list(piece.shape)}, config.json says "
                f"{list(wanted[name])}"
            )
