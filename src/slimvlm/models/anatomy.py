"""Read a model's layers, head geometry, widths and parameter counts.

An `Anatomy` is read off a model's modules and so also right for pruned models. A model on the meta
device will do.

Only this module turns head geometry into indices. Along its divided dimension a projection is a row
of segments (`slimvlm.models.families.Projection`). In a segment, unit ``u`` owns the channels
``u * width ... (u + 1) * width - 1``: for queries of a grouped-attention model these are the
``queries_per_group`` heads that read KV head ``u``.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Annotated, Any

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from slimvlm.core.documents import Count, Width
from slimvlm.models import families
from slimvlm.models.families import INPUT_COLUMNS, OUTPUT_ROWS, Backbone, Projection, Segment
from slimvlm.models.parts import (
    Matrix,
    Parts,
    family_of,
    layer_matrices,
    parameters_below,
    part_at,
    tower_path,
)

WIDTH_UNITS = ("kv_group", "neuron")  # kinds of unit that pruning in width removes
LAYER_UNITS = (*WIDTH_UNITS, "expert")  # kinds of unit that a layer has several of
FULL_ATTENTION = "full_attention"


@dataclass(frozen=True)
class LayerShape:
    """Geometry of one decoder layer and parameter counts of its units."""

    # KV groups (heads, for multi-head attention); 0 if its token mixer has none
    num_kv_heads: Width
    queries_per_group: Width  # query heads that share one KV head
    head_dim: Width  # channels of a head
    # MLP neurons, with experts those of one; 0 if none of its neurons can be removed
    intermediate_size: Width
    kv_group_params: Count  # parameters of one KV group (its q, k, v rows and biases, o columns)
    neuron_params: Count  # parameters of one neuron (gate and up rows and biases, down column)
    fixed_params: Count  # parameters that no unit owns, such as norms and output biases
    num_experts: Width = 0  # experts of which each token takes a few; 0 if none can be removed
    # the part of ``neuron_params`` in one expert; 0 without experts
    expert_neuron_params: Count = 0
    # parameters of one expert that no neuron owns, such as the router's row
    expert_fixed_params: Count = 0
    # the part of ``fixed_params`` that one token has in the layer's own embedding
    token_params: Count = 0
    # how it mixes tokens: ``full_attention``, ``sliding_attention``, ``cross_attention``, ...
    kind: str = FULL_ATTENTION
    window: Count = 0  # positions that a token attends to at most; 0 without a limit
    # the part of ``fixed_params`` that multiplies every token: matrices without units
    fixed_weights: Count = 0
    # channels of keys and values that attention without units adds to the cache for a token
    fixed_cache: Count = 0

    @property
    def num_heads(self) -> int:
        """Query heads."""
        return self.num_kv_heads * self.queries_per_group

    @property
    def params(self) -> int:
        """Parameters of the whole layer."""
        groups = self.num_kv_heads * self.kv_group_params
        neurons = self.intermediate_size * self.neuron_params
        return self.fixed_params + groups + neurons + self.num_experts * self.expert_fixed_params

    @property
    def expert_params(self) -> int:
        """Parameters of one expert."""
        return self.intermediate_size * self.expert_neuron_params + self.expert_fixed_params

    def units(self, unit: str) -> int:
        """Count the units of a kind (``kv_group``, ``neuron`` or ``expert``)."""
        neurons, experts = self.intermediate_size, self.num_experts
        return {"kv_group": self.num_kv_heads, "neuron": neurons, "expert": experts}[unit]

    def with_units(self, kv_groups: int, neurons: int, experts: int) -> "LayerShape":
        """Return the layer with other numbers of units; a neuron is smaller with fewer experts."""
        removed = (self.num_experts - experts) * self.expert_neuron_params
        widths: dict[str, Any] = {"num_kv_heads": kv_groups, "intermediate_size": neurons}
        neuron_params = self.neuron_params - removed
        return replace(self, **widths, num_experts=experts, neuron_params=neuron_params)

    def block(self, segment: Segment) -> tuple[int, int]:
        """Return the number of units along a segment and the channels of each."""
        if segment in ("neuron", "expert"):
            return self.units(segment), 1
        queries = self.queries_per_group
        heads = {"query": queries, "query_and_gate": 2 * queries, "key_value": 1}[segment]
        return self.num_kv_heads, heads * self.head_dim


def read_layer(layer: nn.Module, backbone: Backbone) -> LayerShape:
    """Read the shape of a decoder layer off its weights, not its configuration."""
    attention, mlp, entries = layer_matrices(layer, backbone)
    kv_heads, queries_per_group, head_dim = 0, 0, 0
    if attention:
        head_dim = int(layer.get_submodule("self_attn").head_dim)  # type: ignore[arg-type]
        heads = next(m.width // head_dim for m in attention if m.projection.dim == INPUT_COLUMNS)
        producers = [m for m in attention if m.projection.dim == OUTPUT_ROWS]
        segments = [segment for m in producers for segment in m.projection.segments]
        query_heads = (segments.count("query") + 2 * segments.count("query_and_gate")) * heads
        rows = sum(m.width for m in producers) // head_dim
        kv_heads = (rows - query_heads) // segments.count("key_value")
        queries_per_group = heads // kv_heads
    neurons = next((m.width for m in mlp if m.projection.dim == INPUT_COLUMNS), 0)
    experts = entries[0].width if entries else 0
    kv_group_params, neuron_params = _of_unit(attention, kv_heads), _of_unit(mlp, neurons)
    of_experts = _of_unit([m for m in mlp if m.is_of_experts], neurons * experts)
    expert_fixed_params = _of_unit(entries, experts) - neurons * of_experts
    owned = kv_heads * kv_group_params + neurons * neuron_params + experts * expert_fixed_params
    of_units = {id(matrix.weight) for matrix in (*attention, *mlp, *entries)}
    fixed_weights = sum(
        module.weight.numel()
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear) and id(module.weight) not in of_units
        if not name.startswith("cross_attn.")  # whose keys are of images
    )
    own = None if attention else getattr(layer, "self_attn", None)
    keys: Any = getattr(own, "k_proj", None)  # none where it reads those of an earlier layer
    return LayerShape(
        num_kv_heads=kv_heads,
        queries_per_group=queries_per_group,
        head_dim=head_dim,
        intermediate_size=neurons,
        kv_group_params=kv_group_params,
        neuron_params=neuron_params,
        fixed_params=sum(p.numel() for p in layer.parameters()) - owned,
        num_experts=experts,
        expert_neuron_params=of_experts,
        expert_fixed_params=expert_fixed_params,
        fixed_weights=fixed_weights,
        fixed_cache=2 * keys.out_features if isinstance(keys, nn.Linear) else 0,
    )


def _of_unit(matrices: Sequence[Matrix], units: int) -> int:
    """Count the parameters of one of the units that own some matrices, and their rows' biases."""
    owned = [matrix.weight.numel() for matrix in matrices]
    rows = (matrix for matrix in matrices if matrix.projection.dim == OUTPUT_ROWS)
    owned += [matrix.bias.numel() for matrix in rows if matrix.bias is not None]
    return sum(owned) // max(units, 1)


