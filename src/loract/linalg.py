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
    """Eigenvectors (l, count) of the largest eigenvalues of a positive semidefinite (l, l) matrix, in descending order.

    LAPACK raises on NaN, and looking for NaN would wait for the device, so the matrix is cleaned for the
    factorisation and the NaN put back. On an accelerator they are approximate: see `iterated_eigenvectors`.
    """
    finite = torch.isfinite(symmetric).all()
    clean = torch.nan_to_num(symmetric, 0.0, 0.0, 0.0)
    if symmetric.is_cpu:
        leading = torch.linalg.eigh(clean).eigenvectors[:, symmetric.shape[0] - count :].flip(1)
    else:
        leading = iterated_eigenvectors(clean)[:, :count]
    return torch.where(finite, leading, torch.full_like(leading, torch.nan))


ITERATIONS = 4
"""QR factorisations, by which the leading vectors have 99 % of the energy there is for them, for eigenvalues that fall
as j^-1/2 or faster (98 % at j^-1/4)."""


def iterated_eigenvectors(symmetric: Tensor) -> Tensor:
    """Orthonormal Q (l, l), nearly the eigenvectors of a positive semidefinite matrix by descending eigenvalue.

    Orthogonal iteration (Golub & Van Loan 2013, 8.2.4). torch's eigh and svd look at their own error codes, for which
    the host waits for the device; a QR factorisation has none.
    """
    scaled = symmetric / symmetric.diagonal().sum().clamp_min(torch.finfo(symmetric.dtype).tiny)
    q = torch.eye(len(symmetric), dtype=symmetric.dtype, device=symmetric.device)
    for _ in range(ITERATIONS):  # largest diagonal first, so that the order is right from the start
        q = q[:, (q * (scaled @ q)).sum(0).argsort(descending=True)]
        q = torch.linalg.qr(scaled @ (scaled @ q)).Q
    return q[:, (q * (scaled @ q)).sum(0).argsort(descending=True)]


def singular_values(x: Tensor) -> Tensor:
    """Singular values of x in descending order."""
    return torch.linalg.svdvals(promote(x))


def singular_vectors(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (N, m), singular values (m,) in descending order and V (n, m) of x (N, n), m = min(N, n)."""
    u, values, vt = torch.linalg.svd(promote(x), full_matrices=False)
    return u, values, vt.T
