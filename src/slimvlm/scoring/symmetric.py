"""Symmetric matrices, of which only the blocks on and above the diagonal are computed.

C channel, T rows that are multiplied.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

BLOCK = 608
"""Rows of a symmetric matrix that are worked on at once: large enough for a matrix product to run
at its full rate, small enough to leave out almost half."""


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
    """Copy the part above the diagonal below it."""
    for start in range(0, len(matrix), BLOCK):
        end = min(start + BLOCK, len(matrix))
        corner = matrix[start:end, start:end]
        corner.copy_(corner.triu() + corner.triu(1).mT)
        matrix[end:, start:end] = matrix[start:end, end:].mT


def invert_(matrix: Float[Tensor, "C C"]) -> bool:
    """Invert a positive definite matrix as ``L⁻ᵀ L⁻¹`` from its Cholesky factor, in place.

    All but the corners are matrix products. Returns False, with the values lost, if the matrix is
    not positive definite in its precision.
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
