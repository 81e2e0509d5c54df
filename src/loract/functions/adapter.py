"""The product z = x A^T of a LoRA adapter, its gradient contracted with a packed x.

dA = g^T X is read from the representation (for factors (g^T C) P^T, LoRAct arXiv:2509.23472), dx = g A is exact.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function

from loract.codecs.base import Packed
from loract.functions.base import Forward, first_order, load, no_autocast, save
from loract.linalg import promote


def adapter_product(x: Tensor, weight: Tensor, packed: Packed, forward: Forward) -> Tensor:
    """Z = forward(x) = x A^T, keeping `packed` instead of x.

    x (..., n) is what A multiplies; A = weight (r, n); `packed` represents x, or what x was cast from.
    """
    return _Product.apply(x, weight, packed, forward)  # type: ignore[no-any-return]


class _Product(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, packed: Packed, forward: Forward) -> Tensor:
        packed.reserve()
        save(ctx, (packed,), weight)
        ctx.dtype = x.dtype
        return forward(x)

    @staticmethod
    @first_order
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator hides the names)
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        (packed,), (weight,) = load(ctx)
        assert weight is not None
        with no_autocast(grad):
            grad_x = (grad @ weight.to(grad.dtype)).to(ctx.dtype) if ctx.needs_input_grad[0] else None
            flat = promote(grad).reshape(-1, grad.shape[-1])
            grad_weight = packed.contract(flat).to(weight.dtype)
        return grad_x, grad_weight, None, None
