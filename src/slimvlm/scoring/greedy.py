"""Remove layers one after another, each time the one whose absence changes predictions least.

D hidden, K candidates, N counted predictions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from slimvlm.core.errors import UnsupportedModelError
from slimvlm.core.progress import progress
from slimvlm.models.anatomy import Anatomy, read_anatomy
from slimvlm.models.hidden import head_of
from slimvlm.models.losses import row_divergences
from slimvlm.models.parts import decoder_layers, final_norm
from slimvlm.scoring.batches import Batch, Targets, TokenWeights, batches_with_targets
from slimvlm.scoring.layerwise.runner import LayerwiseModel, Live
from slimvlm.scoring.statistics import Removals, require_finite
from slimvlm.scoring.unit_scores import Scores, strictly_increasing

_PREFIX, _ORIGINAL = "prefix", "original"


@torch.no_grad()
def capture_greedy(
    runner: LayerwiseModel,
    batches: Iterable[Batch],
    token_weights: TokenWeights | None = None,
    rounds: int | None = None,
) -> Removals:
    """Order layers by greedy removal: drop the one that costs least, measure the rest again.

    The cost of a layer is the mean of ``KL(original ‖ without it and those before it)`` over the
    predictions of the labelled tokens (of all text without labels), in nats. Pinned layers stay.

    In a round all layers pass once, in order. One stream of hidden states misses the removed layers
    only. At each candidate another branches off it that misses the candidate, too, so that it costs
    the layers behind the candidate.

    Streams are dropped when a round ends. Its costs stay in the store, beside the original's final
    hidden states at the predictions that count, so that a stopped run begins its last round anew.

    Args:
        runner: The model. Streams of one batch at a time are in its store if it is in memory;
            otherwise those of all, and each layer is read once a round.
        batches: Model inputs; not read if the runner has embedded some.
        token_weights: None: all labelled tokens count 1. Otherwise the prediction of a prompt or
            answer token counts the weight of its role.
        rounds: Layers to remove at most; default half of them.

    Raises:
        NumericalError: If NaN or infinity appears; the message says where.
        UnsupportedModelError: If layers read keys and values of earlier ones.
    """
    anatomy = read_anatomy(runner.model)
    if anatomy.backbone.shared_tail is not None:
        raise UnsupportedModelError(
            "criterion 'kl_greedy' runs layers apart from those before them, but later layers of "
            f"{anatomy.model_type!r} read their keys and values. Use 'block_influence'"
        )
    if not runner.store.has("batches"):
        runner.embed(batches)
    pinned = list(anatomy.pinned_layers)
    free = [index for index in range(anatomy.num_layers) if index not in pinned]
    data = batches_with_targets(runner.model, runner.batches(), token_weights)
    removal = _Removal(runner, [targets for _, targets in data])
    turns = min(rounds or max(len(free) // 2, 1), len(free), anatomy.num_layers - 1)
    divergence = torch.zeros(anatomy.num_layers, dtype=torch.float64)
    removed: list[int] = []
    for _ in progress(range(turns), "remove layers"):
        candidates = [index for index in free if index not in removed]
        divergence[candidates] = removal.costs(removed, candidates)
        removed.append(min(candidates, key=lambda index: float(divergence[index])))
    others = [index for index in free if index not in removed]
    others.sort(key=lambda index: float(divergence[index]))
    divergence[pinned] = divergence.max()
    return Removals(
        order=torch.tensor([*removed, *others, *pinned]),
        divergence=divergence,
        num_samples=sum(len(targets.labels) for targets in removal.targets),
        num_tokens=sum(targets.num_tokens for targets in removal.targets),
    )


def score_kl_greedy(statistics: Removals, anatomy: Anatomy) -> Scores:
    """Greedy order of removal by divergence from the original; the first to go scores least.

    A removed layer's score is the divergence, in nats for each token, of the model without it and
    the layers before it in the order. A layer that was never removed has the divergence that its
    removal would have made when it was last tried, pinned layers (never tried) the highest of all.
    Where this would break the order of removal, a score is raised to just above the one before.

    Args:
        statistics: The order of removal.
        anatomy: The model's.

    Reference:
        Song et al. 2024, SLEB, arXiv:2402.09025 (greedy removal, third metric). There the
        likelihood of text is measured; here it is the divergence from the original's own
        predictions, at the answers.
    """
    scores = torch.empty(anatomy.num_layers)
    scores[statistics.order] = strictly_increasing(statistics.divergence[statistics.order])
    return Scores("kl_greedy", layer=scores)


@dataclass(frozen=True)
class _Removal:
    """Measures what the removal of layers does to a model's predictions.

    Attributes:
        runner: The model and its batches.
        targets: What counts of each batch.
    """

    runner: LayerwiseModel
    targets: Sequence[Targets]

    def costs(self, removed: Sequence[int], candidates: Sequence[int]) -> Float64[Tensor, " K"]:
        """The mean divergence when one candidate goes beside the removed layers, for each."""
        store, places = self.runner.store, self.runner.places
        name = f"round-{len(removed)}"
        if not store.has(name):
            is_live = isinstance(self.runner.source, Live)
            total = torch.zeros(len(candidates), dtype=torch.float64)
            for group in ([place] for place in places) if is_live else [places]:
                self._run_layers(group, removed, candidates)
                total += self._divergences(group, candidates, is_first=not removed)
                for stream in (_PREFIX, *map(_without, candidates)):
                    store.drop(stream)
            weight = sum(float(targets.totals.sum()) for targets in self.targets)
            store.write(name, 0, {"costs": total / weight})
            store.finish(name)
        return store.read(name, 0, torch.device("cpu"))["costs"]

    def _run_layers(
        self, places: Sequence[int], removed: Sequence[int], candidates: Sequence[int]
    ) -> None:
        """Bring the stream without the removed layers, and those of the candidates, to the end."""
        runner, streams = self.runner, [_PREFIX]
        for place in places:
            self._write(_PREFIX, place, runner.input_of(0, place))
        for index, layer in enumerate(decoder_layers(runner.model)):
            is_gone = index in removed
            with nullcontext() if is_gone else runner.source.layer(index, runner.device):
                for place in places:
                    calls = runner.calls(place)
                    if index in candidates:
                        skipped = calls.after(index, self._state(_PREFIX, place))
                        self._write(_without(index), place, skipped)
                    for stream in streams:
                        hidden = self._state(stream, place)
                        output = hidden if is_gone else calls.run(layer, index, hidden)
                        runner.require_finite(output, f"the output of layer {index}", place)
                        self._write(stream, place, calls.after(index, output))
            if index in candidates:
                streams.append(_without(index))

    def _divergences(
        self, places: Sequence[int], candidates: Sequence[int], is_first: bool
    ) -> Float64[Tensor, " K"]:
        """Weighted sums of the divergence from the original, for each candidate's stream."""
        total = torch.zeros(len(candidates), dtype=torch.float64)
        with self.runner.source.after_layers(self.runner.device):
            head = head_of(self.runner.model)
            for place in places:
                if is_first:
                    self._write(_ORIGINAL, place, self._final(_PREFIX, place))
                original, weights = self._state(_ORIGINAL, place), self.targets[place].weights
                for row, index in enumerate(candidates):
                    hidden = self._final(_without(index), place)
                    found = row_divergences(hidden, original.to(hidden.device), head, head)
                    total[row] += found.cpu().double() @ weights[weights > 0].cpu().double()
        require_finite(total, "the predictions without a layer")
        return total

    def _final(self, stream: str, place: int) -> Float[Tensor, "N D"]:
        """The final hidden states of a stream at the predictions that count."""
        hidden: Tensor = final_norm(self.runner.model)(self._state(stream, place))[:, :-1]
        return hidden[(self.targets[place].weights > 0).to(hidden.device)]

    def _state(self, stream: str, place: int) -> Tensor:
        return self.runner.store.read(stream, place, self.runner.device)["hidden"]

    def _write(self, stream: str, place: int, hidden: Tensor) -> None:
        self.runner.store.write(stream, place, {"hidden": hidden})


def _without(index: int) -> str:
    """The stream that misses a layer that is tried."""
    return f"without-{index}"