@dataclass(frozen=True)
class Anatomy:
    """Shape and parameter counts of a model."""

    model_type: str  # of the configuration of the whole model
    text_type: str  # of the configuration of the language backbone
    hidden_size: Width  # of the residual stream
    vocab_size: Count  # rows of the token embedding
    layers: tuple[LayerShape, ...]
    embedding_params: Annotated[Count, Field(ge=1)]
    head_params: Count  # 0 if it shares the embedding's
    final_norm_params: Count
    vision_params: Count  # of towers, without the projector
    projector_params: Count
    pinned_layers: tuple[Width, ...] = ()  # that must stay, as `why_pinned` says
    retypable: bool = False  # whether a freer configuration type can stand in for ``text_type``
    # MLP width that also sizes a part outside the backbone; None if it is free
    fixed_neurons: Width | None = None
    other_params: Count = 0  # all others of the text model
    experts_per_token: Count = 0  # that each token takes, of layers that have some: so many stay
    # products of queries and keys are divided by its root; 0 where it is ``head_dim``
    query_scalar: float = 0.0
    # The vision tower, whose units are neurons and layers; its other parameters are
    # ``embedding_params``. None without one, or where its layers are not known.
    tower: "Anatomy | None" = None
    unread: Width = 0  # last layers of a tower whose outputs nobody reads
    # the part of a tower's ``embedding_params`` that goes with each neuron of all layers
    head_neuron_params: Count = 0

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.layers)

    @property
    def backbone_params(self) -> int:
        """Parameters that `ratio` is a share of: all but towers and projector."""
        shared = self.embedding_params + self.head_params + self.final_norm_params
        return shared + self.other_params + sum(layer.params for layer in self.layers)

    @property
    def total_params(self) -> int:
        """Parameters of the whole model."""
        return self.backbone_params + self.vision_params + self.projector_params

    @property
    def params(self) -> int:
        """The same, of a tower on its own."""
        return self.total_params

    @property
    def is_uniform(self) -> bool:
        """Whether all layers with KV groups have equally many, and so with neurons and experts."""
        kinds = (self.attention_shapes, self.mlp_widths, self.expert_counts)
        return all(len(found) <= 1 for found in kinds)

    @property
    def kinds(self) -> Counter[str]:
        """How many layers mix tokens in each way (`LayerShape.kind`)."""
        return Counter(layer.kind for layer in self.layers)

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
    def expert_counts(self) -> list[int]:
        """The different numbers of experts of layers with experts, ascending."""
        return sorted({s.num_experts for s in self.layers} - {0})

    @property
    def expert_share(self) -> float:
        """Share of the backbone that is experts which can be removed; ``recipes.yaml`` shows it."""
        return sum(s.num_experts * s.expert_params for s in self.layers) / self.backbone_params

    @property
    def family(self) -> families.Family:
        """The row of `FAMILIES` that describes the whole model."""
        return family_of(self.model_type)

    @property
    def backbone(self) -> Backbone:
        """The row of `BACKBONES` that describes the decoder layers."""
        row = families.backbone_row(self.text_type)
        assert row is not None
        return row

    @property
    def why_pinned(self) -> str:
        """Why `pinned_layers` must stay."""
        if self.model_type in families.TOWERS:
            return "the language model reads their outputs"
        if self.backbone.shared_tail is None:
            return f"image features are added to the first {len(self.pinned_layers)} layers"
        return "later layers read their keys and values, or they are the last"

    @property
    def token_params(self) -> int:
        """Parameters of one token: its rows of embeddings and of an untied head, and its bias."""
        of_layers = sum(shape.token_params for shape in self.layers)
        return (self.embedding_params + self.head_params) // self.vocab_size + of_layers

    @property
    def why_tokens_stay(self) -> str | None:
        """Why no token can be removed; None if some can."""
        rows = self.vocab_size
        of_head = (0, rows, rows * self.hidden_size, rows * (self.hidden_size + 1))
        stacks = self.backbone.layer_stacks
        if stacks and not any(stack.rows for stack in stacks):
            return "its layers have embeddings of their own"
        if self.embedding_params != rows * self.hidden_size or self.head_params not in of_head:
            return "its embedding or head has other rows than its vocabulary has tokens"
        return None

    def legal_kv_heads(self) -> list[int]:
        """List KV-head counts that the configuration class can express (``docs/families.md``)."""
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
        """List MLP widths that a plain configuration can express, ascending."""
        if not self.mlp_widths:
            return []
        if self.fixed_neurons is not None:
            return [self.fixed_neurons]
        most, multiple = self.mlp_widths[-1], self.backbone.neuron_multiple
        return sorted({*range(multiple, most + 1, multiple), most})

    def matrices(self, layer: int) -> tuple[Projection, ...]:
        """Return the matrices of a layer that units own parts of."""
        shape, row = self.layers[layer], self.backbone
        attention = row.attention if shape.num_kv_heads else ()
        return (*attention, *(row.mlp if shape.intermediate_size else ()))

    def with_tokens(self, count: int) -> "Anatomy":
        """Return the anatomy with another number of tokens."""
        removed = self.vocab_size - count
        return replace(
            self,
            layers=tuple(
                replace(s, fixed_params=s.fixed_params - removed * s.token_params)
                for s in self.layers
            ),
            vocab_size=count,
            embedding_params=self.embedding_params // self.vocab_size * count,
            head_params=self.head_params // self.vocab_size * count,
        )

    def with_layers(self, layers: Sequence[LayerShape]) -> "Anatomy":
        """Return the anatomy with other decoder layers."""
        return replace(self, layers=tuple(layers))

    def retyped(self) -> "Anatomy":
        """Return the anatomy with the freer configuration type of its backbone's row."""
        text_type = self.backbone.retype
        assert text_type is not None
        model_type = text_type if self.family.text_config is None else self.model_type
        return replace(self, text_type=text_type, model_type=model_type, retypable=False)


