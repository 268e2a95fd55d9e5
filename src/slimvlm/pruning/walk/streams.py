"""Hidden states between layers, in three streams. B batch, T token, C input channel of a matrix."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from slimvlm.core.errors import NumericalError
from slimvlm.data.roles import token_weights as weights_by_role
from slimvlm.models.devices import free_memory, with_float64
from slimvlm.models.hidden import all_finite, head_of, replaced_forward
from slimvlm.pruning.repair import Writer
from slimvlm.scoring.batches import Batch, TokenWeights, labels_of, mean_answer_loss
from slimvlm.scoring.layerwise import LayerwiseModel
from slimvlm.scoring.moments import Moments

PREFIX, ORIGINAL, SLICED = "prefix", "original", "sliced"
"""Streams: after walked layers, after the original's, after layers that were only cut."""

ROWS = 2048  # tokens whose moments are added at once
MOST_BYTES = 2**29  # inputs of a matrix that are kept at most; more are computed again


def most_kept(free: float) -> float:
    """Bytes of a matrix's inputs that are kept at most, where so many are free."""
    return min(MOST_BYTES, free / 8)


@dataclass(frozen=True)
class KeptInputs:
    """The inputs of the matrix that ends a block; the modules before it need not run again."""

    block: nn.Module  # returns the output of the matrix
    linear: nn.Linear  # the matrix, with its weights at the time of the call
    extra: int  # further outputs of the block, all of them None
    values: dict[int, Float[Tensor, "... C"]]  # inputs of the matrix, by batch
    held: Callable[[Tensor], Tensor]  # puts a tensor where the values are kept

    def answer(self, place: int, *args: Any, **kwargs: Any) -> Any:
        """Compute only the last matrix of the block, for one batch."""
        output = self.linear(self.values[place].to(self.linear.weight.device))
        return (output, *[None] * self.extra) if self.extra else output


class _ReachedError(Exception):
    """Stop a forward pass when the inputs that are needed have been recorded."""


