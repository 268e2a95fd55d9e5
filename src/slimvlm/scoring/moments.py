"""Sums over tokens of the inputs of a matrix: all that scoring by ``obs`` and refits need.

O output, C input channel, K kept channel, R row, T token. Nothing grows with the number of tokens.
Of symmetric matrices only the blocks on and above the diagonal are computed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

BLOCK = 1024  # columns of a product that are worked on at once
SYMMETRIC_BLOCK = 608  # rows at once: enough for a product to run at its full rate


@dataclass
class Moments:
    """Weighted sums over tokens of the input ``x`` of a matrix and, where requested, of a residual.

    The residual ``e`` is ``y - W x - b`` for a target ``y`` other than the original output.
    """

    pairs: Float[Tensor, "C C"]  # Σ_t w_t x_t x_tᵀ in its upper blocks; `gram` is the whole matrix
    total: Float[Tensor, " C"]  # Σ_t w_t x_t
    count: Float[Tensor, ""]  # Σ_t w_t
    cross: Float[Tensor, "O C"] | None = None  # Σ_t w_t e_t x_tᵀ
    missing: Float[Tensor, " O"] | None = None  # Σ_t w_t e_t
    missing_square: Float[Tensor, ""] | None = None  # Σ_t w_t ‖e_t‖²
    _is_whole: bool = True

    @classmethod
    def zero(
        cls,
        channels: int,
        outputs: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "Moments":
        """Start the sums of a matrix, over pairs in ``dtype``; with ``outputs`` of residuals."""
        count = torch.zeros((), dtype=torch.float64, device=device)
        pairs = count.new_zeros(channels, channels, dtype=dtype)
        moments = cls(pairs, count.new_zeros(channels), count)
        if outputs is not None:
            moments.cross = pairs.new_zeros(outputs, channels)
            moments.missing, moments.missing_square = count.new_zeros(outputs), count.clone()
        return moments

    def add(
        self,
        inputs: Float[Tensor, "T C"],
        weights: Float[Tensor, " T"],
        residuals: Float[Tensor, "T O"] | None = None,
    ) -> None:
        """Add tokens, best some 2,000; those of weight 0 leave no trace, whatever their values."""
        counted, dtype = weights.nonzero()[:, 0], self.pairs.dtype
        if len(counted) < len(weights):
            inputs, weights = inputs[counted], weights[counted]
            residuals = None if residuals is None else residuals[counted]
        values, weights = inputs.to(dtype), weights.to(dtype)
        is_plain = inputs.is_cpu and bool((weights == 1).all())
        rows = values if is_plain else values * weights.sqrt()[:, None]
        with _bfloat16_products(is_plain and inputs.dtype == torch.bfloat16):  # loses nothing
            add_product_(self.pairs, rows, rows)
        self._is_whole = False
        self.total += weights @ values
        self.count += weights.sum(dtype=torch.float64)
        if self.cross is None or self.missing is None or self.missing_square is None:
            assert residuals is None
            return
        assert residuals is not None
        e = residuals.to(dtype)
        weighted = e * weights[:, None]
        self.cross.addmm_(weighted.T, values)
        self.missing += weighted.sum(0, dtype=torch.float64)
        self.missing_square += (weighted * e).sum(dtype=torch.float64)

    @property
    def gram(self) -> Float[Tensor, "C C"]:
        """``Σ_t w_t x_t x_tᵀ``; tokens may still be added."""
        if not self._is_whole:
            mirror_(self.pairs)
            self._is_whole = True
        return self.pairs

    def block(
        self, rows: Int[Tensor, " R"], columns: Int[Tensor, " K"], centred: bool, dtype: torch.dtype
    ) -> Float[Tensor, "R K"]:
        """Copy a part of the Gram matrix, of the inputs minus their means if centred."""
        part = self.gram[rows].index_select(1, columns).to(dtype)
        if centred:
            means = self.total[columns] / self.count
            part.addr_(self.total[rows].to(dtype), means.to(dtype), alpha=-1)
        return part

    def cross_block(
        self, columns: Int[Tensor, " K"], centred: bool, dtype: torch.dtype
    ) -> Float[Tensor, "O K"] | Float[Tensor, ""]:
        """Copy columns of the cross moments; 0 if there are no residuals."""
        if self.cross is None or self.missing is None:
            return self.total.new_zeros((), dtype=dtype)
        part = self.cross[:, columns].to(dtype)
        if centred:
            means = self.total[columns] / self.count
            part.addr_(self.missing.to(dtype), means.to(dtype), alpha=-1)
        return part

    def image(
        self, rows: Float[Tensor, "N K"], keep: Int[Tensor, " K"], centred: bool
    ) -> Float[Tensor, "N K"]:
        """Multiply a few rows by the `block` of the kept channels without making it."""
        whole = rows.new_zeros(len(rows), len(self.gram), dtype=self.pairs.dtype)
        whole[:, keep] = rows.to(whole.dtype)
        product = (whole @ self.gram)[:, keep].to(rows.dtype)
        if centred:
            total = self.total[keep].to(rows.dtype)
            product.addr_(rows @ total, total / self.count, alpha=-1)
        return product

    def square(
        self, weight: Float[Tensor, "O K"], channels: Int[Tensor, " K"], centred: bool
    ) -> float:
        """``Σ_t w_t ‖V x_t[channels] + e_t‖²`` for a matrix ``V``, around its mean if centred."""
        single, mean = weight.to(self.pairs.dtype), weight.double() @ self.total[channels]
        is_whole = len(channels) == len(self.gram)
        gram = self.gram if is_whole else self.gram[channels].index_select(1, channels)
        products = single @ gram
        if self.cross is not None:
            products += 2 * self.cross[:, channels]
        square = (products * single).sum(dtype=torch.float64)
        if self.missing is not None and self.missing_square is not None:
            square, mean = square + self.missing_square, mean + self.missing
        if centred:
            square = square - mean.square().sum() / self.count
        return float(square)


@contextmanager
def _bfloat16_products(wanted: bool) -> Iterator[None]:
    """Multiply float32 matrices as bfloat16 where a CPU can (PyTorch 2.9 on); process-wide."""
    products = getattr(torch.backends.mkldnn, "matmul", None) if wanted else None
    before = getattr(products, "fp32_precision", None)
    try:
        if products is not None:
            products.fp32_precision = "bf16"
        yield
    finally:
        if products is not None:
            products.fp32_precision = before


def add_product_(
    matrix: Float[Tensor, "C C"],
    left: Float[Tensor, "T C"],
    right: Float[Tensor, "T C"],
    sign: float = 1,
) -> None:
    """Add ``± leftᵀ right``, known to be symmetric, to the upper blocks of a matrix."""
    for start in range(0, len(matrix), SYMMETRIC_BLOCK):
        rows = slice(start, start + SYMMETRIC_BLOCK)
        matrix[rows, start:].addmm_(left[:, rows].mT, right[:, start:], alpha=sign)


def mirror_(matrix: Float[Tensor, "C C"]) -> None:
    """Copy the part above the diagonal below it."""
    for start in range(0, len(matrix), SYMMETRIC_BLOCK):
        end = min(start + SYMMETRIC_BLOCK, len(matrix))
        corner = matrix[start:end, start:end]
        corner.copy_(corner.triu() + corner.triu(1).mT)
        matrix[end:, start:end] = matrix[start:end, end:].mT


def invert_(matrix: Float[Tensor, "C C"]) -> bool:
    """Invert a matrix as ``L⁻ᵀ L⁻¹`` in place; False, its values lost, if not positive definite."""
    factor = matrix.mT
    info = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(factor, out=(factor, info))
    if int(info) != 0:
        return False
    # L⁻¹, block row by block row: [L⁻¹]_B: = -L_BB⁻¹ L_B: L⁻¹ left of the corner
    root, block = torch.zeros_like(factor), SYMMETRIC_BLOCK // 2
    for start in range(0, len(factor), block):
        rows = slice(start, start + block)
        corner = factor[rows, rows]
        one = torch.eye(len(corner), dtype=factor.dtype, device=factor.device)
        root[rows, rows] = torch.linalg.solve_triangular(corner, one, upper=False)
        reads = -root[rows, rows] @ factor[rows, :start]
        for across in range(0, start, block):
            columns = slice(across, across + block)
            root[rows, columns] = reads[:, across:] @ root[across:start, columns]
    for start in range(0, len(matrix), SYMMETRIC_BLOCK):
        for across in range(start, len(matrix), SYMMETRIC_BLOCK):
            rows = slice(start, start + SYMMETRIC_BLOCK)
            columns = slice(across, across + SYMMETRIC_BLOCK)
            matrix[rows, columns] = root[across:, rows].mT @ root[across:, columns]
    mirror_(matrix)
    return True