def read_anatomy(model: nn.Module) -> Anatomy:
    """Read the shape of a model off its modules; raise `UnsupportedModelError` without a row.

    A vision tower on its own is read, too.
    """
    parts = Parts(model)
    config: Any = model.config
    if config.model_type in families.TOWERS:
        return _shape_of_tower(model, config, [len(parts.layers)])
    family, row, text_config = parts.family, parts.row, parts.text_config

    def count(parameters: set[nn.Parameter]) -> int:
        return sum(parameter.numel() for parameter in parameters)

    embedding = set(parts.text_model.get_submodule("embed_tokens").parameters())
    head, norm = set(parts.head.parameters()), set(parts.norm.parameters())
    projector = {p for path in family.projector for p in parameters_below(model, path)}
    towers = {p for path in family.towers for p in parameters_below(model, path)}
    stacked = {p for _, module in parts.stacks() for p in module.parameters()}
    listed = {*embedding, *head, *norm, *projector, *towers, *stacked, *parts.layers.parameters()}
    shapes = [read_layer(layer, row) for layer in parts.layers]
    slices = count(stacked) // len(shapes)
    in_layers = sum(
        module.weight.shape[stack.dim] // len(shapes)
        for stack, module in parts.stacks()
        if stack.rows
    )
    mixers = _mixers(text_config)
    if len(mixers) != len(shapes):  # a view of some layers, and nothing says which
        mixers = [{}] * len(shapes)
    experts = row.experts if any(shape.num_experts for shape in shapes) else None
    return Anatomy(
        model_type=config.model_type,
        text_type=text_config.model_type,
        hidden_size=text_config.hidden_size,
        vocab_size=text_config.vocab_size,
        layers=tuple(
            replace(s, fixed_params=s.fixed_params + slices, token_params=in_layers, **mixer)
            for s, mixer in zip(shapes, mixers, strict=True)
        ),
        embedding_params=count(embedding),
        head_params=count(head - embedding),
        final_norm_params=count(norm),
        vision_params=count(towers - projector),
        projector_params=count(projector),
        pinned_layers=_pinned_layers(config, parts),
        retypable=row.retype is not None
        and all(getattr(text_config, name) == v for name, v in row.retype_requires.items()),
        fixed_neurons=getattr(text_config, row.neuron_field) if family.fixed_neurons else None,
        other_params=count(set(parts.text_model.parameters()) - listed),
        experts_per_token=0 if experts is None else getattr(text_config, experts.taken_field),
        query_scalar=getattr(text_config, "query_pre_attn_scalar", None) or 0.0,
        tower=_read_tower(model, projector),
    )


