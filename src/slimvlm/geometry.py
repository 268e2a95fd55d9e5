"""What a model is made of: parts, decoder layers, head geometry, widths, parameter counts.

An `Anatomy` is read off a model's modules, never off its documentation, so that it is right for
pruned models too. A model on the meta device is enough: no weights are needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from slimvlm.errors import UnsupportedModelError
from slimvlm.families import (
    BACKBONES,
    FAMILIES,
    INPUT_COLUMNS,
    OUTPUT_ROWS,
    Backbone,
    Family,
    Projection,
    Segment,
)


@dataclass(frozen=True)
class LayerShape:
    """The geometry of one decoder layer and what its units weigh.

    Attributes:
        num_kv_heads: KV groups in the layer (heads, for multi-head attention).
        queries_per_group: Query heads that share one KV head.
        head_dim: Channels of a head.
        intermediate_size: MLP neurons.
        kv_group_params: Parameters of one KV group (its q, k, v rows and biases, o columns).
        neuron_params: Parameters of one neuron (gate and up rows and biases, down column).
        fixed_params: Parameters that no unit owns (norms, output biases).
    """

    num_kv_heads: int
    queries_per_group: int
    head_dim: int
    intermediate_size: int
    kv_group_params: int
    neuron_params: int
    fixed_params: int

    @property
    def num_heads(self) -> int:
        """Query heads."""
        return self.num_kv_heads * self.queries_per_group

    @property
    def params(self) -> int:
        """Parameters of the whole layer."""
        return (
            self.fixed_params
            + self.num_kv_heads * self.kv_group_params
            + self.intermediate_size * self.neuron_params
        )

    def block(self, segment: Segment) -> tuple[int, int]:
        """Number of units along a segment and the channels that each takes there."""
        if segment == "neuron":
            return self.intermediate_size, 1
        heads = self.queries_per_group if segment == "query" else 1
        return self.num_kv_heads, heads * self.head_dim


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
        pinned_layers: First layers that must stay (deepstack features are added to them).
        retypable: Whether a freer configuration type can stand in for ``text_type``.
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
    pinned_layers: int = 0
    retypable: bool = False

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.layers)

    @property
    def backbone_params(self) -> int:
        """Parameters that `ratio` is a share of: layers, final norm, embedding and head."""
        shared = self.embedding_params + self.head_params + self.final_norm_params
        return shared + sum(layer.params for layer in self.layers)

    @property
    def total_params(self) -> int:
        """Parameters of the whole model."""
        return self.backbone_params + self.vision_params + self.projector_params

    @property
    def is_uniform(self) -> bool:
        """Whether all layers have the same widths, as a plain configuration requires."""
        return len(set(self.layers)) <= 1

    @property
    def family(self) -> Family:
        """The row of `FAMILIES` that describes the whole model."""
        return FAMILIES[self.model_type]

    @property
    def backbone(self) -> Backbone:
        """The row of `BACKBONES` that describes the decoder layers."""
        return BACKBONES[self.text_type]

    def legal_kv_heads(self) -> list[int]:
        """KV-head counts that the configuration class can write down, ascending.

        Reference: measured on transformers 5.24; see ``docs/families.md``.
        """
        shape = self.layers[0]
        if self.backbone.head_rule == "fixed":
            return [shape.num_kv_heads]
        counts = range(1, shape.num_kv_heads + 1)
        if self.backbone.head_rule == "any" or self.retypable:
            return list(counts)
        return [n for n in counts if self.hidden_size % (n * shape.queries_per_group) == 0]

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
        return cls(**{**values, "layers": layers})


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


def projections(model: nn.Module) -> Iterator[tuple[int, Projection, nn.Linear]]:
    """Every weight matrix that units own: (layer index, its row of data, the module)."""
    row = backbone_of(_config(model))
    for index, layer in enumerate(decoder_layers(model)):
        for projection in (*row.attention, *row.mlp):
            linear = layer.get_submodule(projection.path)
            assert isinstance(linear, nn.Linear)
            yield index, projection, linear


def read_anatomy(model: nn.Module) -> Anatomy:
    """Read the shape of a model off its modules.

    Raises:
        UnsupportedModelError: If no family row matches.
    """
    config = _config(model)
    family, backbone = family_of(config.model_type), backbone_of(config)
    text_config = text_config_of(config)
    text_model = model.get_submodule(family.backbone)
    embedding = text_model.get_submodule("embed_tokens")
    projector = {id(p) for path in family.projector for p in _parameters(model, path)}
    vision = _parameters(model, family.vision) if family.vision else []
    head = model.get_submodule(family.head)
    embedding_ids = {id(p) for p in embedding.parameters()}
    return Anatomy(
        model_type=config.model_type,
        text_type=text_config.model_type,
        hidden_size=text_config.hidden_size,
        vocab_size=text_config.vocab_size,
        layers=tuple(_read_layer(layer, backbone) for layer in decoder_layers(model)),
        embedding_params=_count(embedding.parameters()),
        head_params=_count(p for p in head.parameters() if id(p) not in embedding_ids),
        final_norm_params=_count(text_model.get_submodule(backbone.final_norm).parameters()),
        vision_params=_count(p for p in vision if id(p) not in projector),
        projector_params=_count(p for path in family.projector for p in _parameters(model, path)),
        pinned_layers=_pinned_layers(config, family),
        retypable=_retypable(text_config, backbone),
    )


def _config(model: nn.Module) -> Any:
    return model.config


def _count(parameters: Any) -> int:
    return sum(p.numel() for p in parameters)


def _parameters(model: nn.Module, path: str) -> list[nn.Parameter]:
    """Parameters below a path, which may itself be a parameter or absent in this model."""
    parent, _, name = path.rpartition(".")
    part = getattr(model.get_submodule(parent), name, None)
    if isinstance(part, nn.Parameter):
        return [part]
    return list(part.parameters()) if isinstance(part, nn.Module) else []


def _pinned_layers(config: Any, family: Family) -> int:
    if family.pinned_layers is None:
        return 0
    value = config
    for name in family.pinned_layers.split("."):
        value = getattr(value, name)
    return len(value)


def _retypable(text_config: Any, backbone: Backbone) -> bool:
    required = backbone.retype_requires.items()
    return backbone.retype is not None and all(getattr(text_config, k) == v for k, v in required)


def _read_layer(layer: nn.Module, backbone: Backbone) -> LayerShape:
    """Shapes give the head counts, so that they are right whatever the configuration says."""
    head_dim = int(layer.get_submodule("self_attn").head_dim)  # type: ignore[arg-type]
    heads = kv_heads = query_rows = kv_rows = neurons = 0
    for projection in backbone.attention:
        linear = layer.get_submodule(projection.path)
        assert isinstance(linear, nn.Linear)
        if projection.dim == INPUT_COLUMNS:
            heads = linear.in_features // head_dim
        else:
            query_rows += linear.out_features
            kv_rows += projection.segments.count("key_value")
    num_queries = sum(p.segments.count("query") for p in backbone.attention if p.dim == OUTPUT_ROWS)
    kv_heads = (query_rows // head_dim - num_queries * heads) // kv_rows
    for projection in backbone.mlp:
        linear = layer.get_submodule(projection.path)
        assert isinstance(linear, nn.Linear)
        if projection.dim == INPUT_COLUMNS:
            neurons = linear.in_features
    shape = LayerShape(kv_heads, heads // kv_heads, head_dim, neurons, 0, 0, 0)
    kv_group_params = _unit_params(layer, backbone.attention, shape)
    neuron_params = _unit_params(layer, backbone.mlp, shape)
    owned = kv_heads * kv_group_params + neurons * neuron_params
    return replace(
        shape,
        kv_group_params=kv_group_params,
        neuron_params=neuron_params,
        fixed_params=_count(layer.parameters()) - owned,
    )


def _unit_params(
    layer: nn.Module, unit_projections: tuple[Projection, ...], shape: LayerShape
) -> int:
    """Parameters of one unit over all matrices it owns a part of."""
    total = 0
    for projection in unit_projections:
        linear = layer.get_submodule(projection.path)
        assert isinstance(linear, nn.Linear)
        channels = sum(shape.block(segment)[1] for segment in projection.segments)
        across = linear.weight.shape[1 - projection.dim]
        has_bias = projection.dim == OUTPUT_ROWS and linear.bias is not None
        total += channels * (across + has_bias)
    return total
