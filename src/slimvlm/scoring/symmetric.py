"""Symmetric matrices, of which only the blocks on and above the diagonal are computed.

C channel, T rows that are multiplied.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

BLOCK = 608
"""Rows of a symmetric matrix that are worked on at once: large enough for a matrix product to run
at its full rate, small enough to leave out almost half."""


class SymmetricSum:
    """``Σ_t w_t x_t x_tᵀ``: tokens are added at the rate of a matrix product, about half of it.

    Args:
        matrix: The sum so far, which is added to in place.
    """

    def __init__(self, matrix: Float[Tensor, "C C"]) -> None:
        self._matrix, self._is_whole = matrix, True

    @property
    def dtype(self) -> torch.dtype:
        """Of the sum."""
        return self._matrix.dtype

    def add_(self, rows: Float[Tensor, "T C"], weights: Float[Tensor, " T"]) -> None:
        """Add tokens; those of weight 0 leave no trace, whatever their values.

        bfloat16 rows of weights 0 and 1 are multiplied as such on a CPU, which loses nothing.

        Args:
            rows: ``x_t``, best some 2,000 at a time.
            weights: ``w_t``, at least 0.
        """
        counted = weights.nonzero()[:, 0]
        if len(counted) < len(weights):
            rows, weights = rows[counted], weights[counted]
        values = rows.to(self._matrix.dtype)
        is_plain = rows.is_cpu and bool((weights == 1).all())
        if not is_plain:
            values = values * weights.to(values.dtype).sqrt()[:, None]
        with _bfloat16_products(is_plain and rows.dtype == torch.bfloat16):
            add_product_(self._matrix, values, values)
        self._is_whole = False

    def value(self) -> Float[Tensor, "C C"]:
        """The sum as a whole matrix; later tokens are added to it."""
        if not self._is_whole:
            mirror_(self._matrix)
            self._is_whole = True
        return self._matrix


@contextmanager
def _bfloat16_products(wanted: bool) -> Iterator[None]:
    """Inside, CPUs that can multiply float32 matrices as bfloat16, with sums in float32.

    PyTorch can since 2.9, and says so for the whole process.
    """
    products = getattr(torch.backends.mkldnn, "matmul", None) if wanted else None
    if products is None:
        yield
        return
    before = products.fp32_precision
    products.fp32_precision = "bf16"
    try:
        yield
    finally:
        products.fp32_precision = before


def add_product_(
    matrix: Float[Tensor, "C C"],
    left: Float[Tensor, "T C"],
    right: Float[Tensor, "T C"],
    sign: float = 1,
) -> None:
    """Add ``± leftᵀ right``, known to be symmetric, to the upper blocks of a matrix."""
    for start in range(0, len(matrix), BLOCK):
        rows = slice(start, start + BLOCK)
        matrix[rows, start:].addmm_(left[:, rows].mT, right[:, start:], alpha=sign)


def mirror_(matrix: Float[Tensor, "C C"]) -> None:
    """Write what is above the diagonal below it, too."""
    for start in range(0, len(matrix), BLOCK):
        end = min(start + BLOCK, len(matrix))
        corner = matrix[start:end, start:end]
        corner.copy_(corner.triu() + corner.triu(1).mT)
        matrix[end:, start:end] = matrix[start:end, end:].mT


def invert_(matrix: Float[Tensor, "C C"]) -> bool:
    """Turn a positive definite matrix into its inverse.

    As ``L⁻ᵀ L⁻¹`` from the Cholesky factor ``L``, with all but its corners in matrix products.

    Returns:
        Whether it is positive definite in its precision; if not, nothing useful is left of it.
    """
    factor = matrix.mT
    info = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(factor, out=(factor, info))
    if int(info) != 0:
        return False
    root = _triangular_inverse(factor)
    for start in range(0, len(matrix), BLOCK):
        for across in range(start, len(matrix), BLOCK):
            rows, columns = slice(start, start + BLOCK), slice(across, across + BLOCK)
            matrix[rows, columns] = root[across:, rows].mT @ root[across:, columns]
    mirror_(matrix)
    return True


def _triangular_inverse(factor: Float[Tensor, "C C"]) -> Float[Tensor, "C C"]:
    """``L⁻¹``, block row by block row: ``[L⁻¹]_B: = -L_BB⁻¹ L_B: L⁻¹`` left of the corner."""
    inverse, block = torch.zeros_like(factor), BLOCK // 2
    for start in range(0, len(factor), block):
        rows = slice(start, start + block)
        corner = factor[rows, rows]
        one = torch.eye(len(corner), dtype=factor.dtype, device=factor.device)
        inverse[rows, rows] = torch.linalg.solve_triangular(corner, one, upper=False)
        reads = -inverse[rows, rows] @ factor[rows, :start]
        for across in range(0, start, block):
            columns = slice(across, across + block)
            inverse[rows, columns] = reads[:, across:] @ inverse[across:start, columns]
    return inverse
