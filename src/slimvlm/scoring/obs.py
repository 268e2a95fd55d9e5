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
from slimvlm.models.load import with_float64
from slimvlm.scoring.moments import add_product_, invert_, mirror_
from slimvlm.scoring.unit_scores import Statistics, Values, strictly_increasing, with_shapes

DAMPING = 0.01

INFLATION = 1e4  # ``max H_jj [H⁻¹]_jj`` up to which float32 is enough: the digits that are lost
BLOCK = 64  # larger ones use faster matrix products, smaller ones waste less on channels that stay
TIE = 1e-5  # prices that differ by less than this share are equal, and the first unit goes


def score_obs(statistics: Statistics, anatomy: Anatomy) -> Values:
    """Price each unit when it goes, least first, with the others refitted after each step.

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
    """A greedy removal of units, and the columns of those that stay, refitted with a ridge."""

    order: Int64[Tensor, " _"]  # the removed units
    costs: Float64[Tensor, " _"]  # the squared error that each of them added when it went
    left: Int64[Tensor, " _"]  # those that stay, sorted
    prices: Float64[Tensor, " _"]  # the cost of removing each of these next
    weights: Float[Tensor, "O _"]

    def scores(self) -> Float[Tensor, " unit"]:
        """Join costs in order of removal and prices: the first to go has the lowest score."""
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
    `INFLATION`). Units are equally many consecutive channels each; ``stop`` of them go, or all.
    `NumericalError` if ``H`` is not positive definite.

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
    """``W`` and ``H⁻¹`` of the units ``left``, of which some are ``gone`` since.

    With ``B`` the channels of a unit that goes and ``L Lᵀ = [H⁻¹]_BB``, ``H⁻¹`` loses ``Uᵀ U`` and
    ``P`` loses ``Uᵀ V + Vᵀ U``, where ``U = L⁻¹ [H⁻¹]_B:``, ``V = L⁻¹ P_B: - ½ S U`` and
    ``S = L⁻¹ P_BB L⁻ᵀ``, whose trace is the price.

    A removal updates only the units' blocks on the diagonal, from which all prices follow, and the
    rows of the removed unit. Rows are prepared for the cheapest units at once, in matrix products,
    and anew when another becomes the cheapest. ``u`` has all ``U`` since then in ``count`` rows.
    """

    def __init__(self, inverse: Tensor, weights: Tensor, width: int) -> None:
        units = len(inverse) // width
        self.inverse, self.weights, self.width = inverse, weights, width
        self.left = torch.arange(units, device=inverse.device)
        self.gone, self.remaining = torch.zeros_like(self.left, dtype=torch.bool), units
        self.has_failed = self.gone.any()  # whether a block had no root, on the device
        blocks = inverse.view(units, width, units, width).diagonal(dim1=0, dim2=2)
        self.inverse_blocks = blocks.permute(2, 0, 1).contiguous()
        parts = weights.view(len(weights), units, width).transpose(0, 1)
        self.product_blocks = parts.mT @ parts
        self.offsets = torch.arange(width, device=inverse.device)
        self.one = torch.eye(width, dtype=inverse.dtype, device=inverse.device)

    def remove_(self, stop: int) -> Elimination | None:
        """Remove the cheapest unit ``stop`` times; None if there are too few digits for that."""
        order, costs, size = [self.left[:0]], [self.inverse.new_empty(0)], 0
        while stop:
            if size != len(self.inverse):  # room for removals until they are applied below
                size = len(self.inverse)
                most = min(stop * self.width, size // 2) + max(BLOCK, self.width)
                self.u, self.count = self.inverse.new_empty(most, size), 0
            units, prices = self._remove_some_(stop)
            stop -= len(units)
            order.append(self.left[units])
            costs.append(prices)
            # W - Y U with the Y that leaves nothing of the columns that have gone
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
            u, stays = self.u[: self.count], self._remaining_places()
            add_product_(self.inverse, u, u, -1)
            mirror_(self.inverse)
            channels = self._channels(stays)
            self.inverse = self.inverse[channels[:, None], channels]
            self.weights = self.weights[:, channels]
            self.inverse_blocks = self.inverse_blocks[stays]
            self.product_blocks = self.product_blocks[stays]
            self.left, self.gone = self.left[stays], self.gone[stays]
        stays = self._remaining_places()
        costs.append(self._prices()[stays])
        if self.has_failed or not torch.cat(costs).isfinite().all():
            return None
        removed, prices = torch.cat(costs[:-1]).double(), costs[-1].double()
        left, weights = self.left[stays], self.weights[:, self._channels(stays)]
        return Elimination(torch.cat(order), removed, left, prices, weights)

    def _prices(self) -> Float[Tensor, " U"]:
        """Compute ``tr S`` of every unit, infinite for those that have gone."""
        if self.width == 1:
            prices = (self.product_blocks / self.inverse_blocks)[:, 0, 0]
        else:
            root = self._inverse_root(self.inverse_blocks)
            prices = (root @ self.product_blocks * root).sum((1, 2))
        return prices.clamp_min_(0).masked_fill_(self.gone, torch.inf)

    def _remove_some_(self, stop: int) -> tuple[Int64[Tensor, " N"], Float[Tensor, " N"]]:
        """Remove units while the rows of the cheapest are prepared; return them and their costs."""
        # all steps are queued on the device; how many removed one is read once at the end
        prices, width = self._prices(), self.width
        ranked = torch.where(_tied(prices), -1, prices).argsort(stable=True)
        prepared = ranked[: min(max(BLOCK // width, 1), self.remaining)]
        places = torch.full_like(self.left, -1)
        places[prepared] = torch.arange(len(prepared), device=places.device)
        channels, u = self._channels(prepared), self.u[: self.count]
        inverse_rows = torch.addmm(self.inverse[channels], u[:, channels].mT, u, alpha=-1)
        product_rows = self.weights[:, channels].mT @ self.weights
        all_u = self.u[self.count : self.count + len(channels)]
        all_v = torch.empty_like(all_u)
        goes = torch.ones_like(self.gone[:1])
        removed: list[tuple[Tensor, Tensor, Tensor]] = []
        for done in range(0, min(len(prepared), stop) * width, width):
            unit = _tied(self._prices()).byte().argmax(keepdim=True)
            place = places.index_select(0, unit)
            goes = goes & (place >= 0)
            if goes.is_cpu and not goes:
                break
            # the unit's rows after the removals since they were prepared
            channels, rows = self._channels(unit), self._channels(place.clamp_min(0))
            u, v = all_u[:done], all_v[:done]
            u_now, v_now = u.index_select(1, channels).mT, v.index_select(1, channels).mT
            inverse = inverse_rows.index_select(0, rows).addmm_(u_now, u, alpha=-1)
            product = product_rows.index_select(0, rows).addmm_(u_now, v, alpha=-1)
            product.addmm_(v_now, u, alpha=-1)
            # what changes when it goes; nothing if it does not
            block = torch.where(goes, inverse.index_select(1, channels), self.one)
            root = self._inverse_root(block) * goes
            u, v = all_u[done : done + width], all_v[done : done + width]
            torch.mm(root, inverse, out=u)
            torch.mm(root, product, out=v)
            square = v.index_select(1, channels) @ root.mT
            v.addmm_(square, u, alpha=-0.5)
            before = self.inverse_blocks.index_select(0, unit)
            u, v = (each.view(width, -1, width).transpose(0, 1) for each in (u, v))
            self.inverse_blocks.baddbmm_(u.mT, u, alpha=-1)
            self.product_blocks.baddbmm_(u.mT, v, alpha=-1).baddbmm_(v.mT, u, alpha=-1)
            self.inverse_blocks.index_copy_(0, unit, before)  # nothing is left, which has no root
            self.gone.index_copy_(0, unit, goes)
            removed.append((unit, square.trace()[None], goes))
        units, costs, went = (torch.cat(column) for column in zip(*removed, strict=True))
        count = int(went.sum()) if len(went) > 1 else 1  # the cheapest always goes
        self.remaining -= count
        return units[:count], costs[:count]

    def _remaining_places(self) -> Int64[Tensor, " N"]:
        """Find the remaining units; their known number avoids a read of the device."""
        return self.gone.byte().argsort(stable=True)[: self.remaining]

    def _channels(self, units: Int64[Tensor, " N"]) -> Int64[Tensor, " _"]:
        if self.width == 1:
            return units
        return (units[:, None] * self.width + self.offsets).flatten()

    def _inverse_root(self, blocks: Float[Tensor, "*N W W"]) -> Float[Tensor, "*N W W"]:
        """Compute ``L⁻¹`` with ``L Lᵀ`` the block."""
        if self.width == 1:
            return blocks.rsqrt()
        lower, info = torch.linalg.cholesky_ex(blocks)
        self.has_failed = self.has_failed | info.any()
        root: Tensor = torch.linalg.solve_triangular(lower, self.one, upper=False)
        return root


def _tied(prices: Float[Tensor, " U"]) -> Bool[Tensor, " U"]:
    """Find those as cheap as the cheapest, up to rounding."""
    return ~(prices > prices.min() * (1 + TIE))  # all of them if one is NaN
