"""Scores of KV groups and neurons: elementwise formulas, and their sums over units.

E expert, O output row, I input column of a weight matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from slimvlm.models.anatomy import Anatomy, LayerShape
from slimvlm.models.families import INPUT_COLUMNS, Projection
from slimvlm.models.units import fold, unit_of
from slimvlm.scoring.scores import Scores
from slimvlm.scoring.statistics import Statistics

Weight = Float[Tensor, "*E O I"]


def channel_sums(values: Weight, axis: int) -> Float64[Tensor, " channel"]:
    """What a matrix's values add up to for each channel, over all experts if there are any.

    Args:
        values: One for each weight.
        axis: The channels' axis, counted from the end.
    """
    others = [dim for dim in range(-values.ndim, 0) if dim != axis]
    return values.sum(others, dtype=torch.float64).cpu()


def taylor(weight: Weight, gradient: Weight) -> Weight:
    """First order: ``|w g|``, the change of the loss when a weight becomes zero.

    Reference:
        Ma et al. 2023, LLM-Pruner, arXiv:2305.11627, Eq. 5; Huang et al. 2025,
        arXiv:2507.20749, Eq. 3-5.
    """
    return (weight * gradient).abs()


def taylor_second(weight: Weight, squared_gradient: Weight) -> Weight:
    """Second order with the Fisher diagonal: ``w² mean_j(g_j²)``.

    Reference:
        Ma et al. 2023, LLM-Pruner, arXiv:2305.11627, Eq. 5 (second term; its code omits the ½).
    """
    return weight * squared_gradient * weight


def taylor_mix(weight: Weight, gradient: Weight, squared_gradient: Weight) -> Weight:
    """Both orders: ``|w g - ½ w² mean_j(g_j²)|``.

    Reference:
        Ma et al. 2023, LLM-Pruner, arXiv:2305.11627, Eq. 5.
    """
    return (weight * gradient - 0.5 * weight * squared_gradient * weight).abs()


def magnitude(weight: Weight, p: int = 1) -> Weight:
    """``|w|^p``. There is no p-th root, as in LLM-Pruner."""
    return weight.abs().pow(p)


def wanda(column_l1: Float[Tensor, " I"], mean_square: Float[Tensor, " I"]) -> Float[Tensor, " I"]:
    """``sum_i |W_ij| · ‖x_j‖``: a channel's weights times the size of its input.

    ``‖x_j‖`` is the root mean square over tokens, so that more data does not score higher.

    Reference:
        Sun et al. 2023, Wanda, arXiv:2306.11695, Eq. 1, added over outputs as in the structured
        variant that An et al. 2023, FLAP, arXiv:2312.11983 compare with.
    """
    return column_l1 * mean_square.sqrt()


def fluctuation(
    column_square: Float[Tensor, " I"],
    mean: Float[Tensor, " I"],
    mean_square: Float[Tensor, " I"],
) -> Float[Tensor, " I"]:
    """``Var(x_j) · ‖W_j‖²``: what removing a channel costs if a bias stands in for its mean.

    Reference:
        An et al. 2023, FLAP, arXiv:2312.11983, fluctuation metric (there divided by one less
        than the number of tokens).
    """
    return (mean_square - mean.square()).clamp_min(0) * column_square


def sum_over_units(
    statistics: Statistics, anatomy: Anatomy, criterion: str, reduction: str = "sum"
) -> Scores:
    """Add a statistic per channel over each unit's channels in all its matrices.

    Args:
        statistics: One vector for each matrix, along its divided dimension.
        anatomy: The model's.
        criterion: Name to give the scores.
        reduction: ``sum`` over the unit's matrices, or their ``mean`` (a fused matrix counts as
            the matrices it holds).
    """
    scores: dict[str, list[Tensor]] = {"kv_group": [], "neuron": []}
    for index, shape in enumerate(anatomy.layers):
        for unit, totals in scores.items():
            parts = [
                part
                for projection in anatomy.matrices(index)
                if unit_of(projection) == unit
                for part in fold(
                    projection, shape, statistics.tensors[f"{index}.{projection.path}"].double()
                )
            ]
            if not parts:
                totals.append(torch.zeros(0))
                continue
            total = torch.stack(parts).sum(0)
            value = total / len(parts) if reduction == "mean" else total
            totals.append(value.float())
    return Scores(criterion, kv_group=scores["kv_group"], neuron=scores["neuron"])


def score_taylor(statistics: Statistics, anatomy: Anatomy) -> Scores:
    """``|w g|`` added over each unit; for layers over all matrices that units own, each once."""
    scores = sum_over_units(statistics, anatomy, "taylor")
    layers = [_layer_total(statistics, anatomy, index) for index in range(anatomy.num_layers)]
    layer = torch.stack(layers).float()
    return Scores("taylor", layer=layer, kv_group=scores.kv_group, neuron=scores.neuron)


def summed(criterion: str) -> Callable[..., Scores]:
    """A score function that adds its statistic over each unit."""

    def score(statistics: Statistics, anatomy: Anatomy) -> Scores:
        return sum_over_units(statistics, anatomy, criterion)

    return score


def score_magnitude(statistics: Statistics, anatomy: Anatomy, reduction: str = "mean") -> Scores:
    """Size of the weights of each unit; layers by the mean over their matrices' weights.

    Args:
        statistics: From the ``weights`` capture.
        anatomy: The model's.
        reduction: ``mean`` over the unit's matrices as LLM-Pruner's scripts have it, or ``sum``.
    """
    scores = sum_over_units(statistics, anatomy, "magnitude", reduction)
    layers = [
        _layer_total(statistics, anatomy, index) / max(shape.params - shape.fixed_params, 1)
        for index, shape in enumerate(anatomy.layers)
    ]
    layer = torch.stack(layers).float()
    return Scores("magnitude", layer=layer, kv_group=scores.kv_group, neuron=scores.neuron)


def _layer_total(statistics: Statistics, anatomy: Anatomy, index: int) -> Tensor:
    """A statistic per channel, added over all matrices of a layer."""
    names = [f"{index}.{projection.path}" for projection in anatomy.matrices(index)]
    total = torch.zeros((), dtype=torch.float64)
    return sum((statistics.tensors[name].double().sum() for name in names), start=total)


def score_gate(statistics: Statistics, anatomy: Anatomy) -> Scores:
    """``mean_j |dL_j / dm|`` for a gate ``m = 1`` on each unit's output, over samples ``j``.

    Equals the first-order change of the loss when the unit is switched off, with the sum over the
    unit's channels inside the absolute value. Needs no gradient of any weight.

    Reference:
        Michel et al. 2019, Are Sixteen Heads Really Better than One?, arXiv:1905.10650, Eq. 2.
    """
    return _means(statistics, anatomy, "gate", max(statistics.num_samples, 1))


def score_activation(statistics: Statistics, anatomy: Anatomy) -> Scores:
    """Mean size of what a unit sends to ``o_proj`` / ``down_proj`` over tokens, by weight.

    Neurons: mean of ``|a|``. KV groups: mean L2 norm of the group's heads, concatenated.

    Reference:
        Muralidharan et al. 2024, Minitron, arXiv:2407.14679, Sec. 2.2 (mean over tokens here,
        with padding left out; the paper aggregates batch and sequence separately).
    """
    return _means(statistics, anatomy, "activation", float(statistics.tensors["weight"]))


def score_wanda(statistics: Statistics, anatomy: Anatomy) -> Scores:
    """`wanda` of each channel of ``o_proj`` / ``down_proj``, added over the unit's channels."""

    def channels(name: str, weight: Tensor) -> Tensor:
        tensors = statistics.tensors
        return wanda(tensors[f"{name}.column_l1"], tensors[f"{name}.square"] / weight)

    return _sum_over_consumers(statistics, anatomy, "wanda", channels)


