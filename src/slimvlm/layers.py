"""A decoder layer: its shape, and where the weights of its units live."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from slimvlm.errors import UnsupportedModelError
from slimvlm.families import INPUT_COLUMNS, OUTPUT_ROWS, Backbone, Projection, Segment


@dataclass(frozen=True)
class LayerShape:
    """The geometry of one decoder layer and what its units weigh.

    Attributes:
        num_kv_heads: KV groups in the layer (heads, for multi-head attention); 0 if its token
            mixer has none (linear attention, convolution, cross-attention).
        queries_per_group: Query heads that share one KV head.
        head_dim: Channels of a head.
        intermediate_size: MLP neurons, with experts those of one; 0 if none of its neurons can go.
        kv_group_params: Parameters of one KV group (its q, k, v rows and biases, o columns).
        neuron_params: Parameters of one neuron (gate and up rows and biases, down column).
        fixed_params: Parameters that no unit owns (norms, output biases, the layer's slices of
            weights that stand outside the layers).
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
        heads = {
            "query": self.queries_per_group,
            "query_and_gate": 2 * self.queries_per_group,
            "key_value": 1,
        }[segment]
        return self.num_kv_heads, heads * self.head_dim


@dataclass(frozen=True)
class Matrix:
    """Where the weight of a `Projection` lives: in a linear module, or in a module of experts.

    Attributes:
        owner: The module that holds the parameter.
        name: The parameter's name in it.
        projection: Its row of data.
    """

    owner: nn.Module
    name: str
    projection: Projection

    @property
    def weight(self) -> nn.Parameter:
        """``[O, C]``, or with experts ``[E, O, C]`` (``[E, C, O]`` if transposed)."""
        weight = getattr(self.owner, self.name)
        assert isinstance(weight, nn.Parameter)
        return weight

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias of a linear module, if it has one."""
        return self.owner.bias if isinstance(self.owner, nn.Linear) else None

    @property
    def width(self) -> int:
        """Channels along the divided dimension."""
        return self.weight.shape[self.projection.axis]


def matrices_of(layer: nn.Module, wanted: Sequence[Projection]) -> list[Matrix]:
    """The matrices of a layer for some rows of data: all of them or none.

    Raises:
        UnsupportedModelError: If the layer has some of them only.
    """
    found = [_matrix(layer, projection) for projection in wanted]
    present = [matrix for matrix in found if matrix is not None]
    if present and len(present) < len(found):
        missing = wanted[found.index(None)].path
        raise UnsupportedModelError(
            f"{type(layer).__name__} has no {missing!r}, which its row of backbones.py names"
        )
    return present


def _matrix(layer: nn.Module, projection: Projection) -> Matrix | None:
    parent, _, name = projection.path.rpartition(".")
    owner: Any = layer
    for step in parent.split("."):
        owner = getattr(owner, step, None)
    part = getattr(owner, name, None)
    if isinstance(part, nn.Linear):
        return Matrix(part, "weight", projection)
    return Matrix(owner, name, projection) if isinstance(part, nn.Parameter) else None


def unit_matrices(layer: nn.Module, row: Backbone) -> tuple[list[Matrix], list[Matrix]]:
    """The matrices of a layer that KV groups own parts of, and those of neurons.

    Raises:
        UnsupportedModelError: If the layer has some of a row's matrices only.
    """
    stays_whole = row.whole_mlp_if is not None and attrgetter(row.whole_mlp_if)(layer)
    return matrices_of(layer, row.attention), [] if stays_whole else matrices_of(layer, row.mlp)


def read_layer(layer: nn.Module, backbone: Backbone) -> LayerShape:
    """The shape of a decoder layer, off its weights, whatever its configuration says.

    Raises:
        UnsupportedModelError: If the row of data does not fit.
    """
    attention, mlp = unit_matrices(layer, backbone)
    kv_heads, queries_per_group, head_dim = 0, 0, 0
    if attention:
        head_dim = int(layer.get_submodule("self_attn").head_dim)  # type: ignore[arg-type]
        kv_heads, queries_per_group = _head_counts(attention, head_dim)
    neurons = next((m.width for m in mlp if m.projection.dim == INPUT_COLUMNS), 0)
    shape = LayerShape(kv_heads, queries_per_group, head_dim, neurons, 0, 0, 0)
    kv_group_params = sum(_unit_params(matrix, shape) for matrix in attention)
    neuron_params = sum(_unit_params(matrix, shape) for matrix in mlp)
    owned = kv_heads * kv_group_params + neurons * neuron_params
    return replace(
        shape,
        kv_group_params=kv_group_params,
        neuron_params=neuron_params,
        fixed_params=sum(p.numel() for p in layer.parameters()) - owned,
    )


def _head_counts(attention: Sequence[Matrix], head_dim: int) -> tuple[int, int]:
    """KV heads, and query heads for each."""
    heads = next(m.width // head_dim for m in attention if m.projection.dim == INPUT_COLUMNS)
    producers = [m for m in attention if m.projection.dim == OUTPUT_ROWS]
    segments = [segment for m in producers for segment in m.projection.segments]
    query_heads = (segments.count("query") + 2 * segments.count("query_and_gate")) * heads
    rows = sum(m.width for m in producers) // head_dim
    kv_heads = (rows - query_heads) // segments.count("key_value")
    return kv_heads, heads // kv_heads


def _unit_params(matrix: Matrix, shape: LayerShape) -> int:
    """Parameters of one unit in a matrix."""
    channels = sum(shape.block(segment)[1] for segment in matrix.projection.segments)
    across = matrix.weight.numel() // matrix.width
    has_bias = matrix.projection.dim == OUTPUT_ROWS and matrix.bias is not None
    return channels * (across + has_bias)


def layer_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The hidden states among the arguments that a decoder layer is called with."""
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def with_layer_input(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], hidden: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call of a decoder layer with other hidden states."""
    if args:
        return (hidden, *args[1:]), dict(kwargs)
    return (), {**kwargs, "hidden_states": hidden}


def main_stream(hidden: Tensor) -> Tensor:
    """``[B, T, D]`` of hidden states that may hold several residual streams ``[S, B, T, D]``.

    The first stream is the one that begins as the embedding and that the others are scaled to at
    the end (AltUp of Gemma 3n).
    """
    return hidden[0] if hidden.ndim == 4 else hidden


def layer_output(output: Any) -> Tensor:
    """The hidden states in what a decoder layer returns: alone, or first in a tuple."""
    hidden: Tensor = output if isinstance(output, Tensor) else output[0]
    return hidden
