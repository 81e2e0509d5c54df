"""The loss of a language model's head without the logits of all tokens, and without a second copy of the weight."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function

from loract.errors import InvalidSpec
from loract.functions.base import first_order

IGNORED = -100
"""Label of a token that does not count."""


def head_loss(hidden: Tensor, weight: Tensor, labels: Tensor, *, chunk: int = 128) -> Tensor:
    """Mean cross entropy of the logits h W^T, for hidden (tokens, features), weight (vocabulary, features), labels.

    `chunk` tokens have logits at once, in fp32. Both gradients are made with them, in the dtypes of hidden and weight,
    so nothing is computed twice; backward scales them in place and can therefore run once.
    `torch.nn.functional.linear_cross_entropy` gives the same and copies a 16-bit weight to fp32, and the weight's
    gradient once more.

    Raises:
        InvalidSpec: shapes that do not fit, or a chunk below 1.

    Example:
        >>> h, w, y = torch.ones(3, 2), torch.ones(5, 2), torch.tensor([0, 4, IGNORED])
        >>> round(float(head_loss(h, w, y)), 4)  # log 5
        1.6094
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or labels.shape != hidden.shape[:1]:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (hidden, weight, labels))
        raise InvalidSpec(f"shapes {shapes}", "(tokens, features), (vocabulary, features), (tokens,)", "flatten tokens")
    if chunk < 1:
        raise InvalidSpec(f"chunk={chunk!r}", "at least 1 token", "use chunk=128")
    return cast(Tensor, _HeadLoss.apply(hidden, weight, labels, chunk))


class _HeadLoss(Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:
        wanted = ctx.needs_input_grad[:2]
        counted = labels != IGNORED
        share = counted / counted.sum().clamp_min(1)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        to_hidden = torch.empty_like(hidden) if wanted[0] else None
        to_weight = torch.zeros_like(weight) if wanted[1] else None
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            logits = (hidden[rows] @ weight.T).float()
            targets, parts = labels[rows].clamp_min(0)[:, None], share[rows][:, None]
            norms = logits.logsumexp(1, keepdim=True)
            total += ((norms - logits.gather(1, targets)) * parts).sum()
            if any(wanted):
                # softmax - one-hot, times the token's share
                slopes = logits.sub_(norms).exp_().mul_(parts).scatter_add_(1, targets, -parts).to(hidden.dtype)
                if to_hidden is not None:
                    torch.mm(slopes, weight, out=to_hidden[rows])
                if to_weight is not None:
                    to_weight.addmm_(slopes.T, hidden[rows])
                del slopes
            del logits  # or they live until the next chunk's are complete
        ctx.save_for_backward(*(t for t in (to_hidden, to_weight) if t is not None))
        ctx.wanted = wanted
        return total

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        made = iter(ctx.saved_tensors)
        return (*(next(made).mul_(grad) if wanted else None for wanted in ctx.wanted), None, None)