def score_flap(statistics: Statistics, anatomy: Anatomy) -> Scores:
    """`fluctuation` of each channel of ``o_proj`` / ``down_proj``, added over the unit's channels.

    The paper standardises scores within each layer before it compares layers. Here they stay
    squared errors of the layer's output.
    """

    def channels(name: str, weight: Tensor) -> Tensor:
        tensors = statistics.tensors
        mean, square = tensors[f"{name}.sum"] / weight, tensors[f"{name}.square"] / weight
        return fluctuation(tensors[f"{name}.column_square"], mean, square)

    return _sum_over_consumers(statistics, anatomy, "flap", channels)


def consumers(anatomy: Anatomy) -> Iterator[tuple[int, LayerShape, Projection]]:
    """Every matrix that writes to the residual stream: (layer index, the layer, the matrix)."""
    for index, shape in enumerate(anatomy.layers):
        for projection in anatomy.matrices(index):
            if projection.dim == INPUT_COLUMNS:
                yield index, shape, projection


def _sum_over_consumers(
    statistics: Statistics,
    anatomy: Anatomy,
    criterion: str,
    channels: Callable[[str, Tensor], Tensor],
) -> Scores:
    """Add ``channels(name of the matrix, weight of all tokens)`` over each unit's channels."""
    empty = [torch.zeros(0)] * anatomy.num_layers
    scores: dict[str, list[Tensor]] = {"kv_group": list(empty), "neuron": list(empty)}
    for index, shape, projection in consumers(anatomy):
        values = channels(f"{index}.{projection.path}", statistics.tensors["weight"])
        (total,) = fold(projection, shape, values)
        scores[unit_of(projection)][index] = total.float()
    return Scores(criterion, kv_group=scores["kv_group"], neuron=scores["neuron"])


def _means(statistics: Statistics, anatomy: Anatomy, criterion: str, count: float) -> Scores:
    """Sums that were collected for each unit, divided by what they were summed over."""
    scores = {
        unit: [
            statistics.tensors.get(f"{index}.{unit}", torch.zeros(0)).float() / count
            for index in range(anatomy.num_layers)
        ]
        for unit in ("kv_group", "neuron")
    }
    return Scores(criterion, kv_group=scores["kv_group"], neuron=scores["neuron"])


def score_random(statistics: Statistics, anatomy: Anatomy, seed: int = 0) -> Scores:
    """Uniform random scores: the floor that every other criterion has to beat."""
    generator = torch.Generator().manual_seed(seed)
    return Scores(
        "random",
        layer=torch.rand(anatomy.num_layers, generator=generator),
        kv_group=[torch.rand(s.num_kv_heads, generator=generator) for s in anatomy.layers],
        neuron=[torch.rand(s.intermediate_size, generator=generator) for s in anatomy.layers],
    )
