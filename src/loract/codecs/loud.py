"""Lines of a tensor that are so much louder than the rest that they would spoil its scales and its basis."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import Tensor

from loract.linalg import promote, row_chunks, row_energies


def loud_tokens(x: Tensor, count: int) -> Tensor:
    """Indices of the `count` tokens of x (N, n) of largest energy relative to each feature's mean magnitude.

    A token with a value that is not finite comes first.
    """
    weight = _reciprocal(_total(promote(x[part]).abs().sum(0) for part in row_chunks(x)) / len(x))
    return torch.cat([row_energies(x[part] * weight) for part in row_chunks(x)]).topk(count).indices


def loud_features(x: Tensor, count: int) -> Tensor:
    """Indices of the `count` features of x (N, n) of largest energy relative to each token's mean magnitude.

    A feature with a value that is not finite comes first.
    """
    weights = (_reciprocal(promote(x[part]).abs().mean(1, keepdim=True)) for part in row_chunks(x))
    parts = zip(row_chunks(x), weights, strict=True)
    return _total((x[part] * weight).square_().sum(0) for part, weight in parts).topk(count).indices


def _total(parts: Iterable[Tensor]) -> Tensor:
    """The sum of at least one tensor."""
    return functools.reduce(torch.add, parts)


def _reciprocal(typical: Tensor) -> Tensor:
    """1 / typical; 0 where that is 0 or not finite, so that a line is judged by the lines that can be compared."""
    usable = torch.isfinite(typical) & (typical > 0)
    return torch.where(usable, typical, torch.ones_like(typical)).reciprocal_().mul_(usable)