def _read_tower(model: nn.Module, projector: set[nn.Parameter]) -> Anatomy | None:
    """Read the shape of a model's vision tower; unread are the layers behind all read ones."""
    config: Any = model.config
    if (path := tower_path(config)) is None:
        return None
    row, tower = families.TOWERS[config.vision_config.model_type], model.get_submodule(path)
    depth = len(getattr(tower.get_submodule(row.inside), row.layers))
    return _shape_of_tower(tower, config.vision_config, read_states(config, depth), projector)


def _shape_of_tower(
    tower: nn.Module,
    described: Any,
    reads: Sequence[int],
    projector: Collection[nn.Parameter] = (),
) -> Anatomy:
    """Read the shape of a tower, some of whose hidden states are read (`read_states`)."""
    row = families.TOWERS[described.model_type]
    layers = getattr(tower.get_submodule(row.inside), row.layers)
    shapes = [read_layer(layer, row) for layer in layers]
    others = {*tower.parameters()} - set(layers.parameters()) - {*projector}
    rest = sum(parameter.numel() for parameter in others)
    (last,) = (p for p in row.mlp if p.dim == INPUT_COLUMNS)
    of_head = [
        Matrix(part, "weight", projection)
        for projection in row.of_same_width
        if isinstance(part := part_at(tower, projection.path), nn.Linear)
    ]
    listed = [number for name in row.layer_indices for number in getattr(described, name, ())]
    pinned = {state - 1 for state in reads if 0 < state < max(reads)}
    if "fullatt_block_indexes" in row.layer_indices:
        side = described.window_size // described.patch_size
        for index, shape in enumerate(shapes):
            if index not in listed:
                shapes[index] = replace(shape, kind="window_attention", window=side * side)
    else:
        pinned |= {*listed}
    return Anatomy(
        model_type=described.model_type,
        text_type=described.model_type,
        hidden_size=layers[0].get_submodule(last.path).out_features,
        vocab_size=1,
        layers=tuple(shapes),
        embedding_params=max(rest, 1),
        head_params=0,
        final_norm_params=0,
        vision_params=0,
        projector_params=0,
        pinned_layers=tuple(sorted(pinned)),
        unread=len(shapes) - max(reads),
        head_neuron_params=_of_unit(of_head, shapes[0].intermediate_size),
    )


