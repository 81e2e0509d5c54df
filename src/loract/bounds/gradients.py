"""What coded activations do to gradients: of a linear map, a norm, attention, and through layers.

Bounds hold for errors of any size and any direction, given their norms; by that they are loose where errors are random.
Proofs, equality cases and how loose: docs/theory/gradients.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from loract.errors import InvalidSpec
from loract.linalg import singular_values


def contraction_bound(upstream: Tensor, error: Tensor) -> float:
    """min(||g||_2 ||D||_F, ||g||_F ||D||_2) >= ||g^T (X + D) - g^T X||_F, upstream g (N, r), error D (N, n).

    Example:
        >>> contraction_bound(torch.eye(2), torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
        5.0
    """
    g, d = singular_values(upstream.double()), singular_values(error.double())
    return min(float(g[0] * d.norm()), float(g.norm() * d[0]))


def contraction_mean(upstream: Tensor, squared_error: float, tokens: int) -> float:
    """sqrt(||g||_F^2 E / N): root mean square of ||g^T D||_F for rows of D that are uncorrelated and alike.

    Rows have mean 0; `squared_error` E = the mean of ||D||_F^2 over all N `tokens`. It says what rounding does, as
    `contraction_bound` what it could do at worst; the ratio is ||g||_F / (sqrt(N) ||g||_2).

    Example:
        >>> contraction_mean(torch.ones(4, 1), 16.0, 4)
        4.0
    """
    return math.sqrt(float(upstream.double().square().sum()) * squared_error / tokens)


def norm_backward_bound(upstream: Tensor, xhat: Tensor, errors: Tensor, rstd: Tensor) -> float:
    """Error (Frobenius) of a norm's dx when xhat (N, n) is read with errors of these norms (N,), statistics exact.

    Per token r ||u|| e (2 ||xhat|| + e) / n with u = `upstream` = g * w (N, n), r = `rstd` (N,), e = its error's norm;
    at most r ||u|| (2 t + t^2) for the relative error t, since ||xhat|| <= sqrt(n). It is reached where error, upstream
    and xhat are parallel. Relative to dx itself there is no bound: dx vanishes for u parallel to xhat.

    Example:
        >>> u = xhat = torch.ones(1, 4)
        >>> round(norm_backward_bound(u, xhat, torch.tensor([0.2]), torch.ones(1)), 4)
        0.42
    """
    u, x, e = upstream.double().norm(dim=1), xhat.double().norm(dim=1), errors.double()
    local = rstd.double().reshape(-1) * u * e * (2 * x + e) / xhat.shape[1]
    return float(local.norm())


class AttentionBound(NamedTuple):
    """Bounds on the errors (Frobenius) of the gradients of one head's query, key and value."""

    query: float
    key: float
    value: float


def attention_backward_bound(
    qkv: tuple[Tensor, Tensor, Tensor],
    upstream: Tensor,
    errors: tuple[Tensor, Tensor, Tensor],
    scale: float,
    mask: Tensor | None = None,
) -> AttentionBound:
    """Errors of dq, dk, dv when q (N, d), k (M, d), v (M, e) are read with row errors of these norms (N,), (M,), (M,).

    One head, softmax(scale q k^T) v, `upstream` (N, e), `mask` (N, M) true where a query sees a key; everything is
    formed again from what is read. Per query: scores are off by at most s, probabilities by min(s, 2) in l1, their
    gradient by a = ||g|| max ||dv|| + min(s, 1) w in l1, w the range of g v^T over the keys it sees; then dq is off by
    scale (a max ||k - mean k|| + (a + w / 2) max ||dk||).

    Raises:
        InvalidSpec: a query that sees no key.

    Example:
        >>> q = k = v = torch.eye(2)
        >>> exact = torch.zeros(2), torch.zeros(2), torch.zeros(2)
        >>> attention_backward_bound((q, k, v), torch.eye(2), exact, 0.5)
        AttentionBound(query=0.0, key=0.0, value=0.0)
    """
    q, k, v = (t.double() for t in qkv)
    dq, dk, dv = (t.double() for t in errors)
    g = upstream.double()
    sees = torch.ones(len(q), len(k), dtype=torch.bool) if mask is None else mask
    if not bool(sees.any(1).all()):
        raise InvalidSpec("a query that sees no key", "one key a query at least", "leave such queries out")

    def largest(values: Tensor) -> Tensor:
        return values.masked_fill(~sees, -math.inf).amax(1)

    q_norm, g_norm = q.norm(dim=1), g.norm(dim=1)
    key_error, value_error = largest(dk.expand_as(sees)), largest(dv.expand_as(sees))
    scores = abs(scale) * largest(torch.outer(q_norm, dk) + torch.outer(dq, k.norm(dim=1) + dk))
    products = g @ v.T
    width = largest(products) + largest(-products)
    slope = g_norm * value_error + scores.clamp_max(1) * width
    radius = largest((k - k.mean(0)).norm(dim=1).expand_as(sees))
    query = abs(scale) * (slope * (radius + key_error) + width / 2 * key_error)
    read = float(singular_values(q)[0]) + float(dq.norm())
    key = min(float((slope * (q_norm + dq)).sum()), float(slope.norm()) * read)
    key = abs(scale) * (key + float((width * dq).sum()) / 2) / math.sqrt(2)
    moved = scores.clamp_max(2)
    value = min(float((moved * g_norm).sum()), float(moved.norm() * singular_values(g)[0])) / math.sqrt(2)
    return AttentionBound(float(query.norm()), key, value)


def propagated_bound(norms: Sequence[float], changes: Sequence[float]) -> float:
    """prod(a_l + d_l) - prod(a_l) >= ||J'_0 ... J'_(L-1) - J_0 ... J_(L-1)||_2, Jacobians' norms a_l, changes' d_l.

    Of a network whose backward pass reads coded activations: times ||g|| it bounds the error of the gradient that
    arrives at the input. Exponential in depth, and reached only if all layers amplify the same direction.

    Example:
        >>> round(propagated_bound([1.0, 1.0, 1.0], [0.1, 0.1, 0.1]), 3)
        0.331
    """
    return math.prod(a + d for a, d in zip(norms, changes, strict=True)) - math.prod(norms)


def accumulated_bound(norms: Sequence[float], local: Sequence[float]) -> float:
    """sum_l (prod_(j < l) a_j) e_l >= error of the gradient at the input: a_j norms of the Jacobians as coded.

    e_l = ||(J'_l - J_l)^T g_(l+1)||, what layer l adds by itself to an exact gradient (both lists from the input on).

    Example:
        >>> accumulated_bound([2.0, 2.0], [1.0, 1.0])
        3.0
    """
    found, amplified = 0.0, 1.0
    for norm, error in zip(norms, local, strict=True):
        found += amplified * error
        amplified *= norm
    return found
