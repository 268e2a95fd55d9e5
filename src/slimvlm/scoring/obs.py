"""Optimal Brain Surgeon for units: the output error of removing them and refitting the others.

O output, C input channel of a matrix that writes to the residual stream, U unit, W channels of a
unit, N units of several that are looked at.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from slimvlm.core.errors import NumericalError
from slimvlm.models.anatomy import Anatomy, unit_of
from slimvlm.models.devices import with_float64
from slimvlm.scoring.moments import add_product_, invert_, mirror_
from slimvlm.scoring.unit_scores import Statistics, Values, strictly_increasing, with_shapes

DAMPING = 0.01

INFLATION = 1e4  # ``max H_jj [H⁻¹]_jj`` up to which float32 is enough: the digits that are lost
BLOCK = 64  # larger ones use faster matrix products, smaller ones waste less on kept channels
TIE = 1e-5  # prices that differ by less than this share are equal, and the first unit is removed


def score_obs(statistics: Statistics, anatomy: Anatomy) -> Values:
    """Price each unit when it is removed, cheapest first; the others are refitted after each step.

    ``tr(W_B ([G⁻¹]_BB)⁻¹ W_Bᵀ)``, where ``W_B`` are the columns of ``o_proj`` or ``down_proj`` that
    read the unit and ``G`` is the mean Gram matrix of their inputs; never below the unit before, so
    that keeping the highest scores is stopping early.

    Reference:
        Hassibi & Stork 1992, Optimal Brain Surgeon, Eq. 5, for blocks of columns as in Ling et al.
        2024, SlimGPT, arXiv:2412.18110, and Meng et al. 2024, OSSCAR, arXiv:2403.12983 (which also
        refit weights here).
    """
    values: Values = {}
    for index, shape, matrix, part in with_shapes(statistics.parts, anatomy):
        unit, weight = unit_of(matrix), statistics.matrices[index, matrix.path]
        gram = part.gram / float(statistics.weight)
        values[index, unit] = removal_order(weight, gram, shape.units(unit)).scores()
    return values


@dataclass(frozen=True)
class Elimination:
    """A greedy removal of units, and the refitted columns of the kept ones."""

    order: Int64[Tensor, " _"]  # the removed units
    costs: Float64[Tensor, " _"]  # the squared error that each of them added
    left: Int64[Tensor, " _"]  # the kept units, sorted
    prices: Float64[Tensor, " _"]  # the cost of removing each of these next
    weights: Float[Tensor, "O _"]

    def scores(self) -> Float[Tensor, " unit"]:
        """Join costs in order of removal and prices: the first one removed has the lowest score."""
        ranked = self.prices.argsort(stable=True)
        order = torch.cat([self.order, self.left[ranked]])
        values = torch.empty(len(order), device=order.device)
        values[order] = strictly_increasing(torch.cat([self.costs, self.prices[ranked]]))
        return values.cpu()


def removal_order(
    matrix: Float[Tensor, "O C"],
    gram: Float[Tensor, "C C"],
    units: int,
    stop: int | None = None,
    damping: float = DAMPING,
) -> Elimination:
    """Remove units of a matrix, cheapest first, refitting what is left after each.

    With ``H = gram + damping · mean diag(gram) · I``, removing the channels ``B`` changes ``W`` to
    ``W - W_B R`` and ``H⁻¹`` to ``H⁻¹ - [H⁻¹]_:B R``, with ``R = ([H⁻¹]_BB)⁻¹ [H⁻¹]_B:``, both
    exact, and adds ``tr(W_B ([H⁻¹]_BB)⁻¹ W_Bᵀ)`` to the squared error of the output: the unit's
    price. Only ``P = Wᵀ W`` is needed of ``W``.

    The inverse takes ``C³`` operations, removing ``K`` channels at most ``K C (4 O + K)``. Memory
    is three matrices like ``gram``, in float32 where that keeps the order but for near ties (see
    `INFLATION`). Units are equally many consecutive channels each; ``stop`` of them
    are removed, or all. `NumericalError` if ``H`` is not positive definite.

    As in a Cholesky factorisation with pivots by blocks (LAPACK's ``pstrf``), what the last
    removals change is applied to the diagonal at once and to the rest in one product.
    """
    matrix, gram = with_float64(matrix), with_float64(gram)
    for dtype in dict.fromkeys((gram.dtype, torch.float64)):
        inverse = gram.to(dtype, copy=True)
        mean = inverse.diagonal().mean()
        inverse.diagonal().add_(torch.where(mean > 0, damping * mean, 1))
        diagonal = inverse.diagonal().clone()
        if not invert_(inverse):
            continue
        if dtype != torch.float64 and (diagonal * inverse.diagonal()).max() > INFLATION:
            continue
        state = _State(inverse, matrix.to(dtype, copy=True), len(gram) // units)
        found = state.remove_(units if stop is None else stop)
        if found is not None:
            return found
    raise NumericalError(f"the Gram matrix is not positive definite with damping {damping}")


class _State:
    """``W`` and ``H⁻¹`` of the units ``left``, of which some were removed since (``gone``).

    With ``B`` the channels of a removed unit and ``L Lᵀ = [H⁻¹]_BB``, ``H⁻¹`` is reduced by
    ``Uᵀ U`` and ``P`` by ``Uᵀ V + Vᵀ U``, where ``U = L⁻¹ [H⁻¹]_B:``, ``V = L⁻¹ P_B: - ½ S U`` and
    ``S = L⁻¹ P_BB L⁻ᵀ``, whose trace is the price.

    Rows are prepared for the cheapest units at once, in matrix products. Their order of removal is
    found on the CPU in their own rows and columns; then all prices after each of them say how many
    precede one that is not prepared. ``u`` has all ``U`` that are not applied, in ``count`` rows.
    """

    def __init__(self, inverse: Tensor, weights: Tensor, width: int) -> None:
        units = len(inverse) // width
        self.inverse, self.weights, self.width = inverse, weights, width
        self.left = torch.arange(units, device=inverse.device)
        self.gone, self.remaining = torch.zeros_like(self.left, dtype=torch.bool), units
        self.inverse_blocks = _diagonal_blocks(inverse, width).contiguous()
        parts = weights.view(len(weights), units, width).transpose(0, 1)
        self.product_blocks = parts.mT @ parts
        self.offsets = torch.arange(width, device=inverse.device)
        self.prices = _prices(self.inverse_blocks, self.product_blocks, self.gone)

    def remove_(self, stop: int) -> Elimination | None:
        """Remove the cheapest unit ``stop`` times; None if there are too few digits for that."""
        order, costs, size = [self.left[:0]], [torch.empty(0, dtype=torch.float64)], 0
        while stop:
            if size != len(self.inverse):  # room for removals until they are applied below
                size = len(self.inverse)
                most = min(stop * self.width, size // 2) + max(BLOCK, self.width)
                self.u, self.count = self.inverse.new_empty(most, size), 0
            units, prices = self._remove_some_(stop)
            stop -= len(units)
            order.append(self.left[units])
            costs.append(prices)
            if not prices.isfinite().all():
                return None
            # W - Y U with the Y that leaves nothing of the removed columns
            channels = self._channels(units)
            u = self.u[self.count : self.count + len(channels)]
            y = torch.linalg.solve_triangular(
                u[:, channels], self.weights[:, channels], upper=True, left=False
            )
            self.weights.addmm_(y, u, alpha=-1)
            self.count += len(channels)
            if self.count * 8 < size or stop * self.width * 3 < size:
                continue
            # enough removals follow to pay for applying u and dropping removed units
            u = self.u[: self.count]
            # their known number avoids a read of the device
            stays = self.gone.byte().argsort(stable=True)[: self.remaining]
            add_product_(self.inverse, u, u, -1)
            mirror_(self.inverse)
            channels = self._channels(stays)
            self.inverse = self.inverse[channels[:, None], channels]
            self.weights = self.weights[:, channels]
            self.inverse_blocks = self.inverse_blocks[stays]
            self.product_blocks = self.product_blocks[stays]
            self.left, self.gone = self.left[stays], self.gone[stays]
            self.prices = self.prices[stays]
        stays = self.gone.byte().argsort(stable=True)[: self.remaining]
        prices = self.prices[stays].double()
        if not prices.isfinite().all():
            return None
        removed = torch.cat(costs).to(prices)
        left, weights = self.left[stays], self.weights[:, self._channels(stays)]
        return Elimination(torch.cat(order), removed, left, prices, weights)

    def _remove_some_(self, stop: int) -> tuple[Int64[Tensor, " N"], Float[Tensor, " N"]]:
        """Remove some of the cheapest units; return them and, on the CPU, their costs."""
        width = self.width
        ranked = torch.where(_tied(self.prices), -1, self.prices).argsort(stable=True)
        prepared = ranked[: min(max(BLOCK // width, 1), self.remaining)].sort().values
        channels, u = self._channels(prepared), self.u[: self.count]
        inverse_rows = torch.addmm(self.inverse[channels], u[:, channels].mT, u, alpha=-1)
        product_rows = self.weights[:, channels].mT @ self.weights
        own = torch.stack([inverse_rows[:, channels], product_rows[:, channels]])
        rows, costs, factors = self._ordered(own.cpu().double(), min(len(prepared), stop))
        sent = torch.cat([rows[None], *factors]).to(self.inverse)
        rows, lower, mixed = sent[0].long(), *sent[1:].chunk(2)
        # the rows of U and V of all of them, by substitution
        u = torch.linalg.solve_triangular(lower, inverse_rows[rows], upper=False)
        rest = product_rows[rows].addmm_(mixed, u, alpha=-1)
        v = torch.linalg.solve_triangular(lower, rest, upper=False)
        self.u[self.count : self.count + len(u)] = u
        # blocks and prices before each removal, and after the last
        u, v = (each.view(len(costs), width, -1, width).transpose(1, 2) for each in (u, v))
        multiply = torch.mul if width == 1 else lambda left, right: left.mT @ right
        mixed, units = multiply(u, v), prepared[rows[::width] // width]
        inverse = torch.cat([self.inverse_blocks[None], -multiply(u, u)]).cumsum_(0)
        product = torch.cat([self.product_blocks[None], -(mixed + mixed.mT)]).cumsum_(0)
        steps = torch.arange(len(units) + 1, device=units.device)
        goes = torch.full_like(self.left, len(steps)).index_copy_(0, units, steps[:-1])
        gone = self.gone | (goes < steps[:, None])
        prices = _prices(inverse, product, gone)
        cheapest = _tied(prices)[:-1].byte().argmax(-1)
        count = max(int((cheapest == units).cumprod(0).sum()), 1)  # the cheapest is always removed
        self.inverse_blocks, self.product_blocks = inverse[count], product[count]
        self.prices, self.gone = prices[count], gone[count]
        self.remaining -= count
        return units[:count], costs[:count]

    def _ordered(
        self, own: Float64[Tensor, "2 C C"], stop: int
    ) -> tuple[Tensor, Float64[Tensor, " N"], tuple[Tensor, Tensor]]:
        """Find the order of removal of a few units, from ``H⁻¹`` and ``P`` of them alone.

        Returns their channels in that order, the costs, and ``Uᵀ`` and ``Vᵀ`` of these channels.
        """
        (inverse, product), width = own, self.width
        gone = torch.zeros(len(inverse) // width, dtype=torch.bool)
        offsets, chosen, costs = torch.arange(width), list[Tensor](), list[Tensor]()
        us, vs = list[Tensor](), list[Tensor]()
        for _ in range(stop):
            blocks = [_diagonal_blocks(each, width) for each in (inverse, product)]
            unit = int(_tied(_prices(blocks[0], blocks[1], gone)).byte().argmax())
            rows = slice(unit * width, (unit + 1) * width)
            root = _inverse_root(inverse[rows, rows])
            u, v = root @ inverse[rows], root @ product[rows]
            square = v[:, rows] @ root.mT
            v = v.addmm_(square, u, alpha=-0.5)
            inverse, product = inverse - u.mT @ u, product - u.mT @ v - v.mT @ u
            gone[unit] = True
            chosen.append(unit * width + offsets)
            costs.append(square.trace())
            us.append(u)
            vs.append(v)
        order = torch.cat(chosen)
        factors = [torch.cat(each)[:, order].mT for each in (us, vs)]
        return order.double(), torch.stack(costs), (factors[0], factors[1])

    def _channels(self, units: Int64[Tensor, " N"]) -> Int64[Tensor, " _"]:
        if self.width == 1:
            return units
        return (units[:, None] * self.width + self.offsets).flatten()


def _diagonal_blocks(matrix: Float[Tensor, "C C"], width: int) -> Float[Tensor, "U W W"]:
    """View the units' blocks of a matrix."""
    count = len(matrix) // width
    return matrix.view(count, width, count, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _prices(
    inverse: Float[Tensor, "*N U W W"],
    product: Float[Tensor, "*N U W W"],
    gone: Bool[Tensor, "*N U"],
) -> Float[Tensor, "*N U"]:
    """Compute ``tr S`` of every unit, infinite for removed ones."""
    if inverse.shape[-1] == 1:
        prices = (product / inverse)[..., 0, 0]
    else:  # nothing is left of a block that went, which has no root
        one = torch.eye(inverse.shape[-1], dtype=inverse.dtype, device=inverse.device)
        root = _inverse_root(torch.where(gone[..., None, None], one, inverse))
        prices = (root @ product * root).sum((-2, -1))
    return prices.clamp_min(0).masked_fill(gone, torch.inf)


def _inverse_root(blocks: Float[Tensor, "*N W W"]) -> Float[Tensor, "*N W W"]:
    """Compute ``L⁻¹`` with ``L Lᵀ`` the block; NaN if there is none."""
    if blocks.shape[-1] == 1:
        return blocks.rsqrt()
    lower, info = torch.linalg.cholesky_ex(blocks)
    lower = torch.where(info[..., None, None] == 0, lower, torch.nan)
    one = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
    root: Tensor = torch.linalg.solve_triangular(lower, one, upper=False)
    return root


def _tied(prices: Float[Tensor, "*N U"]) -> Bool[Tensor, "*N U"]:
    """Find those as cheap as the cheapest, up to rounding."""
    return ~(prices > prices.amin(-1, keepdim=True) * (1 + TIE))  # all of them if one is NaN