def read_states(config: Any, depth: int) -> list[int]:
    """List the hidden states of a tower that are read: 0 is that before its first layer."""
    row, found = families.TOWERS[config.vision_config.model_type], config
    for name in row.reads.split("."):
        found = getattr(found, name, None)
    if found is None:
        return [depth]
    numbers = found if isinstance(found, list | tuple) else [found]
    return [number + (depth + 1 if number < 0 else row.first_state) for number in numbers]


def _pinned_layers(config: Any, parts: Parts) -> tuple[int, ...]:
    """List the layers that must stay: others read them, or image features are added to them."""
    text_config, shared_tail = parts.text_config, parts.row.shared_tail
    if shared_tail is not None:
        # layers whose keys and values the last ones read, and the last one
        num_layers, shared = text_config.num_hidden_layers, getattr(text_config, shared_tail)
        own = text_config.layer_types[: num_layers - shared]
        writers = {kind: index for index, kind in enumerate(own)} if shared else {}
        return tuple(sorted({*writers.values(), num_layers - 1}))
    path = parts.family.pinned_layers
    return () if path is None else tuple(range(len(attrgetter(path)(config))))


def _mixers(config: Any) -> list[dict[str, Any]]:
    """List how each layer mixes tokens, and its window, by the language model's configuration."""
    sliding = getattr(config, "sliding_window", None) or 0
    chunk = getattr(config, "attention_chunk_size", None) or 0
    windows = {"sliding_attention": sliding, "chunked_attention": chunk}
    every = "sliding_attention" if sliding else FULL_ATTENTION
    kinds = list(getattr(config, "layer_types", None) or [every] * config.num_hidden_layers)
    for index in getattr(config, "cross_attention_layers", None) or ():
        kinds[index] = "cross_attention"
    return [{"kind": kind, "window": windows.get(kind, 0)} for kind in kinds]


def unit_of(projection: Projection) -> str:
    """Whether a projection's channels belong to neurons, to experts or to KV groups."""
    segment = projection.segments[0]
    return segment if segment in ("neuron", "expert") else "kv_group"


def segments(projection: Projection, shape: LayerShape) -> Iterator[tuple[Segment, int, int, int]]:
    """Yield the segments of a projection: (name, offset, number of units, channels of a unit)."""
    offset = 0
    for segment in projection.segments:
        units, width = shape.block(segment)
        yield segment, offset, units, width
        offset += units * width


def channels_of(
    projection: Projection, shape: LayerShape, units: Sequence[int]
) -> Int[Tensor, " channel"]:
    """List the channels of sorted units in storage order, by the layer's shape before pruning."""
    index = torch.tensor(units, dtype=torch.long)
    by_segment = [
        (offset + index[:, None] * width + torch.arange(width)).flatten()
        for _, offset, _, width in segments(projection, shape)
    ]
    return torch.cat(by_segment)


def fold(
    projection: Projection, shape: LayerShape, channel_values: Float[Tensor, " channel"]
) -> list[Float[Tensor, " unit"]]:
    """Sum a value per channel into a value per unit, one tensor for each segment."""
    return [
        channel_values[offset : offset + units * width].view(units, width).sum(1)
        for _, offset, units, width in segments(projection, shape)
    ]


def spread(
    projection: Projection, shape: LayerShape, unit_values: Float[Tensor, "*batch unit"]
) -> Float[Tensor, "*batch channel"]:
    """Repeat a value per unit over the unit's channels: the transpose of `fold`."""
    widths = [width for *_, width in segments(projection, shape)]
    return torch.cat([unit_values.repeat_interleave(width, dim=-1) for width in widths], dim=-1)
