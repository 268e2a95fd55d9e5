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
from slimvlm.models.hidden import all_finite, head_of, replaced_forward, require_finite_values
from slimvlm.models.parts import Parts, shares_keys
from slimvlm.pruning.repair import Writer
from slimvlm.scoring.batches import TokenWeights, labels_of, mean_answer_loss
from slimvlm.scoring.layerwise import LayerCalls, LayerwiseModel
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
class Streams:
    """The hidden states of embedded batches; all streams begin with the embeddings."""

    runner: LayerwiseModel
    fitted: range  # places of the batches for choices and fits
    held_out: range  # places of the validation batches, which confirm and judge
    token_weights: TokenWeights | None  # weight of tokens by role; None: all weigh 1
    # blocks of the layer that is walked whose last inputs are kept, for the stream of walked layers
    kept: list[KeptInputs] = field(default_factory=list, init=False)
    _own_calls: dict[tuple[str, int], LayerCalls] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        config, given = self.runner.model.config, self.token_weights
        self.places = range(len(self.fitted) + len(self.held_out))
        # of each token of each batch, ``[B * T]``
        self.weights = [weights_by_role(config, b, given).flatten() for b in self.runner.batches()]
        # the layers that some fitted batch runs
        self.layers_run = {i for place in self.fitted for i in self.runner.layers_of(place)}

    def state(self, stream: str, index: int, place: int) -> Tensor:
        """Input of a layer, or of the final norm."""
        name = f"{stream}-{index}"
        if self.runner.store.has(name):
            return self.runner.store.read(name, place, self.runner.devices[index])["hidden"]
        return self.runner.input_of(0, place)

    def output(self, stream: str, index: int, place: int) -> Tensor:
        """Run a layer on a stream."""
        layer, hidden = Parts(self.runner.model).layers[index], self.state(stream, index, place)
        if not shares_keys(self.runner.model.config):
            calls = self.runner.calls(place, index)
        elif (stream, place) in self._own_calls:
            calls = self._own_calls[stream, place]
        else:  # layers of Gemma 3n and 4 store keys and values for later layers of their stream
            calls = self.runner.calls(place).with_own_dictionaries()
            self._own_calls[stream, place] = calls
        with ExitStack() as stack:
            for inputs in self.kept if stream == PREFIX else ():
                answer = partial(inputs.answer, place)
                stack.enter_context(replaced_forward(inputs.block, answer))
            return calls.after(index, calls.run(layer, index, hidden))

    def pass_on(self, stream: str, index: int, end: int, places: Sequence[int]) -> None:
        """Run batches through a layer, and store its output as the input of layer ``end``."""
        store, name = self.runner.store, f"{stream}-{end}"
        for place in places:
            output = self.output(stream, index, place)
            require_finite_values(output, f"the output of layer {index}")
            store.write(name, place, {"hidden": output})
        if places and not store.has(name):
            store.finish(name)

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
        block = Parts(self.runner.model).layers[index].get_submodule(parent)
        rows = sum(len(weights) for weights in self.weights)
        size = rows * linear.in_features * linear.weight.element_size()
        held = self.runner.store.held
        most = most_kept(free_memory(held(linear.weight[:0]).device))
        first = next(self._running(index, self.places), None)
        if first is None or size > most or shares_keys(self.runner.model.config):
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
        return (place for place in places if index in self.runner.layers_of(place))

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
        model = self.runner.model
        with self.runner.source.loaded("after", self.runner.device):
            batches = (b for b in self.runner.batches() if b["place"] in self.held_out)
            states = (
                (Parts(model).norm(self.state(stream, end, b["place"])), labels_of(model.config, b))
                for b in batches
            )
            return mean_answer_loss(states, head_of(model))
