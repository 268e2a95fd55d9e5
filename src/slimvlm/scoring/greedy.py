"""Remove layers one after another, each time the one whose absence changes predictions least.

B batch, T token, D hidden, K candidates, N counted predictions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from slimvlm.core.errors import UnsupportedModelError
from slimvlm.core.progress import progress
from slimvlm.models.anatomy import Anatomy, read_anatomy
from slimvlm.models.hidden import (
    head_of,
    hidden_states,
    layer_input,
    replaced_forward,
    with_layer_input,
)
from slimvlm.models.losses import row_divergences
from slimvlm.models.parts import decoder_layers
from slimvlm.scoring.batches import (
    Batch,
    Targets,
    TokenWeights,
    batches_with_targets,
    forward_backbone,
)
from slimvlm.scoring.statistics import Removals, require_finite
from slimvlm.scoring.unit_scores import Scores, strictly_increasing


@torch.no_grad()
def capture_greedy(
    model: nn.Module,
    batches: Iterable[Batch],
    token_weights: TokenWeights | None = None,
    rounds: int | None = None,
    at_once: int = 4,
) -> Removals:
    """Order layers by greedy removal: drop the one that costs least, measure the rest again.

    The cost of a layer is the mean of ``KL(original ‖ without it and those before it)`` over the
    predictions of the labelled tokens (of all text without labels), in nats. Pinned layers stay.

    Each candidate is one forward pass from its own layer on: layers before it and removed ones are
    not computed, and the vision tower runs for every pass.

    Args:
        model: The model.
        batches: Model inputs. They are kept and read once a round, and beside them the original's
            final hidden states at the predictions that count.
        token_weights: None: all labelled tokens count 1. Otherwise the prediction of a prompt or
            answer token counts the weight of its role.
        rounds: Layers to remove at most; default half of them.
        at_once: Candidates in one forward pass. More need more memory and use a GPU better.

    Raises:
        UnsupportedModelError: If layers read keys and values of earlier ones.
    """
    anatomy = read_anatomy(model)
    if anatomy.backbone.shared_tail is not None:
        raise UnsupportedModelError(
            "criterion 'kl_greedy' skips the layers before the one that it tries, but later layers "
            f"of {anatomy.model_type!r} read their keys and values. Use 'block_influence'"
        )
    pinned = list(anatomy.pinned_layers)
    free = [index for index in range(anatomy.num_layers) if index not in pinned]
    data = batches_with_targets(model, batches, token_weights)
    references = [_Reference.of(model, batch, targets) for batch, targets in data]
    removal = _Removal(model, references)
    turns = min(rounds or max(len(free) // 2, 1), len(free), anatomy.num_layers - 1)
    divergence = torch.zeros(anatomy.num_layers, dtype=torch.float64)
    removed: list[int] = []
    for _ in progress(range(turns), "remove layers"):
        candidates = [index for index in free if index not in removed]
        divergence[candidates] = removal.divergences(removed, candidates, at_once)
        removed.append(min(candidates, key=lambda index: float(divergence[index])))
    others = [index for index in free if index not in removed]
    others.sort(key=lambda index: float(divergence[index]))
    divergence[pinned] = divergence.max()
    return Removals(
        order=torch.tensor([*removed, *others, *pinned]),
        divergence=divergence,
        num_samples=sum(len(reference.counted) for reference in references),
        num_tokens=sum(len(reference.weights) for reference in references),
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
class _Reference:
    """A batch and what the original predicts where it counts.

    Attributes:
        batch: Model inputs.
        counted: ``[B, T-1]`` whether the prediction of each next token counts.
        weights: ``[N]`` what each of these predictions counts.
        hidden: ``[N, D]`` the original's final hidden states there.
    """

    batch: Batch
    counted: Tensor
    weights: Tensor
    hidden: Tensor

    @classmethod
    def of(cls, model: Any, batch: Batch, targets: Targets) -> _Reference:
        counted = targets.weights > 0
        (hidden,) = hidden_states(model, batch)
        hidden = hidden[:, :-1][counted.to(hidden.device)]
        require_finite(hidden, "the predictions")
        return cls(batch, counted, targets.weights[counted].double(), hidden)

    def divergences(self, model: Any, copies: int) -> Tensor:
        """``[K]`` weighted sums of the divergence from the original, for each copy of the batch."""
        (hidden,) = hidden_states(model, _repeated(self.batch, copies))
        counted, head = self.counted.to(hidden.device), head_of(model)
        found = [
            row_divergences(copy[:, :-1][counted], self.hidden, head, head).double()
            for copy in hidden.chunk(copies)
        ]
        total = torch.stack(found) @ self.weights.to(hidden.device)
        require_finite(total, "the predictions without a layer")
        return total.cpu()


class _Removal:
    """Measures what the removal of layers does to a model's predictions."""

    def __init__(self, model: nn.Module, references: Sequence[_Reference]) -> None:
        self.model, self.references = model, references
        self.layers = list(decoder_layers(model))

    def divergences(self, removed: list[int], candidates: list[int], at_once: int) -> Tensor:
        """The mean divergence when one candidate goes beside the removed layers, for each."""
        total = torch.zeros(len(candidates), dtype=torch.float64)
        groups = list(torch.arange(len(candidates)).split(at_once))
        for reference in self.references:
            with _passing_on(self.layers[index] for index in removed):
                inputs = self._layer_inputs(reference.batch)
            for group in groups:
                tried = [candidates[i] for i in group]
                with self._without(tried, removed, inputs[tried[0]]):
                    total[group] += reference.divergences(self.model, len(tried))
        return total / sum(float(reference.weights.sum()) for reference in self.references)

    def _layer_inputs(self, batch: Batch) -> list[Tensor]:
        """The hidden states that enter each layer."""
        inputs: list[Tensor] = []

        def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
            inputs.append(layer_input(args, kwargs))

        with ExitStack() as stack:
            for layer in self.layers:
                stack.enter_context(layer.register_forward_pre_hook(keep, with_kwargs=True))
            forward_backbone(self.model, batch)
        return inputs

    @contextmanager
    def _without(self, tried: list[int], removed: list[int], hidden: Tensor) -> Iterator[None]:
        """Each copy of a batch misses one of the tried layers, and all miss the removed ones.

        Nothing is computed before the first tried layer; ``hidden`` enters it instead.
        """
        copies = len(tried)

        def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
            given = torch.cat([hidden] * copies)
            return with_layer_input(args, kwargs, given)

        def skip(copy: int, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
            rows = slice(copy * len(hidden), (copy + 1) * len(hidden))
            changed = output.clone()
            changed[rows] = layer_input(args, kwargs)[rows]
            return changed

        unused = {*range(tried[0]), *removed}
        with ExitStack() as stack:
            stack.enter_context(_passing_on(self.layers[index] for index in sorted(unused)))
            first = self.layers[tried[0]]
            stack.enter_context(first.register_forward_pre_hook(enter, with_kwargs=True))
            for copy, index in enumerate(tried):
                hook = partial(skip, copy)
                stack.enter_context(
                    self.layers[index].register_forward_hook(hook, with_kwargs=True)
                )
            yield


@contextmanager
def _passing_on(layers: Iterable[nn.Module]) -> Iterator[None]:
    """These layers pass their input on and compute nothing."""

    def pass_on(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states

    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(replaced_forward(layer, pass_on))
        yield


def _repeated(batch: Batch, copies: int) -> Batch:
    return {
        name: torch.cat([value] * copies) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }
