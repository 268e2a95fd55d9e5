"""Scores of a checkpoint that does not fit in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from slimvlm.core.errors import NumericalError
from slimvlm.core.files import new_folder
from slimvlm.core.progress import Say, progress
from slimvlm.models.anatomy import LAYER_UNITS
from slimvlm.models.load import device_named
from slimvlm.models.parts import decoder_layers, text_config_of
from slimvlm.scoring.batches import Batch
from slimvlm.scoring.criteria import CRITERIA, DEFAULT_CRITERIA, Capture, criterion_named
from slimvlm.scoring.layerwise.checkpoint import LazyCheckpoint, open_checkpoint
from slimvlm.scoring.layerwise.runner import LayerView, LayerwiseModel
from slimvlm.scoring.layerwise.stores import Scratch, scratch_folder
from slimvlm.scoring.score_model import check_token_weights, collect, score, scores_from
from slimvlm.scoring.unit_scores import Scores


@dataclass(frozen=True)
class CriterionRequest:
    """A criterion and its options.

    Raises:
        ConfigError: If one of them is unknown.
    """

    criterion: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        criterion_named(self.criterion, self.options)

    @property
    def capture(self) -> Capture:
        """How the statistics that it needs are collected."""
        return CRITERIA[self.criterion].capture

    @property
    def needs_data(self) -> bool:
        """Whether batches go through the layers for it."""
        return CRITERIA[self.criterion].needs_data


def score_checkpoint(
    model: str | Path,
    batches: Iterable[Batch] = (),
    criterion: str = DEFAULT_CRITERIA["width"][0],
    token_weights: Mapping[str, float] | None = None,
    dtype: str = "auto",
    scratch: str | Path | None = None,
    say: Say = lambda line: None,
    trust_remote_code: bool = False,
    device: str | torch.device | None = None,
    **options: Any,
) -> Scores:
    """`slimvlm.score` of a checkpoint whose weights do not fit in memory.

    One decoder layer is in memory at a time, mapped from the safetensors files. All batches go
    through it before the next one comes; what they leave behind lies in a scratch folder. For
    criteria with gradients, layers then come in reverse order, and each runs forward again from
    its stored input. Vision tower, projector and embeddings run first, alone; the head runs over
    chunks of positions that count. For ``kl_greedy``, layers come in order once for each that goes.

    A run that was killed goes on after the last whole layer (of ``kl_greedy``: the last whole
    round) when it is started again with the same ``scratch``. The folder is removed when all is
    done.

    Args:
        model: Folder, hub id or ``demo``; weights as safetensors.
        batches: Model inputs, as for `slimvlm.score`. Read once, in order.
        criterion: As for `slimvlm.score`.
        token_weights: As for `slimvlm.score`.
        dtype: Data type of the weights; statistics are float32 or better.
        scratch: Folder for activations; by default a temporary one, which cannot be resumed.
        say: Receives the size of the scratch folder before layers begin.
        trust_remote_code: Run code that lies in the checkpoint.
        device: Where layers run; by default the accelerator if there is one, else the CPU.
        **options: The criterion's options.

    Returns:
        The scores that `slimvlm.score` gives.

    Raises:
        ConfigError: If something cannot be read, or the scratch folder's disk is too small.
        DataError: If data is needed and none is given.
        NumericalError: If NaN or infinity appears; the message says where.
        UnsupportedModelError: If layers read keys and values of earlier ones.
    """
    device = device_named(device)
    request = CriterionRequest(criterion, options)
    if token_weights is not None:
        check_token_weights(criterion, token_weights)
    checkpoint = open_checkpoint(model, dtype, trust_remote_code)
    return score_requests(checkpoint, batches, [request], token_weights, scratch, say, device)[0]


def score_requests(
    checkpoint: LazyCheckpoint,
    batches: Iterable[Batch],
    requests: Sequence[CriterionRequest],
    token_weights: Mapping[str, float] | None = None,
    scratch: str | Path | None = None,
    say: Say = lambda line: None,
    device: str | torch.device | None = None,
) -> list[Scores]:
    """Scores by several criteria, whose passes share what they can. As `score_checkpoint`."""
    place = device_named(device)
    with scratch_folder(scratch) as folder:
        store = Scratch(folder)
        layerwise = LayerwiseModel(checkpoint, store, place)
        run = _Run(checkpoint, layerwise, store, requests, token_weights)
        run.begin(batches, say)
        run.forward()
        run.backward()
        return [run.result(place) for place in range(len(requests))]


@dataclass(frozen=True)
class _Run:
    """What several requests need of the passes over a checkpoint."""

    checkpoint: LazyCheckpoint
    layerwise: LayerwiseModel
    scratch: Scratch
    requests: Sequence[CriterionRequest]
    token_weights: Mapping[str, float] | None

    def begin(self, batches: Iterable[Batch], say: Say) -> None:
        """Embed the batches; keep earlier work only if everything is as it was then."""
        self.scratch.keep_if_same("model.json", self.checkpoint.identity)
        needs_data = any(request.needs_data for request in self.requests)
        digest = self.layerwise.embed(batches) if needs_data else None
        request = {
            "batches": digest,
            "criteria": [[r.criterion, dict(r.options)] for r in self.requests],
            "token_weights": self.token_weights and dict(self.token_weights),
        }
        self.scratch.keep_if_same("run.json", request, spared="batches")
        if needs_data:
            self.scratch.announce(self._size(), say)

    def forward(self) -> None:
        """All layers in order, with the captures that need no gradient."""
        chosen, scratch = self._by_layer(backward=False), self.scratch
        if not chosen and not self._needs_hidden:
            return
        furthest = max((i for i in range(self._depth + 1) if scratch.has(f"hidden-{i}")), default=0)
        for index in progress(range(self._depth), "layers forward"):
            if index < furthest:
                continue
            with self.layerwise.layer(index) as view:
                for place, request in chosen:
                    self._score_layer(place, request, index, view)
                if self._needs_hidden:
                    self._finish_hidden(index, view)
            if not self._keeps_hidden:
                scratch.drop(f"hidden-{index}")

    def backward(self) -> None:
        """All layers from the last to the first, with the captures that need gradients."""
        chosen, scratch = self._by_layer(backward=True), self.scratch
        if not chosen:
            return
        self.layerwise.start_gradients(self.token_weights)
        for index in progress(range(self._depth)[::-1], "layers backward"):
            if any(scratch.has(f"gradient-{i}") for i in range(index + 1)):
                continue
            with self.layerwise.layer(index) as view:
                for place, request in chosen:
                    self._score_layer(place, request, index, view)
            scratch.finish(f"gradient-{index}")
            scratch.drop(f"gradient-{index + 1}")

    def result(self, place: int) -> Scores:
        """The scores of a request, once the passes are done."""
        request, model = self.requests[place], self.layerwise.model
        if request.capture.sees == "nothing":
            return score(model, (), request.criterion, **request.options)
        given = (request.criterion, self.token_weights)
        if request.capture.sees == "rounds":
            taken = CRITERIA[request.criterion].captured(request.options)
            statistics = request.capture.function(self.layerwise, (), self.token_weights, **taken)
            return scores_from(statistics, model, *given, **request.options)
        if request.capture.sees == "hidden_states":
            with self.layerwise.replayed() as view:
                statistics = collect(view, self.layerwise.batches(), *given, **request.options)
            return scores_from(statistics, model, *given, **request.options)
        folder = self.scratch.folder
        parts = (folder / _scores_of(place, index) / "scores" for index in range(self._depth))
        return _joined([Scores.load(part) for part in parts])

    def _score_layer(
        self, place: int, request: CriterionRequest, index: int, view: LayerView
    ) -> None:
        """Score one layer as if the model had no other, unless that was done before."""
        name, scratch = _scores_of(place, index), self.scratch
        if scratch.has(name):
            return
        data: Any = ()
        weights = None
        if request.needs_data:
            data, weights = self.layerwise.batches(), self.token_weights
        try:
            found = score(view, data, request.criterion, weights, **request.options)
        except NumericalError as error:
            raise NumericalError(f"decoder layer {index}, called 0 here: {error}") from error
        with new_folder(scratch.folder / name) as folder:
            found.save(folder / "scores")

    @torch.no_grad()
    def _finish_hidden(self, index: int, view: LayerView) -> None:
        """Store what leaves a layer, unless a capture's pass has done so."""
        scratch = self.scratch
        for batch in self.layerwise.batches():
            if scratch.about(f"hidden-{index + 1}", batch["place"]) is None:
                view(**batch)
        scratch.finish(f"hidden-{index + 1}")

    def _by_layer(self, backward: bool) -> list[tuple[int, CriterionRequest]]:
        """The requests, with their places, that are scored layer by layer in one direction."""
        return [
            (place, request)
            for place, request in enumerate(self.requests)
            if request.capture.sees == "layer" and request.capture.backward == backward
        ]

    def _size(self) -> int:
        """Bytes of the hidden states and gradients that lie on disk at one time at most."""
        tokens = sum(batch["attention_mask"].numel() for batch in self.layerwise.batches())
        width = text_config_of(self.layerwise.model.config).hidden_size
        copies = self._depth if self._keeps_hidden else 2 * self._needs_hidden
        copies += 2 * bool(self._by_layer(backward=True))
        copies += (self._depth + 1) * any(r.capture.sees == "rounds" for r in self.requests)
        return int(copies * tokens * width * self.layerwise.model.dtype.itemsize)

    @property
    def _depth(self) -> int:
        return len(decoder_layers(self.layerwise.model))

    @property
    def _needs_hidden(self) -> bool:
        return any(r.needs_data and r.capture.sees != "rounds" for r in self.requests)

    @property
    def _keeps_hidden(self) -> bool:
        captures = [request.capture for request in self.requests]
        return any(each.backward or each.sees == "hidden_states" for each in captures)


def _scores_of(place: int, index: int) -> str:
    return f"scores-{place}-{index}"


def _joined(parts: Sequence[Scores]) -> Scores:
    """Scores of all layers from those of each."""
    joined: dict[str, Any] = {}
    for unit in LAYER_UNITS:
        if parts[0].of(unit) is not None:
            joined[unit] = [values for part in parts for values in part.of(unit)]
    if parts[0].layer is not None:
        joined["layer"] = torch.cat([part.layer for part in parts if part.layer is not None])
    return Scores(parts[0].criterion, options=parts[0].options, **joined)
