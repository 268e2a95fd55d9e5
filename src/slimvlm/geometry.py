"""What a model is made of: parts, decoder layers, head geometry, widths, parameter counts.

An `Anatomy` is read off a model's modules, never off its documentation, so that it is right for
pruned models too. A model on the meta device is enough: no weights are needed.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from operator import attrgetter
from typing import Any

from torch import nn

from slimvlm.errors import UnsupportedModelError
from slimvlm.families import BACKBONES, FAMILIES, Backbone, Family, Projection, Stack
from slimvlm.layers import LayerShape as LayerShape
from slimvlm.layers import Matrix as Matrix
from slimvlm.layers import read_layer, unit_matrices


@dataclass(frozen=True)
class Anatomy:
    """Shape and parameter counts of a model.

    Attributes:
        model_type: Configuration type of the whole model.
        text_type: Configuration type of the language backbone.
        hidden_size: Width of the residual stream.
        vocab_size: Rows of the token embedding.
        layers: One shape for each decoder layer.
        embedding_params: Parameters of the token embedding.
        head_params: Parameters of the head; 0 if it shares the embedding's.
        final_norm_params: Parameters of the norm after the last layer.
        vision_params: Parameters of the vision tower without the projector.
        projector_params: Parameters of the projector.
        pinned_layers: Layers that must stay: deepstack features are added to the first ones, or
            later layers read their keys and values.
        other_params: Parameters of the text model that stand beside all of these.
        retypable: Whether a freer configuration type can stand in for ``text_type``.
        fixed_neurons: MLP width that a plain configuration must keep since it also sizes a part
            outside the backbone; None if the width is free.
    """

    model_type: str
    text_type: str
    hidden_size: int
    vocab_size: int
    layers: tuple[LayerShape, ...]
    embedding_params: int
    head_params: int
    final_norm_params: int
    vision_params: int
    projector_params: int
    pinned_layers: tuple[int, ...] = ()
    retypable: bool = False
    fixed_neurons: int | None = None
    other_params: int = 0

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.layers)

    @property
    def backbone_params(self) -> int:
        """Parameters that `ratio` is a share of: layers, final norm, embedding and head.

        And what else belongs to the text model: all but towers and projector.
        """
        shared = self.embedding_params + self.head_params + self.final_norm_params
        return shared + self.other_params + sum(layer.params for layer in self.layers)

    @property
    def total_params(self) -> int:
        """Parameters of the whole model."""
        return self.backbone_params + self.vision_params + self.projector_params

    @property
    def is_uniform(self) -> bool:
        """Whether a plain configuration can say all widths.

        Layers with KV groups must have equally many, layers with neurons likewise.
        """
        return len(self.attention_shapes) <= 1 and len(self.mlp_widths) <= 1

    @property
    def attention_shapes(self) -> list[tuple[int, int, int]]:
        """The different (KV heads, queries per group, head_dim) of layers with KV groups."""
        found = {(s.num_kv_heads, s.queries_per_group, s.head_dim) for s in self.layers}
        return sorted(shape for shape in found if shape[0])

    @property
    def mlp_widths(self) -> list[int]:
        """The different numbers of neurons of layers with neurons, ascending."""
        return sorted({s.intermediate_size for s in self.layers} - {0})

    @property
    def family(self) -> Family:
        """The row of `FAMILIES` that describes the whole model."""
        return FAMILIES[self.model_type]

    @property
    def backbone(self) -> Backbone:
        """The row of `BACKBONES` that describes the decoder layers."""
        return BACKBONES[self.text_type]

    @property
    def why_pinned(self) -> str:
        """Why `pinned_layers` must stay."""
        if self.backbone.shared_tail is None:
            return f"image features are added to the first {len(self.pinned_layers)} layers"
        return "later layers read their keys and values, or they are the last"

    def legal_kv_heads(self) -> list[int]:
        """KV-head counts that the configuration class can write down, ascending.

        Those of the layers that have KV groups; none if no layer has.

        Reference: measured on transformers 5.24; see ``docs/families.md``.
        """
        if not self.attention_shapes:
            return []
        most, queries_per_group, _ = self.attention_shapes[-1]
        if self.backbone.head_rule == "fixed":
            return [most]
        counts = range(1, most + 1)
        if self.backbone.head_rule == "any" or self.retypable:
            return list(counts)
        return [n for n in counts if self.hidden_size % (n * queries_per_group) == 0]

    def legal_neurons(self) -> list[int]:
        """MLP widths that a plain configuration can write down, ascending; none if none can go."""
        if not self.mlp_widths:
            return []
        if self.fixed_neurons is not None:
            return [self.fixed_neurons]
        most, multiple = self.mlp_widths[-1], self.backbone.neuron_multiple
        return sorted({*range(multiple, most + 1, multiple), most})

    def matrices(self, layer: int) -> tuple[Projection, ...]:
        """The matrices of a layer that units own parts of."""
        shape, row = self.layers[layer], self.backbone
        return (
            *(row.attention if shape.num_kv_heads else ()),
            *(row.mlp if shape.intermediate_size else ()),
        )

    def with_layers(self, layers: Sequence[LayerShape]) -> Anatomy:
        """The same model with other decoder layers."""
        return replace(self, layers=tuple(layers))

    def retyped(self) -> Anatomy:
        """The same model with the freer configuration type of its backbone's row."""
        text_type = self.backbone.retype
        assert text_type is not None
        model_type = text_type if self.family.text_config is None else self.model_type
        return replace(self, text_type=text_type, model_type=model_type, retypable=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Anatomy:
        """The inverse of `to_dict`."""
        layers = tuple(LayerShape(**shape) for shape in values["layers"])
        pinned = values["pinned_layers"]
        if isinstance(pinned, int):  # older plans say how many first layers
            pinned = range(pinned)
        return cls(**{**values, "layers": layers, "pinned_layers": tuple(pinned)})


def family_of(model_type: str) -> Family:
    """The family row for a configuration's ``model_type``.

    Raises:
        UnsupportedModelError: If there is none; the message lists the known ones.
    """
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise UnsupportedModelError(
            f"model_type {model_type!r} is not known. Known: {known}. "
            "docs/add-a-family.md shows how to add one"
        )
    return FAMILIES[model_type]


def text_config_of(config: Any) -> Any:
    """The part of a configuration that describes the language backbone."""
    family = family_of(config.model_type)
    return config if family.text_config is None else getattr(config, family.text_config)


def backbone_of(config: Any) -> Backbone:
    """The backbone row for a configuration.

    Raises:
        UnsupportedModelError: If the language model's type has no row.
    """
    text_type = text_config_of(config).model_type
    if text_type not in BACKBONES:
        known = ", ".join(sorted(BACKBONES))
        raise UnsupportedModelError(
            f"language model type {text_type!r} inside {config.model_type!r} is not known. "
            f"Known: {known}. docs/add-a-family.md shows how to add one"
        )
    return BACKBONES[text_type]


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of decoder layers of a model."""
    layers = model.get_submodule(family_of(_config(model).model_type).backbone).layers
    assert isinstance(layers, nn.ModuleList)
    return layers


def final_norm(model: nn.Module) -> nn.Module:
    """The norm after the last decoder layer."""
    config = _config(model)
    text_model = model.get_submodule(family_of(config.model_type).backbone)
    return text_model.get_submodule(backbone_of(config).final_norm)


def matrices(model: nn.Module) -> Iterator[tuple[int, Matrix]]:
    """Every weight matrix that units own parts of, experts' too, with its layer's index."""
    row = backbone_of(_config(model))
    for index, layer in enumerate(decoder_layers(model)):
        for of_unit in unit_matrices(layer, row):
            yield from ((index, matrix) for matrix in of_unit)


def stacks(model: nn.Module) -> Iterator[tuple[Stack, nn.Linear | nn.Embedding]]:
    """The weights outside the layers that hold a slice for each layer."""
    text_model = model.get_submodule(family_of(_config(model).model_type).backbone)
    for stack in backbone_of(_config(model)).layer_stacks:
        module = getattr(text_model, stack.path, None)
        if module is not None:
            yield stack, module


def projections(model: nn.Module) -> Iterator[tuple[int, Projection, nn.Linear]]:
    """The linear modules among `matrices`: (layer index, its row of data, the module)."""
    for index, matrix in matrices(model):
        if isinstance(matrix.owner, nn.Linear):
            yield index, matrix.projection, matrix.owner


def read_anatomy(model: nn.Module) -> Anatomy:
    """Read the shape of a model off its modules.

    Raises:
        UnsupportedModelError: If no family row matches.
    """
    config = _config(model)
    family, backbone = family_of(config.model_type), backbone_of(config)
    text_config = text_config_of(config)
    text_model = model.get_submodule(family.backbone)
    embedding = _by_id(text_model.get_submodule("embed_tokens").parameters())
    head = _by_id(model.get_submodule(family.head).parameters())
    norm = _by_id(final_norm(model).parameters())
    projector = _by_id(p for path in family.projector for p in _parameters(model, path))
    towers = _by_id(p for path in family.towers for p in _parameters(model, path))
    stacked = _by_id(p for _, module in stacks(model) for p in module.parameters())
    inside = _by_id(decoder_layers(model).parameters())
    listed = embedding | head | norm | projector | towers | stacked | inside
    slices = _count(stacked) // len(decoder_layers(model))
    shapes = [read_layer(layer, backbone) for layer in decoder_layers(model)]
    return Anatomy(
        model_type=config.model_type,
        text_type=text_config.model_type,
        hidden_size=text_config.hidden_size,
        vocab_size=text_config.vocab_size,
        layers=tuple(replace(s, fixed_params=s.fixed_params + slices) for s in shapes),
        embedding_params=_count(embedding),
        head_params=_count(head, embedding),
        final_norm_params=_count(norm),
        vision_params=_count(towers, projector),
        projector_params=_count(projector),
        pinned_layers=_pinned_layers(config, family, backbone),
        retypable=_retypable(text_config, backbone),
        fixed_neurons=(
            getattr(text_config, backbone.neuron_field) if family.fixed_neurons else None
        ),
        other_params=_count(_by_id(text_model.parameters()), listed),
    )


def _config(model: nn.Module) -> Any:
    return model.config


def _by_id(parameters: Iterable[nn.Parameter]) -> dict[int, nn.Parameter]:
    return {id(parameter): parameter for parameter in parameters}


def _count(parameters: dict[int, nn.Parameter], without: Container[int] = ()) -> int:
    return sum(p.numel() for name, p in parameters.items() if name not in without)


def _parameters(model: nn.Module, path: str) -> list[nn.Parameter]:
    """Parameters below a path, which may itself be a parameter or absent in this model."""
    parent, _, name = path.rpartition(".")
    part = getattr(model.get_submodule(parent), name, None)
    if isinstance(part, nn.Parameter):
        return [part]
    return list(part.parameters()) if isinstance(part, nn.Module) else []


def _pinned_layers(config: Any, family: Family, backbone: Backbone) -> tuple[int, ...]:
    if backbone.shared_tail is not None:
        return _read_by_others(text_config_of(config), backbone.shared_tail)
    if family.pinned_layers is None:
        return ()
    return tuple(range(len(attrgetter(family.pinned_layers)(config))))


def _read_by_others(text_config: Any, shared_tail: str) -> tuple[int, ...]:
    """The layers whose keys and values the last ones read, and the last one."""
    count, shared = text_config.num_hidden_layers, getattr(text_config, shared_tail)
    writers = {kind: i for i, kind in enumerate(text_config.layer_types[: count - shared])}
    return tuple(sorted({*(writers.values() if shared else ()), count - 1}))


def _retypable(text_config: Any, backbone: Backbone) -> bool:
    required = backbone.retype_requires.items()
    return backbone.retype is not None and all(getattr(text_config, k) == v for k, v in required)
