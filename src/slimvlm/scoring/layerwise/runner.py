"""Forward passes one decoder layer at a time, whether layers are in memory or in files.

The text model is run once for each batch with layers that only record what they are called with;
then every layer takes all batches in turn. Captures see a `LayerView`: a model that has this layer
only and runs stored inputs through it. So they are the same functions that score a model in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimvlm.core.documents import digest
from slimvlm.core.errors import DataError, UnsupportedModelError
from slimvlm.data.roles import valid_tokens
from slimvlm.models.hidden import (
    all_finite,
    layer_output,
    replaced_forward,
    require_finite_values,
)
from slimvlm.models.load import digest_of_tensors
from slimvlm.models.parts import Parts, shares_keys
from slimvlm.scoring.batches import Batch, forward_backbone, on_device
from slimvlm.scoring.layerwise.checkpoint import LazyCheckpoint
from slimvlm.scoring.layerwise.stores import Store, packed, unpacked

_KEPT = ("input_ids", "labels")

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and named arguments of a layer without its hidden states."""


@dataclass(frozen=True)
class LayerCalls:
    """The arguments to run one batch through the decoder layer by layer."""

    arguments: dict[int, Arguments]  # by layer; none where a batch skips one (Mllama, no picture)
    added: dict[int, Tensor]  # by layer: features added to the states before it (deepstack)

    def with_own_dictionaries(self) -> LayerCalls:
        """Copy the dictionaries in which layers pass keys and values to later ones."""
        own: dict[int, dict[Any, Any]] = {}

        def copied(value: Any) -> Any:
            return own.setdefault(id(value), dict(value)) if type(value) is dict else value

        arguments = {
            index: (args, {name: copied(value) for name, value in kwargs.items()})
            for index, (args, kwargs) in self.arguments.items()
        }
        return replace(self, arguments=arguments)

    def run(self, layer: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """Run one layer and return its output."""
        if index not in self.arguments:
            return hidden
        args, kwargs = self.arguments[index]
        return layer_output(layer(hidden, *args, **kwargs))

    def after(self, index: int, output: Tensor) -> Tensor:
        """Turn the output of a layer into the input of the next one, or of the final norm."""
        added = self.added.get(index + 1)
        return output if added is None else output + added.to(output.device)

    def through(self, layer: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """Run one layer and return the input of the next one."""
        return self.after(index, self.run(layer, index, hidden))


@dataclass(frozen=True)
class Live:
    """A model that is in memory, with all its weights."""

    model: PreTrainedModel

    def layer(self, *part: int | torch.device) -> AbstractContextManager[None]:
        """As in `LazyCheckpoint`; all weights are there already."""
        return nullcontext()

    before_layers = after_layers = layer


Source = Live | LazyCheckpoint


class LayerView(nn.Module):
    """A model of some layers only, for captures; ``run`` runs a stored batch through them."""

    def __init__(
        self, whole: PreTrainedModel, layers: nn.ModuleList, run: Callable[[int], object]
    ) -> None:
        super().__init__()
        self.layers, self._run = layers, run
        self._whole = (whole,)  # in a tuple, it is no submodule

    @property
    def config(self) -> Any:
        """The whole model's."""
        return self._whole[0].config

    @property
    def base_model(self) -> nn.Module:
        """Itself: there is no head."""
        return self

    def get_submodule(self, target: str) -> nn.Module:
        """A part of the whole model, by its path there."""
        return self._whole[0].get_submodule(target)

    def forward(self, place: int, **batch: Any) -> None:
        """Run the batch at a place; the capture reads the rest of it."""
        self._run(place)


@dataclass(frozen=True)
class LayerwiseModel:
    """A model that runs one layer at a time, over one set of batches that are stored between."""

    source: Source
    store: Store  # of the activations between the layers
    device: torch.device
    _digests: list[str] = field(default_factory=list, init=False)  # of the batches

    @property
    def model(self) -> PreTrainedModel:
        """The model; on a source of files, without weights."""
        return self.source.model

    def batches(self) -> Iterator[Batch]:
        """Read the place, tokens, labels and padding of each batch."""
        for place in range(len(self._digests)):
            stored = self.store.read("batches", place, self.device, but="hidden")
            yield {"place": place, **_below("batch.", stored)}

    @torch.no_grad()
    def embed(self, batches: Iterable[Batch]) -> str:
        """Run everything before the decoder layers for every batch that is not stored yet.

        Returns a digest of the batches.
        """
        config = self.model.config
        keeps_objects = self.store.keeps_objects
        if shares_keys(config) and not (keeps_objects and isinstance(self.source, Live)):
            raise UnsupportedModelError(
                f"model_type {config.model_type!r} cannot be run with low memory: its last layers "
                "read keys and values of earlier ones"
            )
        self._digests.clear()
        _ = self.devices  # before the model has one layer only
        with self.source.before_layers(self.device):
            for place, batch in enumerate(batches):
                code = digest_of_tensors(batch)
                self._digests.append(code)
                stored = self.store.about("batches", place)
                if stored is not None and stored["digest"] == code:
                    continue
                moved = on_device(self.model, batch)
                hidden, calls = self._calls_of(moved)
                tensors = {f"batch.{name}": moved[name] for name in _KEPT if name in moved}
                tensors["batch.attention_mask"] = valid_tokens(moved)
                tree = {
                    str(index): {"object": given} if keeps_objects else packed(given, tensors)
                    for index, given in calls.arguments.items()
                }
                tensors["hidden"] = hidden
                tensors |= {f"added.{index}": value for index, value in calls.added.items()}
                self.store.write("batches", place, tensors, {"digest": code, "calls": tree})
        if not self._digests:
            raise DataError("no calibration batch was given")
        self.store.finish("batches")
        return digest(self._digests)

    def _calls_of(self, batch: Batch) -> tuple[Tensor, LayerCalls]:
        """Run a batch with layers that only record their arguments and return zeros.

        The input of a layer after the first is then the tensor that the model adds between the two.
        Returns the first layer's input and the calls.
        """
        noted: list[tuple[int, Tensor, Arguments]] = []

        def note(index: int, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            noted.append((index, hidden_states, (args, kwargs)))
            return torch.zeros_like(hidden_states)

        with ExitStack() as stack:
            for index, layer in enumerate(Parts(self.model).layers):
                stack.enter_context(replaced_forward(layer, partial(note, index)))
            forward_backbone(self.model, batch)
        (_, hidden, _), *later = noted
        arguments = {index: given for index, _, given in noted}
        added = {index: entering for index, entering, _ in later if bool(entering.any())}
        return hidden, LayerCalls(arguments, added)

    def input_of(self, index: int, place: int) -> Tensor:
        """Read the input of a layer; after the last one, of the final norm."""
        if index == 0:
            return self.store.read("batches", place, self.devices[0], "hidden")["hidden"]
        return self.calls(place).after(index - 1, self.output_of(index - 1, place))

    def output_of(self, index: int, place: int) -> Tensor:
        """Read the output of a layer."""
        return self.store.read(f"hidden-{index + 1}", place, self.devices[index + 1])["hidden"]

    @cached_property
    def devices(self) -> list[torch.device]:
        """Where each layer runs, and the final norm; several where a model lies on several."""
        parts = Parts(self.model)
        modules = (*parts.layers, parts.norm)
        own = (next((p.device for p in m.parameters() if not p.is_meta), None) for m in modules)
        return [device or self.device for device in own]

    def layers_of(self, place: int) -> set[int]:
        """List the layers that the batch at a place runs through."""
        return set(map(int, self.store.about("batches", place)["calls"]))

    @contextmanager
    def layer(self, index: int) -> Iterator[LayerView]:
        """One layer alone, with its weights."""
        layer = Parts(self.model).layers[index]

        def run(place: int) -> None:
            output = self.calls(place).run(layer, index, self.input_of(index, place))
            if not all_finite(output):
                mask = "batch.attention_mask"
                earlier = (self.store.read("batches", p, self.device, mask) for p in range(place))
                first = 1 + sum(len(stored[mask]) for stored in earlier)
                spoilt = (~torch.isfinite(output).flatten(1).all(1)).nonzero().flatten() + first
                samples = ", ".join(map(str, spoilt.tolist()))
                where = f"the output of layer {index} for calibration sample {samples}"
                require_finite_values(output, where)
            if not self.store.has(f"hidden-{index + 1}"):
                self.store.write(f"hidden-{index + 1}", place, {"hidden": output})

        with self.source.layer(index, self.device), self._view([layer], run) as view:
            yield view

    def finish(self, view: LayerView, index: int) -> None:
        """Store the outputs of a layer for the batches that no capture has run."""
        for batch in self.batches():
            if self.store.about(f"hidden-{index + 1}", batch["place"]) is None:
                with torch.no_grad():
                    view(**batch)
        self.store.finish(f"hidden-{index + 1}")

    @contextmanager
    def replayed(self) -> Iterator[LayerView]:
        """All layers, each of them returning its stored output, and the final norm."""
        layers = [nn.Identity() for _ in Parts(self.model).layers]

        def run(place: int) -> None:
            for index, layer in enumerate(layers):
                output = self.output_of(index, place)
                with replaced_forward(layer, lambda hidden_states, answer=output: answer):
                    layer(self.input_of(index, place))
            Parts(self.model).norm(self.input_of(len(layers), place))

        with self.source.after_layers(self.device), self._view(layers, run) as view:
            yield view

    @contextmanager
    def _view(
        self, layers: Sequence[nn.Module], run: Callable[[int], object]
    ) -> Iterator[LayerView]:
        """Inside, the text model has these decoder layers and no others."""
        text_model = Parts(self.model).text_model
        before = text_model.layers
        text_model.layers = nn.ModuleList(layers)
        try:
            yield LayerView(self.model, text_model.layers, run)
        finally:
            text_model.layers = before

    def calls(self, place: int) -> LayerCalls:
        """Read the calls of the layers by the batch at a place."""
        stored = self.store.read("batches", place, self.device, but="hidden")
        tree = self.store.about("batches", place)["calls"]
        added = {int(name): value for name, value in _below("added.", stored).items()}
        arguments = {int(index): unpacked(given, stored) for index, given in tree.items()}
        return LayerCalls(arguments, added)


def _below(prefix: str, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Select the tensors whose names begin with a prefix, and cut it off."""
    return {n.removeprefix(prefix): value for n, value in stored.items() if n.startswith(prefix)}
