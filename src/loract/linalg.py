"""Small dense linear algebra with explicit precision; the only user of torch.linalg in the package."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 20
"""Elements widened at a time on CPU: small enough to stay in cache and cost no page faults, large enough that the
number of operator calls does not show."""


def promote(x: Tensor) -> Tensor:
    """fp16 and bf16 as fp32, everything else unchanged.

    Example:
        >>> promote(torch.ones(1, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def row_chunks(x: Tensor) -> Iterator[slice]:
    """Slices of the rows of x (N, n): some `CHUNK_ELEMENTS` at a time on CPU, all at once on an accelerator."""
    step = max(1, CHUNK_ELEMENTS // x.shape[1]) if x.is_cpu else max(1, len(x))
    return (slice(start, start + step) for start in range(0, len(x), step))


def orthonormalise(y: Tensor) -> Tensor:
    """Orthonormal columns Q (n, min(n, k)) with range(Q) containing range(y), y (n, k), by Householder QR.

    Q is orthonormal even where y is rank deficient or zero, which Cholesky QR is not. NaN in, NaN out.
    """
    return torch.linalg.qr(promote(y)).Q


def gram(x: Tensor, y: Tensor) -> Tensor:
    """x^T y accumulated and returned in fp32 or wider: a bf16 result would lose half the digits."""
    return promote(x).T @ promote(y)


def squared_norm(x: Tensor) -> Tensor:
    """||x||_F^2 as a 0-d tensor, accumulated in fp32 (fp64 for fp64) without a wide copy of x."""
    return row_energies(x.reshape(-1, x.shape[-1])).sum() if x.dim() else promote(x).square()


def row_energies(x: Tensor) -> Tensor:
    """Squared norm of each row of x (N, n): (N,), in fp32 or wider without a wide copy of x."""
    if x.is_cpu and x.dtype in (torch.float16, torch.bfloat16):
        # The reduction with dtype= is scalar on CPU, and a whole wide copy spends its time on page faults.
        out = torch.empty(len(x), dtype=torch.float32)
        for part in row_chunks(x):
            torch.linalg.vector_norm(promote(x[part]), dim=-1, out=out[part])
        return out.square_()
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x, dim=-1, dtype=dtype).square()


def leading_eigenvectors(symmetric: Tensor, count: int) -> Tensor:
    """Eigenvectors (l, count) of the largest eigenvalues of a symmetric (l, l) matrix, in descending order.

    LAPACK raises on NaN, and looking for NaN would wait for the device, so the matrix is cleaned for the
    factorisation and the NaN put back.
    """
    finite = torch.isfinite(symmetric).all()
    vectors = torch.linalg.eigh(torch.nan_to_num(symmetric, 0.0, 0.0, 0.0)).eigenvectors
    leading = vectors[:, symmetric.shape[0] - count :].flip(1)
    return torch.where(finite, leading, torch.full_like(leading, torch.nan))


def singular_values(x: Tensor) -> Tensor:
    """Singular values of x in descending order."""
    return torch.linalg.svdvals(promote(x))
