"""Forward and backward passes one decoder layer at a time, whether layers are in memory or files.

The text model is run once for each batch with layers that only note what they are called with;
then every layer takes all batches in turn. Captures see a `LayerView`: a model that has this layer
only and runs stored inputs through it. So they are the same functions that score a model in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimvlm.core.errors import DataError, UnsupportedModelError
from slimvlm.core.requests import digest
from slimvlm.data.roles import valid_tokens
from slimvlm.models.hidden import all_finite, head_of
from slimvlm.models.load import digest_of_tensors
from slimvlm.models.parts import decoder_layers, family_of, final_norm, shares_keys
from slimvlm.scoring.batches import Batch, batches_with_targets, forward_backbone
from slimvlm.scoring.layerwise.calls import LayerCalls, noted_calls
from slimvlm.scoring.layerwise.stores import Store, unpacked
from slimvlm.scoring.statistics import require_finite

_KEPT = ("input_ids", "labels")


@runtime_checkable
class Source(Protocol):
    """A model whose parts are there with their weights when they are asked for."""

    @property
    def model(self) -> PreTrainedModel:
        """The model; parts that were not asked for may lack weights."""

    def before_layers(self, device: torch.device) -> AbstractContextManager[None]:
        """Inside, all that runs before the decoder layers has its weights."""

    def layer(self, index: int, device: torch.device) -> AbstractContextManager[None]:
        """Inside, a decoder layer has its weights."""

    def after_layers(self, device: torch.device) -> AbstractContextManager[None]:
        """Inside, the final norm and the head have their weights."""


@dataclass(frozen=True)
class Live:
    """A model that is in memory, with all its weights.

    Attributes:
        model: The model.
    """

    model: PreTrainedModel

    def before_layers(self, device: torch.device) -> AbstractContextManager[None]:
        """See `Source`."""
        return nullcontext()

    def layer(self, index: int, device: torch.device) -> AbstractContextManager[None]:
        """See `Source`."""
        return nullcontext()

    def after_layers(self, device: torch.device) -> AbstractContextManager[None]:
        """See `Source`."""
        return nullcontext()


class LayerView(nn.Module):
    """What captures see of a model: some of its layers, and stored batches for inputs.

    Args:
        whole: The model; its list of decoder layers must hold ``layers`` only.
        layers: The layers that are there.
        run: Runs the batch at a place through them.
        losses: Losses of its samples, in something with the gradients of the model's own loss.
    """

    def __init__(
        self,
        whole: PreTrainedModel,
        layers: Iterable[nn.Module],
        run: Callable[[int], object],
        losses: Callable[[int], Tensor],
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self._whole = (whole,)  # in a tuple, it is no submodule
        self._run, self._losses = run, losses

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
        """Run the batch at a place; what else it says is for the capture."""
        self._run(place)

    def sample_losses(self, place: int, **batch: Any) -> Tensor:
        """Losses of the samples of the batch at a place, with a graph."""
        return self._losses(place)


@dataclass(frozen=True)
class LayerwiseModel:
    """A model that runs one layer at a time, over one set of batches that are stored between.

    Attributes:
        source: The model.
        store: Where activations are between the layers.
        device: Where layers run.
    """

    source: Source
    store: Store
    device: torch.device

    @property
    def model(self) -> PreTrainedModel:
        """The model; on a source of files, without weights."""
        return self.source.model

    @property
    def places(self) -> range:
        """Numbers of the stored batches."""
        return range(self.store.count("batches"))

    def batches(self) -> Iterator[Batch]:
        """What captures read of each batch: its place, tokens, labels and padding."""
        for place in self.places:
            stored = self.store.read("batches", place, self.device, but="hidden")
            named = {
                name.removeprefix("batch."): value
                for name, value in stored.items()
                if name.startswith("batch.")
            }
            yield {"place": place, **named}

    @torch.no_grad()
    def embed(self, batches: Iterable[Batch]) -> str:
        """Run everything before the decoder layers for every batch that is not stored yet.

        Returns:
            A digest of the batches.

        Raises:
            DataError: If there is no batch.
            UnsupportedModelError: If layers read keys and values of earlier ones, and the model is
                in files or the store cannot hand these on.
        """
        config = self.model.config
        keeps_objects = self.store.keeps_objects and isinstance(self.source, Live)
        if shares_keys(config) and not keeps_objects:
            raise UnsupportedModelError(
                f"model_type {config.model_type!r} cannot be run with low memory: its last layers "
                "read keys and values of earlier ones"
            )
        digests: list[str] = []
        _ = self.devices  # known before a layer stands alone in the model
        with self.source.before_layers(self.device):
            for place, batch in enumerate(batches):
                digests.append(digest_of_tensors(batch))
                stored = self.store.about("batches", place)
                if stored is None or stored["digest"] != digests[-1]:
                    self._embed_one(place, batch, digests[-1])
        if not digests:
            raise DataError("no calibration batch was given")
        for place in range(len(digests), self.store.count("batches")):
            self.store.drop_entry("batches", place)
        self.store.finish("batches")
        return digest(digests)

    def _embed_one(self, place: int, batch: Batch, code: str) -> None:
        on_device = {k: v.to(self.device) for k, v in batch.items() if isinstance(v, Tensor)}
        with noted_calls(self.model) as take:
            inputs = {name: value for name, value in on_device.items() if name != "labels"}
            forward_backbone(self.model, inputs)
            hidden, calls = take()
        tensors = {f"batch.{name}": on_device[name] for name in _KEPT if name in on_device}
        tensors["batch.attention_mask"] = valid_tokens(on_device)
        tree = {
            str(index): self.store.packed(given, tensors)
            for index, given in calls.arguments.items()
        }
        tensors["hidden"] = hidden
        tensors |= {f"added.{index}": value for index, value in calls.added.items()}
        self.store.write("batches", place, tensors, {"digest": code, "calls": tree})

    def input_of(self, index: int, place: int) -> Tensor:
        """What enters a layer; after the last one, what enters the final norm."""
        if index == 0:
            return self.store.read("batches", place, self.devices[0], "hidden")["hidden"]
        return self.calls(place).after(index - 1, self.output_of(index - 1, place))

    def output_of(self, index: int, place: int) -> Tensor:
        """What leaves a layer."""
        return self.store.read(f"hidden-{index + 1}", place, self.devices[index + 1])["hidden"]

    @cached_property
    def devices(self) -> list[torch.device]:
        """Where each layer runs, and the final norm; several where a model lies on several."""
        modules = (*decoder_layers(self.model), final_norm(self.model))
        own = (next((p.device for p in m.parameters() if not p.is_meta), None) for m in modules)
        return [device or self.device for device in own]

    def layers_of(self, place: int) -> set[int]:
        """The layers that the batch at a place runs through."""
        return set(map(int, self.store.about("batches", place)["calls"]))

    @contextmanager
    def layer(self, index: int) -> Iterator[LayerView]:
        """One layer alone, with its weights."""
        layer = decoder_layers(self.model)[index]
        losses = partial(self._layer_losses, layer, index)
        view = LayerView(self.model, [layer], partial(self._forward_layer, layer, index), losses)
        with self.source.layer(index, self.device), _only(self.model, [layer]):
            yield view

    @contextmanager
    def replayed(self) -> Iterator[LayerView]:
        """All layers, each of them answering with what it gave before, and the final norm."""
        layers = [_Replayed() for _ in decoder_layers(self.model)]

        def run(place: int) -> None:
            for index, layer in enumerate(layers):
                layer.answer = self.output_of(index, place)
                layer(self.input_of(index, place))
            final_norm(self.model)(self.input_of(len(layers), place))

        def no_losses(place: int) -> Tensor:
            raise NotImplementedError("stored hidden states have no losses")

        with self.source.after_layers(self.device), _only(self.model, layers):
            yield LayerView(self.model, layers, run, no_losses)

    def start_gradients(self, token_weights: Mapping[str, float] | None) -> None:
        """Run norm, head and loss, and store the gradient of what leaves the last layer."""
        last = len(decoder_layers(self.model))
        if self.store.has(f"gradient-{last}"):
            return
        with self.source.after_layers(self.device):
            data = batches_with_targets(self.model, self.batches(), token_weights)
            for batch, targets in data:
                hidden = self.input_of(last, batch["place"]).requires_grad_()
                final = final_norm(self.model)(hidden)
                targets.sample_losses(final, head_of(self.model)).sum().backward()
                self._write_gradient(last, batch["place"], hidden.grad)
        self.store.finish(f"gradient-{last}")

    def _run_layer(self, layer: nn.Module, index: int, place: int, hidden: Tensor) -> Tensor:
        """What leaves a layer that reads ``hidden``, called as for the batch at a place."""
        return self.calls(place).run(layer, index, hidden)

    def calls(self, place: int) -> LayerCalls:
        """How the batch at a place goes through the layers."""
        stored = self.store.read("batches", place, self.device, but="hidden")
        tree = self.store.about("batches", place)["calls"]
        added = {
            int(name.removeprefix("added.")): value
            for name, value in stored.items()
            if name.startswith("added.")
        }
        arguments = {int(index): unpacked(given, stored) for index, given in tree.items()}
        return LayerCalls(arguments, added)

    def _forward_layer(self, layer: nn.Module, index: int, place: int) -> None:
        output = self._run_layer(layer, index, place, self.input_of(index, place))
        self.require_finite(output, f"the output of layer {index}", place)
        if not self.store.has(f"hidden-{index + 1}"):
            self.store.write(f"hidden-{index + 1}", place, {"hidden": output})

    def _layer_losses(self, layer: nn.Module, index: int, place: int) -> Tensor:
        """Numbers whose gradients are those of the samples' losses: ``<output, its gradient>``."""
        hidden = self.input_of(index, place).requires_grad_()
        if not self.store.has(f"gradient-{index}"):
            hidden.register_hook(partial(self._write_gradient, index, place))
        output = self._run_layer(layer, index, place, hidden)
        gradient = self.store.read(f"gradient-{index + 1}", place, self.device)["gradient"]
        return (output.float() * gradient.float()).flatten(1).sum(1)

    def require_finite(self, values: Tensor, what: str, place: int) -> None:
        """Stop at NaN or infinity, and name the samples of the batch that have it, by number."""
        if all_finite(values):
            return
        mask = "batch.attention_mask"
        earlier = (self.store.read("batches", p, self.device, mask) for p in range(place))
        first = 1 + sum(len(stored[mask]) for stored in earlier)
        spoilt = (~torch.isfinite(values).flatten(1).all(1)).nonzero().flatten() + first
        samples = ", ".join(map(str, spoilt.tolist()))
        require_finite(values, f"{what} for calibration sample {samples}")

    def _write_gradient(self, index: int, place: int, gradient: Tensor | None) -> None:
        assert gradient is not None
        self.require_finite(gradient, f"the gradient of the input of layer {index}", place)
        self.store.write(f"gradient-{index}", place, {"gradient": gradient})


class _Replayed(nn.Module):
    """A layer that gives a stored answer."""

    answer: Tensor

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.answer


@contextmanager
def _only(model: PreTrainedModel, layers: Iterable[nn.Module]) -> Iterator[None]:
    """The text model has these decoder layers and no others inside."""
    text_model: Any = model.get_submodule(family_of(model.config.model_type).backbone)
    before = text_model.layers
    text_model.layers = nn.ModuleList(layers)
    try:
        yield
    finally:
        text_model.layers = before
