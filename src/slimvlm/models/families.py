"""Read ``families.yaml``: `BACKBONES` (decoders), `TOWERS`, `FAMILIES` (whole models)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, TypeAdapter

from slimvlm.core.tables import read_table

Segment = Literal["query", "query_and_gate", "key_value", "neuron", "expert"]

OUTPUT_ROWS = 0
INPUT_COLUMNS = 1
ENTRIES = 2


@dataclass(frozen=True)
class Projection:
    """A weight matrix of a decoder layer, part of which belongs to units."""

    # Below the layer: a linear module, or a parameter ``[E, O, C]`` that holds a matrix for each of
    # ``E`` experts. A neuron then is a channel of every expert.
    path: str
    # The dimension that units divide: `OUTPUT_ROWS` or `INPUT_COLUMNS`; `ENTRIES` for the first one
    # of whatever has an entry for each expert.
    dim: int
    # The blocks along it, in order: ``query`` has one of ``head_dim`` for each query head,
    # ``query_and_gate`` two for each (the second switches the head's output), ``key_value`` one for
    # each KV head, ``neuron`` and ``expert`` one channel for each. Fused matrices have several.
    segments: tuple[Segment, ...]
    transposed: bool = False  # whether it is stored with inputs first, ``[E, C, O]``

    @property
    def axis(self) -> int:
        """The divided dimension of the stored tensor: counted from its end, or 0 for `ENTRIES`."""
        if self.dim == ENTRIES:
            return 0
        is_rows = (self.dim == OUTPUT_ROWS) != self.transposed
        return -2 if is_rows else -1


def _matrices(rows: Mapping[str, str]) -> tuple[Projection, ...]:
    """Read matrices of units: ``PATH: DIM SEGMENT ... [transposed]``."""
    found = []
    for path, text in rows.items():
        dim, *segments = text.split()
        is_transposed = segments[-1] == "transposed"
        blocks: Any = tuple(segments[: len(segments) - is_transposed])
        found.append(Projection(path, _DIMS[dim], blocks, is_transposed))
    return tuple(found)


def _entries(paths: Sequence[str]) -> tuple[Projection, ...]:
    return tuple(Projection(path, ENTRIES, ("expert",)) for path in paths)


_DIMS = {"rows": OUTPUT_ROWS, "columns": INPUT_COLUMNS}
_Matrices = Annotated[tuple[Projection, ...], BeforeValidator(_matrices)]


@dataclass(frozen=True)
class Experts:
    """The experts of a layer, of which a router gives each token a few."""

    module: str  # path, below the layer, of the module that runs them
    # with an entry for each expert first: weights, router's rows
    entries: Annotated[tuple[Projection, ...], BeforeValidator(_entries)]
    count_field: str = "num_experts"  # of the configuration
    taken_field: str = "num_experts_per_tok"  # of the configuration: how many each token takes
    transposed: bool = False  # whether matrices are stored with inputs first, ``[E, C, O]``


@dataclass(frozen=True)
class Stack:
    """A weight of the text model that holds an equal slice for each layer, one after another."""

    path: str  # of its module below the text model, which need not have it
    # that layers divide: `OUTPUT_ROWS` or `INPUT_COLUMNS`
    dim: Annotated[int, BeforeValidator(_DIMS.get)]
    # Configuration field with the number of tokens that have a row each; None if they have none, or
    # rows that do not go with those of the embedding.
    rows: str | None = None


_TABLES = read_table(__file__, "families.yaml")
_USUAL = [_matrices(_TABLES["matrices"][name][0]) for name in ("attention", "mlp")]


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """How the decoder layers of one text model type are built and configured.

    A layer has all matrices of ``attention`` or none (linear attention, convolution), all of
    ``mlp`` or none (a dense layer between layers of experts), and likewise of ``experts``. Matrices
    that are not listed stay as they are. The defaults are Mistral's.
    """

    # The matrix with `INPUT_COLUMNS` writes to the residual stream. Empty if units stay.
    attention: _Matrices = _USUAL[0]
    mlp: _Matrices = _USUAL[1]
    experts: Experts | None = None  # those of which some can be removed
    final_norm: str = "norm"  # name of the norm after the last layer
    # ``any``: every head count can be configured. ``divides_hidden_size``: heads must divide the
    # hidden size. ``fixed``: the class computes ``head_dim`` from the head count, so heads stay.
    head_rule: Literal["any", "divides_hidden_size", "fixed"] = "any"
    # Model type with identical computation but a freer configuration, for counts that `head_rule`
    # forbids; fields that it must state, and values that make the two types identical.
    retype: str | None = None
    retype_fields: Mapping[str, object] = field(default_factory=dict)
    retype_requires: Mapping[str, object] = field(default_factory=dict)
    layer_lists: tuple[str, ...] = ()  # of the configuration, with one entry a layer
    layer_indices: tuple[str, ...] = ()  # lists of layer numbers in the configuration
    layer_maps: tuple[str, ...] = ()  # mappings from layer numbers to exceptions in these layers
    layer_stacks: tuple[Stack, ...] = ()  # weights outside the layers, with a slice for each
    # Configuration field with the number of last layers that read the keys and values of earlier
    # ones: each those of the last earlier layer with its entry in ``layer_types``. These earlier
    # layers must stay, and the last layer.
    shared_tail: str | None = None
    live_lists: tuple[str, ...] = ()  # of the text model, not its configuration; one entry a layer
    neuron_field: str = "intermediate_size"  # of the configuration; may be among `layer_lists`
    neuron_multiple: int = 1  # neurons must be a multiple of it
    # Values with which the configuration takes `neuron_field` literally.
    width_fields: Mapping[str, object] = field(default_factory=dict)
    whole_mlp_if: str | None = None  # dotted attribute; where it is true, all neurons stay
    # Of a vision tower, whose units are neurons and layers alone.
    inside: str = ""  # path of the module with the layers, and the name of their list there
    layers: str = "layers"
    depth_field: str = "num_hidden_layers"  # of the configuration
    # Path, below a layer, of factors by which the outputs of its MLP are multiplied (LayerScale).
    scaled_by: str | None = None
    # Matrices outside the layers that have the same width, and that no language model reads.
    of_same_width: _Matrices = ()
    # Dotted path, in the whole configuration, of the numbers of hidden states that are read,
    # negative ones from the end; without such a field it is the last one. ``first_state`` is number
    # 0: that of the embeddings, or 1, that after the first layer.
    reads: str = "vision_feature_layer"
    first_state: int = 0
    why_whole: str | None = None  # why nothing of it can be removed
    can_be_uneven: bool = True  # whether `modeling_pruned.py` can cut layers to different widths


@dataclass(frozen=True)
class Knob:
    """A setting of a family's image processor that limits the tokens of an image."""

    field: str  # with a dot before the key of a mapping
    # How it is lowered: an area or edge in ``pixels`` by a hundredth; ``grids``, shapes of tiles,
    # which the configuration also has, without the largest; or to the next of some values.
    way: Literal["pixels", "grids"] | tuple[int | bool, ...] = tuple(range(1023, 0, -1))


