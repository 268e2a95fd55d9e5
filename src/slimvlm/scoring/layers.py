"""Scores of decoder layers.

B batch, T token, D hidden.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from slimvlm.models.anatomy import Anatomy
from slimvlm.scoring.scores import Scores, strictly_increasing
from slimvlm.scoring.statistics import Statistics


def block_influence(
    hidden_in: Float[Tensor, "B T D"],
    hidden_out: Float[Tensor, "B T D"],
    mask: Int[Tensor, "B T"] | Bool[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B T"]:
    """How much a layer turns each token: ``1 - cos(hidden_in, hidden_out)``, in float32.

    Computed row by row and in float32, so that large activations in half precision neither
    overflow nor cost a T × T product.

    Args:
        hidden_in: The layer's input.
        hidden_out: The layer's output.
        mask: Valid tokens. Others get 0.

    Reference:
        Men et al. 2024, ShortGPT, arXiv:2403.03853, Eq. 1 (there a mean over tokens).
    """
    x, y = hidden_in.float(), hidden_out.float()
    norms = (x.square().sum(-1) * y.square().sum(-1)).sqrt()
    influence = 1 - (x * y).sum(-1) / norms.clamp_min(torch.finfo(torch.float32).tiny)
    return influence if mask is None else influence.masked_fill(mask == 0, 0.0)


def angular_distance(
    hidden_in: Float[Tensor, "*batch D"], hidden_out: Float[Tensor, "*batch D"]
) -> Float[Tensor, "*batch"]:
    """``arccos(cos(hidden_in, hidden_out)) / pi`` in [0, 1]; cosines are clamped first.

    Reference:
        Gromov et al. 2024, The Unreasonable Ineffectiveness of the Deeper Layers,
        arXiv:2403.17887, Eq. 6.
    """
    cosine = torch.nn.functional.cosine_similarity(
        hidden_in.double(), hidden_out.double(), dim=-1, eps=torch.finfo(torch.float64).tiny
    )
    return (torch.arccos(cosine.clamp(-1.0, 1.0)) / math.pi).float()


def score_block_influence(
    statistics: Statistics,
    anatomy: Anatomy,
    reduction: str = "mean",
    last_layer: str = "prenorm",
) -> Scores:
    """Block influence of each layer; the least influential layers go first.

    Args:
        statistics: From the ``hidden_states`` capture.
        anatomy: The model's.
        reduction: ``mean`` over valid tokens by weight, or their ``sum`` as in the reference code
            (same order; long samples weigh more in both).
        last_layer: ``prenorm`` takes the last layer's own output; ``postnorm`` takes it after the
            final norm, as the reference code does.
    """
    values = statistics.tensors["influence_sum"].clone()
    if last_layer == "postnorm":
        values[-1] = statistics.tensors["influence_sum_postnorm"]
    if reduction == "mean":
        values = values / statistics.tensors["weight"]
    return Scores("block_influence", layer=values.float())


def score_angular(statistics: Statistics, anatomy: Anatomy, last_layer: str = "prenorm") -> Scores:
    """Angular distance over runs of layers at the last valid token; the nearest run goes.

    `Scores.layer` holds the distances of single layers, `Scores.layer_runs` those of all runs.
    Only one token of a sample is looked at, so that token weights change nothing.
    """
    totals = statistics.tensors["angular_sum"].clone()
    if last_layer == "postnorm":  # only runs that end with the last layer differ
        lengths = torch.arange(anatomy.num_layers)
        totals[lengths, anatomy.num_layers - 1 - lengths] = statistics.tensors[
            "angular_sum_postnorm"
        ]
    mean = (totals / max(statistics.num_samples, 1)).float()
    fits = torch.arange(1, anatomy.num_layers + 1)[:, None] + torch.arange(anatomy.num_layers)
    runs = mean.masked_fill(fits > anatomy.num_layers, math.inf)
    return Scores("angular", layer=runs[0].clone(), layer_runs=runs)


def score_kl_greedy(statistics: Statistics, anatomy: Anatomy) -> Scores:
    """Greedy order of removal by divergence from the original; the first to go scores least.

    A removed layer's score is the divergence, in nats for each token, of the model without it and
    the layers before it in the order. A layer that was never removed has the divergence that its
    removal would have made when it was last tried, pinned layers (never tried) the highest of all.
    Where this would break the order of removal, a score is raised to just above the one before.

    Args:
        statistics: From the ``greedy`` capture.
        anatomy: The model's.

    Reference:
        Song et al. 2024, SLEB, arXiv:2402.09025 (greedy removal, third metric). There the
        likelihood of text is measured; here it is the divergence from the original's own
        predictions, at the answers.
    """
    order, divergence = statistics.tensors["order"], statistics.tensors["divergence"]
    scores = torch.empty(anatomy.num_layers)
    scores[order] = strictly_increasing(divergence[order])
    return Scores("kl_greedy", layer=scores)


def score_spacing(statistics: Statistics, anatomy: Anatomy) -> Scores:
    """Removed layers lie as far apart as possible, whatever their number; no data needed.

    Layers are taken in farthest-point order: the next to go is the one farthest from all gone so
    far and from both ends. Ties go to the later layer.
    """
    L = anatomy.num_layers
    distance = torch.minimum(torch.arange(L) + 1, L - torch.arange(L)).double()
    scores = torch.zeros(L)
    for rank in range(L):
        chosen = L - 1 - int(distance.flip(0).argmax())
        scores[chosen] = rank
        distance = torch.minimum(distance, (torch.arange(L) - chosen).abs().double())
        distance[chosen] = -1
    return Scores("spacing", layer=scores)
