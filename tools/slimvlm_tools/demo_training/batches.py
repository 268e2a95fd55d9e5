"""Turns training conversations into token batches, each question a branch of its own.

All questions of one picture share one sequence: the picture stands once at the start, and each
question with its answer only sees the picture and itself (a block mask), at the positions that it
would have if it were asked alone. That is exactly what evaluation asks, at a fraction of the cost.
A share of the conversations is kept as ordinary multi-turn chat instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from slimvlm.demo.build import IMAGE_TOKEN_ID, NUM_IMAGE_TOKENS
from slimvlm.demo.questions import Conversation, make_conversation
from slimvlm.demo.scenes import render

CHAT_SHARE = 0.2
BUCKET = 16
LONG_REPLY = 30
LONG_WEIGHT = 0.06
MAX_PASS_TOKENS = 1536
"""Longest forward pass, padding included: what keeps the memory of a step bounded."""


@dataclass(frozen=True)
class Encoded:
    """One conversation as tokens.

    Attributes:
        ids: Token ids.
        positions: Position of each token in its own branch.
        branches: 0 for the shared prefix, then one number per question.
        targets: Next token to predict at each place, or -100.
        weights: How much each target counts; long replies count less per token.
        pixels: The picture (64, 64, 3) or None.
    """

    ids: list[int]
    positions: list[int]
    branches: list[int]
    targets: list[int]
    weights: list[float]
    pixels: np.ndarray[Any, np.dtype[np.uint8]] | None


@dataclass(frozen=True)
class Batch:
    """Right-padded conversations; shapes (batch, token), mask (batch, 1, token, token)."""

    ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    pixels: torch.Tensor | None


class Encoder:
    """Writes conversations as tokens in the demo's chat form.

    ``picture`` are the tokens that stand for a picture.
    """

    def __init__(
        self, tokenizer: Any, picture: Sequence[int] = (IMAGE_TOKEN_ID,) * NUM_IMAGE_TOKENS
    ) -> None:
        self._tokenizer = tokenizer
        self._picture = list(picture)
        self._user = self._ids("<|im_start|>user\n")
        self._assistant = self._ids("<|im_end|>\n<|im_start|>assistant\n")
        self._end = self._ids("<|im_end|>\n")

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def encode(self, conversation: Conversation, chat: bool) -> Encoded:
        """Encodes one conversation, as independent branches or as one chat."""
        scene = conversation.scene
        ids = list(self._user)
        pixels = None
        if scene is not None:
            ids += self._picture
            pixels = np.asarray(render(scene))
        prefix = len(ids)
        positions, branches = list(range(prefix)), [0] * prefix
        targets, weights = [-100] * prefix, [0.0] * prefix
        for number, (prompt, answer) in enumerate(conversation.turns):
            asked = self._ids(prompt) + self._assistant
            replied = self._ids(answer) + self._end[:1]
            if chat and number:
                asked = self._end[1:] + self._user + asked
            start = len(ids) if chat else prefix
            piece = asked + replied
            ids += piece
            positions += range(start, start + len(piece))
            branches += [0 if chat else number + 1] * len(piece)
            targets += [-100] * (len(asked) - 1) + replied + [-100]
            weights += [len(replied) ** -0.5 if len(replied) < LONG_REPLY else LONG_WEIGHT] * len(
                piece
            )
        return Encoded(ids, positions, branches, targets, weights, pixels)


def collate(items: list[Encoded]) -> Batch:
    """Pads conversations to one length and builds their block masks."""
    length = max(len(item.ids) for item in items)
    ids = torch.zeros(len(items), length, dtype=torch.long)
    positions = torch.zeros_like(ids)
    branches = torch.full_like(ids, -1)
    targets = torch.full_like(ids, -100)
    weights = torch.zeros(len(items), length)
    for row, item in enumerate(items):
        n = len(item.ids)
        ids[row, :n] = torch.tensor(item.ids)
        positions[row, :n] = torch.tensor(item.positions)
        branches[row, :n] = torch.tensor(item.branches)
        targets[row, :n] = torch.tensor(item.targets)
        weights[row, :n] = torch.tensor(item.weights)
    same = branches[:, :, None] == branches[:, None, :]
    seen = (same | (branches[:, None, :] == 0)) & torch.ones(length, length).tril().bool()
    mask = torch.zeros(seen.shape, dtype=torch.bfloat16).masked_fill_(~seen, -1e9)[:, None]
    pictures = [item.pixels for item in items if item.pixels is not None]
    pixels = torch.from_numpy(np.stack(pictures)) if pictures else None
    return Batch(ids, positions, mask, targets, weights, pixels)


def collate_parts(items: list[Encoded]) -> list[Batch]:
    """Pads one batch as several forward passes of at most `MAX_PASS_TOKENS` tokens."""
    rows = max(1, MAX_PASS_TOKENS // max(len(item.ids) for item in items))
    return [collate(items[i : i + rows]) for i in range(0, len(items), rows)]


def training_batches(
    encoder: Encoder, seed: int, size: int, skip: int = 0
) -> Iterator[list[Batch]]:
    """Yields endless batches of conversations of similar length, each as its forward passes."""
    window, first = divmod(skip, BUCKET)
    while True:
        rng = np.random.default_rng([seed, 9, window])
        start = window * BUCKET * size
        items = [
            encoder.encode(make_conversation(seed, start + i), bool(rng.random() < CHAT_SHARE))
            for i in range(BUCKET * size)
        ]
        items.sort(key=lambda item: len(item.ids))
        for place in rng.permutation(BUCKET)[first:]:
            yield collate_parts(items[int(place) * size : (int(place) + 1) * size])
        window, first = window + 1, 0
