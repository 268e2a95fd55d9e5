"""Optimal Brain Surgeon for units: what the output loses if the others are refitted.

O output, C input channel of a matrix that writes to the residual stream, U unit, W channels of a
unit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from slimvlm.models.anatomy import Anatomy
from slimvlm.models.units import segments, unit_of
from slimvlm.scoring.statistics import Grams, UnitValues, with_shapes
from slimvlm.scoring.unit_scores import Scores, strictly_increasing

DAMPING = 0.01
UPDATES = 32


def score_obs(statistics: Grams, anatomy: Anatomy, group: int | None = None) -> Scores:
    """The error of removing each unit with the others refitted, in order of removal.

    ``W_B ([G⁻¹]_BB)⁻¹ W_Bᵀ`` summed over its diagonal, where ``W_B`` are the columns of ``o_proj``
    or ``down_proj`` that read the unit and ``G`` is the mean Gram matrix of their inputs: the mean
    squared change of the matrix's output for each token. Units go least first and the rest is
    refitted after each step, so that of two copies of a neuron one is free and the other is not.

    A unit's score is its cost when it went, but never below that of a unit before it: keeping the
    highest scores is stopping the greedy removal early, whatever their number.

    Args:
        statistics: Gram matrices. Layers that are not in them get no scores.
        anatomy: The model's.
        group: Units that may go between two refits of a whole layer, as in `removal_order`.
            Default: 1/32 of the layer's width, at least 1.

    Reference:
        Hassibi & Stork 1992, Optimal Brain Surgeon, Eq. 5, for blocks of columns as in Ling et al.
        2024, SlimGPT, arXiv:2412.18110, and Meng et al. 2024, OSSCAR, arXiv:2403.12983. There it
        chooses and refits weights in one go; here it only orders units, layer by layer, with the
        inputs of the whole model.
    """

    def found() -> UnitValues:
        for index, shape, matrix, part in with_shapes(statistics.parts, anatomy):
            _, _, units, _ = next(segments(matrix, shape))
            gram, step = part.gram / float(statistics.weight), group or max(units // UPDATES, 1)
            order, costs = removal_order(part.weight, gram, units, step)
            values = torch.empty(units)
            values[order.cpu()] = strictly_increasing(costs).cpu()
            yield index, unit_of(matrix), values

    return Scores.of_units("obs", anatomy.num_layers, found())


def removal_order(
    matrix: Float[Tensor, "O C"],
    gram: Float[Tensor, "C C"],
    units: int,
    group: int = 1,
    damping: float = DAMPING,
) -> tuple[Int[Tensor, " U"], Float[Tensor, " U"]]:
    """Remove all units of a matrix, cheapest first, refitting what is left.

    With ``H = gram + damping · mean diag(gram) · I``, removing the channels ``B`` changes ``W`` to
    ``W - W_B R`` and ``H⁻¹`` to ``H⁻¹ - [H⁻¹]_:B R``, with ``R = ([H⁻¹]_BB)⁻¹ [H⁻¹]_B:``, both
    exact. Only ``Wᵀ W`` is needed of ``W``.

    Time is cubic in the channels, memory a few times ``C²``; all is float64.

    Args:
        matrix: The weights that read the channels.
        gram: Second moments of the channels.
        units: How many units the channels make up, equally many consecutive ones each.
        group: Units that may go between two refits of the whole matrix. Those that are cheapest
            then go one by one, each refitting the other candidates, until the next one would cost
            more than a unit outside the group. 1 is the exact greedy order.
        damping: Share of the mean diagonal that is added to it. A channel that is always zero
            thus costs a little instead of nothing.

    Returns:
        The units in order of removal, and the squared error that each added when it went.
    """
    width = len(gram) // units
    weights = matrix.double()
    state = _State(weights.mT @ weights, _damped_inverse(gram, damping), width)
    left = torch.arange(units, device=gram.device)
    order: list[Tensor] = []
    costs: list[Tensor] = []
    while len(left):
        prices = state.prices()
        ranked = prices.argsort(stable=True)
        candidates = ranked[:group].sort().values
        limit = prices[ranked[group]] if group < len(left) else prices.new_tensor(torch.inf)
        gone, paid = _one_by_one(state.only(candidates), limit)
        order.append(left[candidates[gone]])
        costs.append(paid)
        stays = torch.ones(len(left), dtype=torch.bool, device=left.device)
        stays[candidates[gone]] = False
        state, left = state.without(stays), left[stays]
    return torch.cat(order), torch.cat(costs)


@dataclass(frozen=True)
class _State:
    """What is left of a layer: ``product = Wᵀ W`` refitted and ``inverse = H⁻¹``, both ``[C, C]``.

    Units are numbered from 0 among those that are left; each has ``width`` channels.
    """

    product: Tensor
    inverse: Tensor
    width: int

    def prices(self) -> Tensor:
        """``tr(W_B ([H⁻¹]_BB)⁻¹ W_Bᵀ)`` of every unit ``B`` that is left."""
        if self.width == 1:
            return self.product.diagonal().clamp_min(0) / self.inverse.diagonal()
        factors = torch.linalg.cholesky(self._blocks(self.inverse))
        solved = torch.cholesky_solve(self._blocks(self.product), factors)
        return solved.diagonal(dim1=1, dim2=2).sum(1).clamp_min(0)

    def only(self, units: Tensor) -> _State:
        """The part of some units; what it says of them stays exact when one of them goes."""
        channels = self._channels(units)
        return _State(
            self.product[channels][:, channels], self.inverse[channels][:, channels], self.width
        )

    def without(self, stays: Tensor) -> _State:
        """Remove the units that do not stay and refit the others."""
        units = torch.arange(len(stays), device=stays.device)
        kept, gone = self._channels(units[stays]), self._channels(units[~stays])
        across = self.inverse[gone][:, kept]
        factor = torch.linalg.cholesky(self.inverse[gone][:, gone])
        refit = torch.cholesky_solve(across, factor)
        half = self.product[gone][:, kept] - 0.5 * self.product[gone][:, gone] @ refit
        change = refit.mT @ half
        rest = self.only(units[stays])
        return _State(
            rest.product.sub_(change).sub_(change.mT),
            rest.inverse.sub_(across.mT @ refit),
            self.width,
        )

    def _channels(self, units: Tensor) -> Tensor:
        offsets = torch.arange(self.width, device=units.device)
        return (units[:, None] * self.width + offsets).flatten()

    def _blocks(self, matrix: Tensor) -> Tensor:
        """The diagonal blocks of the units, ``[U, W, W]``."""
        units = len(matrix) // self.width
        blocks = matrix.view(units, self.width, units, self.width)
        return blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _one_by_one(state: _State, limit: Tensor) -> tuple[Tensor, Tensor]:
    """Remove units one by one, cheapest first, until none costs at most the limit."""
    left = torch.arange(len(state.inverse) // state.width, device=limit.device)
    order: list[Tensor] = []
    costs: list[Tensor] = []
    while len(left):
        prices = state.prices()
        cheapest = int(prices.argmin())
        if order and prices[cheapest] > limit:
            break
        order.append(left[cheapest])
        costs.append(prices[cheapest])
        stays = torch.ones(len(left), dtype=torch.bool, device=left.device)
        stays[cheapest] = False
        state, left = state.without(stays), left[stays]
    return torch.stack(order), torch.stack(costs)


def _damped_inverse(gram: Float[Tensor, "C C"], damping: float) -> Float[Tensor, "C C"]:
    mean = gram.diagonal().double().mean()
    ridge = damping * mean if mean > 0 else torch.ones_like(mean)
    damped = gram.double() + ridge * torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    return torch.cholesky_inverse(torch.linalg.cholesky(damped))
