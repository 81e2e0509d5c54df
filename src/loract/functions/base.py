"""What every autograd Function of the package shares: saving packed tensors, restoring autocast."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loract.codecs.base import Packed, bind_all, unbound
from loract.device import autocast_type
from loract.errors import LoractError

Forward = Callable[..., Any]
"""A module's own forward: functions obtain their output by running it, so that values never change."""


def save(ctx: Any, packed: tuple[Packed, ...], *others: Tensor | None) -> None:
    """Keep `packed` and `others` through save_for_backward: attributes of ctx would escape saved-tensor hooks."""
    ctx.save_for_backward(*others, *(t for p in packed for t in p.tensors))
    ctx.others = len(others)
    ctx.packed = tuple(unbound(p) for p in packed)


def load(ctx: Any) -> tuple[tuple[Packed, ...], tuple[Tensor | None, ...]]:
    """The packed tensors and the others, in the order they were saved."""
    saved = ctx.saved_tensors
    return bind_all(ctx.packed, saved[ctx.others :]), saved[: ctx.others]


def owned(x: Tensor) -> Tensor:
    """X, no longer a view: what a Function returns as a view autograd lets nobody edit in place, and models do."""
    return x.data if x._is_view() else x


@dataclass(frozen=True, kw_only=True)
class Autocast:
    """The autocast state of a forward pass, to run part of it again in backward."""

    device_type: str
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Tensor) -> Autocast:
        """The state now, for x's device."""
        kind = autocast_type(x)
        return cls(device_type=kind, enabled=torch.is_autocast_enabled(kind), dtype=torch.get_autocast_dtype(kind))

    def wrap(self, function: Forward) -> Forward:
        """`function`, run in this state."""

        def restored(*args: Any, **kwargs: Any) -> Any:
            with torch.autocast(self.device_type, dtype=self.dtype, enabled=self.enabled):
                return function(*args, **kwargs)

        return restored


def no_autocast(x: Tensor) -> torch.autocast:
    """Backward formulas choose their own precision."""
    return torch.autocast(autocast_type(x), enabled=False)


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward formula without a derivative of its own, as a refusal of `create_graph=True`.

    torch's once_differentiable speaks up later, and not at all where the gradient that comes in is a constant: a second
    derivative would then silently lack what the formula reads.
    """

    @functools.wraps(backward)
    def guarded(ctx: Any, *grads: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise LoractError(
                "a backward pass with create_graph=True through compressed activations",
                "first derivatives",
                "leave create_graph out, or call handle.detach() for second derivatives",
            )
        return backward(ctx, *grads)

    return guarded