@dataclass(frozen=True, kw_only=True)
class Family:
    """Where the parts of a model sit."""

    # Path of the text model (layers, embeddings, final norm) in the whole model.
    backbone: str = "model.language_model"
    head: str = "lm_head"  # path
    vision: str | None = None  # path of the vision tower; None for a text model
    # Types that the tower's configuration may have, where the family's class allows any.
    tower_types: tuple[str, ...] = tuple(_TABLES["tower_types"])
    projector: tuple[str, ...] = ()  # paths of modules from towers' features to the text model
    other_towers: tuple[str, ...] = ()  # paths, such as that of an audio tower
    text_config: str | None = "text_config"  # attribute; None if the configuration is the text's
    # Dotted configuration path of a list; as many first layers as it has entries must stay, because
    # features are added to layers by position.
    pinned_layers: str | None = None
    # Whether ``final_logit_softcapping`` and ``logit_scale`` of the text configuration are obeyed.
    caps_logits: bool = False
    # What lowers an image's tokens, each once the one before is at its least; or why nothing does.
    pictures: tuple[Knob, ...] | str = "every image has the same number of tokens"
    # Whether the text configuration's MLP width also sizes a part outside the backbone, so that a
    # plain configuration cannot change it.
    fixed_neurons: bool = False

    @property
    def towers(self) -> tuple[str, ...]:
        """Paths of all towers."""
        return (*(() if self.vision is None else (self.vision,)), *self.other_towers)


_BACKBONES, _FAMILIES = TypeAdapter(dict[str, Backbone]), TypeAdapter(dict[str, Family])
BACKBONES = _BACKBONES.validate_python(_TABLES["backbones"], extra="forbid")
_WHOLE = {kind: {"attention": {}, **row} for kind, row in _TABLES["towers"].items()}
TOWERS = _BACKBONES.validate_python(_WHOLE, extra="forbid")
"""By the model type of the vision configuration; unlike a decoder's, their attention stays."""
FAMILIES: dict[str, Family] = {
    **_FAMILIES.validate_python(_TABLES["families"], extra="forbid"),
    **{
        text_type: Family(backbone="model", text_config=None, caps_logits=True)
        for text_type in BACKBONES
        if text_type not in _TABLES["only_inside"]
    },
}


def family_row(model_type: str) -> Family | None:
    """Find the row of a whole model, or of a tower on its own; None for an unknown type."""
    if (tower := TOWERS.get(model_type)) is not None:
        return Family(backbone=tower.inside, head="", text_config=None)
    return FAMILIES.get(model_type)


def backbone_row(text_type: str) -> Backbone | None:
    """Find the row of a decoder or of a tower; None for an unknown type."""
    return TOWERS.get(text_type) or BACKBONES.get(text_type)
