"""A model run one decoder layer at a time, with its layers in memory or in files.

The text model is run once for each batch with layers that only record what they are called with;
then every layer takes all batches in turn. Captures see a model that has this layer only and runs
stored inputs through it. So they are the same functions that score a model in memory.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_module_tensor_to_device
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimvlm.core.errors import ConfigError, DataError, UnsupportedModelError, raised_as
from slimvlm.data.roles import valid_tokens
from slimvlm.models import load as models
from slimvlm.models.devices import digest_of_tensors
from slimvlm.models.files import Origin, origins_in_files, unreadable, weight_files
from slimvlm.models.hidden import (
    as_inputs,
    layer_output,
    replaced_forward,
    require_finite_values,
)
from slimvlm.models.parts import Parts, shares_keys
from slimvlm.scoring.batches import Batch, forward_backbone
from slimvlm.scoring.stores import Store

_DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_KEPT = ("input_ids", "labels", "image_embeds_position_mask")

HIDDEN = "hidden"  # the stream of a model whose layers are scored

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and named arguments of a layer without its hidden states."""


@dataclass(frozen=True)
class LayerCalls:
    """The arguments to run one batch through the decoder, layer by layer."""

    arguments: dict[int, Arguments]  # by layer; none where a batch skips one (Mllama, no image)
    # by layer: features added to the states before it (deepstack), and the tokens that get them
    added: dict[int, tuple[Tensor, Tensor]]

    def with_own_dictionaries(self) -> "LayerCalls":
        """Copy the dictionaries in which layers pass keys and values to later ones."""
        own: dict[int, Any] = {}
        arguments: dict[int, Arguments] = {}
        for index, (args, kwargs) in self.arguments.items():
            shared = {name: v for name, v in kwargs.items() if isinstance(v, MutableMapping)}
            copies = {name: own.setdefault(id(v), copy(v)) for name, v in shared.items()}
            arguments[index] = args, {**kwargs, **copies}
        return replace(self, arguments=arguments)

    def run(self, layer: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """Run one layer and return its output."""
        if index not in self.arguments:
            return hidden
        args, kwargs = self.arguments[index]
        return layer_output(layer(hidden, *args, **kwargs))

    def after(self, index: int, output: Tensor) -> Tensor:
        """Turn the output of a layer into the input of the next one, or of the final norm."""
        if index + 1 not in self.added:
            return output
        values, tokens = (each.to(output.device) for each in self.added[index + 1])
        return output.flatten(0, -2).index_add(0, tokens, values).view_as(output)


@dataclass(frozen=True)
class LazyCheckpoint:
    """A native model without weights, and the files that they are read from on request."""

    folder: Path
    model: PreTrainedModel  # parameters have no storage, buffers that files lack are there
    origins: Mapping[str, Origin]  # of parameters and stored buffers, by their names in the model
    files: Mapping[str, Path]  # of tensors by their names there
    unused: tuple[str, ...]  # names in the files that the model has no use for
    reader: Callable[[str], Tensor] | None = None  # of values that differ from those in the files

    def read(self, name: str) -> Tensor:
        """Read a parameter or stored buffer."""
        if self.reader is not None:
            return self.reader(name)
        origin, dtype = self.origins[name], self.model.get_parameter_or_buffer(name).dtype
        tensors = []
        for key in origin.keys:
            with safe_open(self.files[key], framework="pt") as file:
                tensors.append(file.get_tensor(key).to(dtype))
        return origin.convert(tensors)

    @property
    def identity(self) -> dict[str, Any]:
        """The configuration; path, size and time of each weight file."""
        files = sorted(self.folder.resolve().glob("*.safetensors"))
        return {
            "config": self.model.config.to_json_string(),
            "dtype": str(self.model.dtype),
            "weights": [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files],
        }

    @contextmanager
    def loaded(self, part: int | str, device: torch.device) -> Iterator[None]:
        """Give a part of the model its values inside, mapped from the files on a CPU.

        It is a layer, by its number; all ``before`` the layers: towers, projector and embeddings;
        the ``norm`` behind them; it and the head, all ``after`` them; or what begins with a name.
        On another device also its buffers are moved, and those of no layer, which any may read.
        """
        parts = Parts(self.model)
        layers, head = f"{parts.family.backbone}.layers.", f"{parts.family.head}."
        norm = f"{parts.family.backbone}.{parts.row.final_norm}."
        known: dict[int | str, tuple[str, ...]] = {"before": (layers, head), "after": (norm, head)}
        begin = {**known, "norm": (norm,)}.get(part)
        begin = begin or (part if isinstance(part, str) else f"{layers}{part}.",)
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        buffers = dict(self.model.named_buffers(remove_duplicate=False))
        own = {n for n in {**parameters, **buffers} if n.startswith(begin) != (part == "before")}
        chosen = [name for name in parameters if name in own]
        elsewhere = [name for name, buffer in buffers.items() if buffer.device.type != device.type]
        moved = [n for n in elsewhere if n in own or not n.startswith(layers)]
        put = partial(set_module_tensor_to_device, clear_cache=False)  # else it waits each time
        try:
            for name in moved:
                put(self.model, name, device)
            for name in chosen:
                put(self.model, name, device, self.read(name))
            yield
        finally:
            for name in chosen:
                put(self.model, name, "meta")
            for name in moved:
                put(self.model, name, "cpu")
            self.model.tie_weights()


def open_checkpoint(
    model: str | Path, dtype: str = "auto", trust_remote_code: bool = False
) -> LazyCheckpoint:
    """Find every weight of a folder or hub id without reading any; refuse missing or other ones."""
    where, config = f"model {str(model)!r}:", models.load_config(model, trust_remote_code)
    models.require_full_precision(config, "scored or pruned with low memory")
    folder = models.folder_of(model)
    files = weight_files(folder)
    keys_of: dict[Path, list[str]] = defaultdict(list)
    for key, path in files.items():
        keys_of[path].append(key)
    shapes: dict[str, list[int]] = {}
    numbers = Counter[str]()  # by data type
    with unreadable(model, "weights"):
        for path, keys in keys_of.items():
            with safe_open(path, framework="pt") as file:
                for key in keys:
                    part = file.get_slice(key)
                    shapes[key] = part.get_shape()
                    numbers[part.get_dtype()] += prod(shapes[key])
    ((most, _),) = numbers.most_common(1)
    if most not in _DTYPES:
        raise ConfigError(f"{where} weights of type {most} cannot be computed with")
    kind = getattr(torch, _DTYPES[most] if dtype == "auto" else dtype)
    with unreadable(model, "config"):
        skeleton = models.empty_model(config, kind, with_buffers=True).requires_grad_(False).eval()
        skeleton.tie_weights()  # parameters without storage are made one by one
    origins = origins_in_files(skeleton, files)
    for name, parameter in skeleton.named_parameters(remove_duplicate=False):
        if name not in origins:
            raise ConfigError(f"{where} weights lack {name!r}")
        keys = list(origins[name].keys)
        told = f"{where} {len(keys)} tensors such as {keys[0]!r} do not fit together"
        with raised_as(ConfigError, RuntimeError, told):
            parts = [torch.empty(shapes[key], device="meta") for key in keys]
            shape = list(origins[name].convert(parts).shape)
        if list(parameter.shape) != shape:
            raise ConfigError(
                f"{where} {keys[0]!r} has shape {shape} but the configuration says "
                f"{list(parameter.shape)}"
            )
    unused = files.keys() - {key for origin in origins.values() for key in origin.keys}
    found = LazyCheckpoint(folder, skeleton, origins, files, tuple(sorted(unused)))
    for buffer in [name for name, _ in skeleton.named_buffers() if name in origins]:
        set_module_tensor_to_device(skeleton, buffer, "cpu", found.read(buffer))
    return found


@dataclass(frozen=True)
class Live:
    """A model that is in memory, with all its weights."""

    model: PreTrainedModel

    def loaded(self, part: int | str, device: torch.device) -> AbstractContextManager[None]:
        """As in `LazyCheckpoint`; all weights are there already."""
        return nullcontext()


Source = Live | LazyCheckpoint


def _named(tensors: dict[str, Tensor], part: Any) -> dict[Any, Any]:
    """Name a tensor among a layer's arguments in their JSON, and put it into ``tensors``."""
    if isinstance(part, Mapping):
        return dict(part)
    if not isinstance(part, Tensor):
        raise UnsupportedModelError(
            f"low memory: decoder layers are called with a {type(part).__name__}, which cannot be "
            "kept"
        )
    known = (name for name, tensor in tensors.items() if tensor is part)
    name = next(known, f"call.{len(tensors):03}")
    tensors[name] = part
    return {"tensor": name}


@dataclass
class LayerwiseModel:
    """A model that runs one layer at a time, over one set of batches that are stored between.

    Hidden states are those of streams, which all begin with the embeddings.
    """

    source: Source
    store: Store  # of the activations between the layers
    device: torch.device
    places: range = field(default=range(0), init=False)  # of the batches
    _own_calls: dict[tuple[str, int], LayerCalls] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.model = self.source.model  # on a source of files, without weights
        parts = Parts(self.model)
        self.layers, self.norm = parts.layers, parts.norm
        self.shares_keys = shares_keys(self.model.config)
        # where each layer runs, and the final norm; several where a model lies on several
        modules = (*self.layers, self.norm)
        own = (next((p.device for p in m.parameters() if not p.is_meta), None) for m in modules)
        self.devices = [device or self.device for device in own]

    def batches(self) -> Iterator[Batch]:
        """Read the place, tokens, labels and padding of each batch."""
        for place in self.places:
            stored = self.store.read("batches", place, self.device, "batch.")
            yield {"place": place, **{n.removeprefix("batch."): v for n, v in stored.items()}}

    @torch.no_grad()
    def embed(self, batches: Iterable[Batch]) -> list[str]:
        """Run everything before the decoder layers for every batch that is not stored yet.

        Layers only record their arguments and return zeros; the input of one after the first is
        then the tensor that the model adds between the two. Returns digests of the batches.
        """
        if self.shares_keys and not (self.store.keeps_objects and isinstance(self.source, Live)):
            raise UnsupportedModelError(
                f"model_type {self.model.config.model_type!r} cannot be run with low memory: its "
                "last layers read keys and values of earlier ones"
            )
        noted: list[tuple[int, Tensor, Arguments]] = []
        digests = list[str]()

        def note(index: int, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            noted.append((index, hidden_states, (args, kwargs)))
            return torch.zeros_like(hidden_states)

        with self.source.loaded("before", self.device), ExitStack() as stack:
            for index, layer in enumerate(self.layers):
                stack.enter_context(replaced_forward(layer, partial(note, index)))
            for place, batch in enumerate(batches):
                digests.append(digest_of_tensors(batch))
                stored = self.store.about("batches", place)
                if stored is None or stored["digest"] != digests[-1]:
                    moved = as_inputs(self.model, batch)
                    noted.clear()
                    forward_backbone(self.model, moved)
                    self._write(place, digests[-1], moved, noted)
        if not digests:
            raise DataError("no calibration batch was given")
        self.places = range(len(digests))
        return digests

    def _write(
        self, place: int, code: str, batch: Batch, noted: list[tuple[int, Tensor, Arguments]]
    ) -> None:
        """Store a batch, and the layers' inputs and arguments that were noted."""
        (_, hidden, _), *later = noted
        tensors = {f"batch.{name}": batch[name] for name in _KEPT if name in batch}
        tensors["batch.attention_mask"] = valid_tokens(batch)
        as_text = partial(json.dumps, default=partial(_named, tensors))
        calls = {str(i): g if self.store.keeps_objects else as_text(g) for i, _, g in noted}
        added = list[int]()
        for i, entering, _ in later:
            rows = entering.flatten(0, -2)
            if len(tokens := rows.any(-1).nonzero()[:, 0]):
                tensors |= {f"added.{i:03}": rows[tokens], f"gets.{i:03}": tokens}
                added.append(i)
        about = {"digest": code, "calls": calls, "added": added}
        self.store.write("batches", place, {**tensors, "hidden": hidden}, about)

    def layers_of(self, place: int) -> set[int]:
        """List the layers that the batch at a place runs through."""
        return set(map(int, self.store.about("batches", place)["calls"]))

    def calls(self, place: int, only: int | None = None) -> LayerCalls:
        """Read the calls of the layers by the batch at a place, or what one layer needs of them."""

        def read(value: Any) -> Any:
            """Read a tensor by its name, or the one that a JSON object names."""
            if isinstance(value, dict) and "tensor" not in value:
                return value
            name = value["tensor"] if isinstance(value, dict) else value
            return self.store.read("batches", place, self.device, name)[name]

        about = self.store.about("batches", place)
        arguments = dict[int, Arguments]()
        for index, given in ((int(number), given) for number, given in about["calls"].items()):
            if only in (None, index):  # as JSON, with lists for tuples, or as it was
                is_json = isinstance(given, str)
                args, named = json.loads(given, object_hook=read) if is_json else given
                arguments[index] = (*args,), named
        added = {
            i: (read(f"added.{i:03}"), read(f"gets.{i:03}"))
            for i in about["added"]
            if only in (None, i - 1)
        }
        return LayerCalls(arguments, added)

    def has(self, stream: str, index: int, places: Iterable[int]) -> bool:
        """Whether the inputs of a layer are stored for all these batches."""
        return all(self.store.about(f"{stream}-{index}", place) is not None for place in places)

    def state(self, stream: str, index: int, place: int) -> Tensor:
        """Input of a layer, or of the final norm."""
        device, name = self.devices[index], f"{stream}-{index}"
        name = name if self.has(stream, index, [place]) else "batches"
        return self.store.read(name, place, device, "hidden")["hidden"]

    def output(self, stream: str, index: int, place: int) -> Tensor:
        """Run a layer on a stream."""
        hidden = self.state(stream, index, place)
        if not self.shares_keys:
            calls = self.calls(place, index)
        elif (stream, place) in self._own_calls:
            calls = self._own_calls[stream, place]
        else:  # layers of Gemma 3n and 4 store keys and values for later layers of their stream
            calls = self.calls(place).with_own_dictionaries()
            self._own_calls[stream, place] = calls
        return calls.after(index, calls.run(self.layers[index], index, hidden))

    def pass_on(self, stream: str, index: int, end: int, places: Iterable[int]) -> None:
        """Run batches through a layer, and store its output as the input of layer ``end``."""
        for place in places:
            output = self.output(stream, index, place)
            require_finite_values(output, f"the output of layer {index}")
            self.store.write(f"{stream}-{end}", place, {"hidden": output})

    @contextmanager
    def layer(self, index: int) -> Iterator[PreTrainedModel]:
        """Inside, the model has one layer, whose weights are there, and runs stored batches.

        Their outputs are stored. Behind the last layer the final norm is called, behind another one
        a module in its place that changes nothing.
        """
        parts, is_last = Parts(self.model), index + 1 == len(self.layers)
        text_model, name = parts.text_model, parts.row.final_norm
        norm = self.norm if is_last else nn.Identity()

        def run(place: int, **batch: Any) -> None:
            calls, hidden = self.calls(place, index), self.state(HIDDEN, index, place)
            output = calls.run(self.layers[index], index, hidden)
            require_finite_values(output, f"the output of layer {index}")
            stored = {"hidden": calls.after(index, output)}
            self.store.write(f"{HIDDEN}-{index + 1}", place, stored)
            norm(output)

        with ExitStack() as stack:
            for part in (index, "norm") if is_last else (index,):
                stack.enter_context(self.source.loaded(part, self.device))
            text_model.layers = nn.ModuleList([self.layers[index]])
            setattr(text_model, name, norm)
            try:
                with replaced_forward(self.model.base_model, run):
                    yield self.model
            finally:
                text_model.layers = self.layers
                setattr(text_model, name, self.norm)
