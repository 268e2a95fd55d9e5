"""What a conversion is made of: which native tensor comes from where, and what is left out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from slimvlm.core.errors import UnsupportedModelError
from slimvlm.models.classes import empty_model
from slimvlm_tools.convert.source import Weights

NATIVE = {
    "llava": "LlavaForConditionalGeneration",
    "internvl": "InternVLForConditionalGeneration",
}
"""The classes that originals become, by model type."""


@dataclass(frozen=True)
class Piece:
    """One native tensor: a source tensor, one of its equal blocks of rows, or it with new rows."""

    weights: Weights
    name: str
    block: int = 0
    blocks: int = 1
    new_rows: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the native tensor."""
        shape = self.weights.shapes[self.name]
        if not shape:
            return shape
        return (shape[0] // self.blocks + self.new_rows, *shape[1:])

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
class Rule:
    """Source names that match a pattern, and what becomes of them.

    Attributes:
        pattern: Regular expression of the whole source name.
        targets: Native names, with groups of the pattern; several share equal blocks of rows.
        reason: Why a tensor without targets is not needed.
    """

    pattern: str
    targets: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class Layout:
    """A whole conversion, before any weight is read.

    Attributes:
        config: The native configuration.
        pieces: Native name to where its tensor comes from.
        unused: Source names that are left out on purpose, each with the reason.
        generation: The values of ``generation_config.json``.
        make_processor: Builds the native processor.
    """

    config: PreTrainedConfig
    pieces: Mapping[str, Piece]
    generation: Mapping[str, Any]
    make_processor: Callable[[], Any]
    unused: Mapping[str, str] = field(default_factory=dict)


def keep(prefix: str, target: str) -> Rule:
    """A rule that only changes the beginning of names."""
    return Rule(re.escape(prefix) + r"(.*)", (target + r"\1",))


def apply_rules(
    weights: Weights, rules: Sequence[Rule], names: Iterable[str] | None = None
) -> tuple[dict[str, Piece], dict[str, str]]:
    """Find the place of every source tensor: the first rule that matches its name decides.

    Args:
        weights: The source.
        rules: The rules in order.
        names: The tensors to place; by default all.

    Returns:
        Native name to piece, and unused name to reason.

    Raises:
        UnsupportedModelError: If a tensor matches no rule.
    """
    pieces: dict[str, Piece] = {}
    unused: dict[str, str] = {}
    for name in weights.shapes if names is None else names:
        for rule in rules:
            match = re.fullmatch(rule.pattern, name)
            if match is None:
                continue
            for block, target in enumerate(rule.targets):
                pieces[match.expand(target)] = Piece(weights, name, block, len(rule.targets))
            if not rule.targets:
                unused[name] = rule.reason
            break
        else:
            raise UnsupportedModelError(
                f"weights: {name!r} has no place in the native class, and no reason to be left out"
            )
    return pieces, unused


def check_complete(layout: Layout) -> None:
    """Check that the pieces are the native model's tensors: all, no more, in the right shapes.

    Raises:
        UnsupportedModelError: If not, with the first tensor that is wrong.
    """
    model = empty_model(layout.config)
    tied = set(getattr(model, "_tied_weights_keys", None) or {})
    tied = tied if layout.config.tie_word_embeddings else set()
    wanted = {k: tuple(v.shape) for k, v in model.state_dict().items() if k not in tied}
    if lost := [name for name in wanted if name not in layout.pieces]:
        raise UnsupportedModelError(
            f"weights: nothing in the checkpoint becomes {lost[0]!r} ({len(lost)} such tensors)"
        )
    for name, piece in layout.pieces.items():
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


def require(values: Mapping[str, Any], name: str, allowed: Sequence[Any], default: Any) -> Any:
    """A field of a source configuration that must have one of the values that can be mapped.

    Raises:
        UnsupportedModelError: If it has another one.
    """
    value = values.get(name, default)
    if value not in allowed:
        raise UnsupportedModelError(
            f"config.json: {name} {value!r} has no native counterpart. Can be converted: "
            + ", ".join(map(repr, allowed))
        )
    return value


def pick(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Those of the named fields that a source configuration sets."""
    return {name: values[name] for name in names if values.get(name) is not None}