@dataclass
class Streams(LayerwiseModel):
    """The hidden states of the batches of a walk."""

    what = "walk"  # in the line of progress
    judges = True  # whether the answers at the end can decide

    token_weights: TokenWeights | None  # weight of tokens by role; None: all weigh 1
    # blocks of the layer that is walked whose last inputs are kept, for the stream of walked layers
    kept: list[KeptInputs] = field(default_factory=list, init=False)

    def embed_all(self, fitted: Sequence[Batch], held_out: Sequence[Batch]) -> None:
        """Embed the batches for choices and fits, and the validation batches after them."""
        self.embed([*fitted, *held_out])
        self.fitted, self.held_out = self.places[: len(fitted)], self.places[len(fitted) :]
        config, given = self.model.config, self.token_weights
        # of each token of each batch, ``[B * T]``
        self.weights = [weights_by_role(config, b, given).flatten() for b in self.batches()]
        # the layers that some fitted batch runs
        self.layers_run = {i for place in self.fitted for i in self.layers_of(place)}

    def output(self, stream: str, index: int, place: int) -> Tensor:
        """Run a layer on a stream."""
        with ExitStack() as stack:
            for inputs in self.kept if stream == PREFIX else ():
                answer = partial(inputs.answer, place)
                stack.enter_context(replaced_forward(inputs.block, answer))
            return super().output(stream, index, place)

    def inputs(
        self, stream: str, writer: Writer, places: Sequence[int]
    ) -> Iterator[tuple[int, Tensor]]:
        """Inputs of a matrix for each batch, ``[B, T, C]``; nothing after it is run."""
        seen: list[Tensor] = []

        def catch(module: nn.Module, args: tuple[Tensor]) -> None:
            seen.append(args[0])
            raise _ReachedError

        with writer.linear.register_forward_pre_hook(catch):
            for place in self._running(writer.index, places):
                with suppress(_ReachedError):
                    self.output(stream, writer.index, place)
                yield place, seen.pop()

    def keep_inputs(self, writer: Writer) -> None:
        """Keep a matrix's inputs, unless they are large or its block does not end with it."""
        index, linear = writer.index, writer.linear
        parent = writer.projection.path.rpartition(".")[0]
        block = self.layers[index].get_submodule(parent)
        rows = sum(len(weights) for weights in self.weights)
        size = rows * linear.in_features * linear.weight.element_size()
        held = self.store.held
        most = most_kept(free_memory(held(linear.weight[:0]).device))
        first = next(self._running(index, self.places), None)
        if first is None or size > most or self.shares_keys:
            return
        given: list[Any] = []
        with ExitStack() as stack:
            for module in (linear, block):
                note = lambda module, args, output: given.append(output)  # noqa: E731
                stack.enter_context(module.register_forward_hook(note))
            self.output(PREFIX, index, first)
        of_block, *extra = given[-1] if isinstance(given[-1], tuple) else given[-1:]
        if len(given) > 2 or of_block is not given[0] or any(each is not None for each in extra):
            return
        values = {place: held(x) for place, x in self.inputs(PREFIX, writer, self.places)}
        self.kept.append(KeptInputs(block, linear, len(extra), values, held))

    def moments(
        self, stream: str, writer: Writer, places: Sequence[int], end: int | None = None
    ) -> Moments:
        """Sum up a matrix's inputs and, with ``end``, the output's distance from the original's."""
        linear = writer.linear
        dtype = torch.promote_types(linear.weight.dtype, torch.float32)
        outputs = None if end is None else linear.out_features
        moments = Moments.zero(linear.in_features, outputs, dtype, writer.weight.device)
        for rows in self.rows(stream, writer, places, end):
            moments.add(*rows)
        sums = [moments.gram] if moments.cross is None else [moments.gram, moments.cross]
        if not all(map(all_finite, sums)):
            raise NumericalError(f"NaN or infinity in layer {writer.name} during the walk")
        return moments

    def rows(
        self, stream: str, writer: Writer, places: Sequence[int], end: int | None = None
    ) -> Iterator[list[Tensor]]:
        """Yield inputs, weights and residuals for `moments`; small batches are joined for speed."""
        own = next((inputs for inputs in self.kept if inputs.linear is writer.linear), None)
        known = None if own is None else ((p, own.values[p]) for p in places if p in own.values)
        waiting: list[list[Tensor]] = []
        for place, x in known or self.inputs(stream, writer, places):
            x = x.to(writer.weight.device)
            rows = [x.flatten(0, -2), self.weights[place].to(x.device)]
            if end is not None:
                output = self.output(stream, writer.index, place)
                target = self.state(ORIGINAL, end, place).to(output.device)
                dtype = torch.promote_types(target.dtype, torch.float32)
                rows.append((target.to(dtype) - output.to(dtype)).flatten(0, -2).to(x.device))
            waiting.append(rows)
            if sum(len(each[0]) for each in waiting) >= ROWS:
                yield [torch.cat(column) for column in zip(*waiting, strict=True)]
                waiting.clear()
        if waiting:
            yield [torch.cat(column) for column in zip(*waiting, strict=True)]

    def _running(self, index: int, places: Iterable[int]) -> Iterator[int]:
        """The batches that a layer takes part in."""
        return (place for place in places if index in self.layers_of(place))

    def adds_plainly(self, index: int, linear: nn.Linear) -> bool:
        """Whether the output of a layer's last matrix is added to the hidden states unchanged."""
        seen: list[Tensor] = []

        def twice(module: nn.Module, args: object, output: Tensor) -> Tensor:
            seen.append(output)
            return 2 * output

        place = next(self._running(index, self.fitted))
        once = self.output(PREFIX, index, place)
        with linear.register_forward_hook(twice):
            change = with_float64(self.output(PREFIX, index, place) - once).double()
        given = with_float64(seen[0]).double()
        share = (change * given).sum() / given.square().sum()
        return bool((share - 1).abs() < 0.25)

    def answer_loss(self, stream: str, end: int) -> float:
        """Mean cross-entropy of the validation batches' labels; the model has ``end`` layers."""
        config, batches = self.model.config, [*self.batches()][self.held_out.start :]
        with self.source.loaded("after", self.device):
            states = (
                (self.norm(self.state(stream, end, b["place"])), labels_of(config, b))
                for b in batches
            )
            return mean_answer_loss(states, head_of(self.model))
