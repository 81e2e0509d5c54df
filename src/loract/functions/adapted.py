"""A linear map with a LoRA adapter in a region that runs again: one product with the merged weight.

y = x M^T + b with M = W + s B A, made for the moment; for the upstream gradient g (N, m):
    dx = g M,  dA = s (g B)^T x,  dB = s g^T (x A^T).
PEFT's own forward widens x, runs the adapter beside the base and adds two (N, m) tensors. The first run does exactly
that, since values may not change; what backward needs is another matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from loract.codecs.base import contract_dense
from loract.cpu import product_dtype, unwidened
from loract.functions.base import first_order, no_autocast, owned
from loract.linalg import promote


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A (r, n), B (m, r) and the factor s of their product."""

    a: Tensor
    b: Tensor
    scaling: float


def single_adapter(layer: Any) -> Adapter | None:
    """The one adapter that a LoRA layer applies; None where it does anything else (none, several, merged, dropout)."""
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(names) != 1 or layer.disable_adapters or layer.merged or names[0] in getattr(layer, "lora_variant", {}):
        return None
    (name,) = names
    a, b, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    if (dropout.training and getattr(dropout, "p", 0.0) > 0) or type(a) is not nn.Linear or type(b) is not nn.Linear:
        return None
    if a.bias is not None or b.bias is not None:
        return None
    return Adapter(a=a.weight, b=b.weight, scaling=float(layer.scaling[name]))


def in_place(base: Tensor, x: Tensor, layer: Any, adapter: Adapter) -> Tensor:
    """Base + s B (A x), bit for bit as PEFT adds them but without its three temporaries; overwrites `base` (..., m).

    x (..., n) is the layer's input. For runs without a graph, of a layer that `adds_in_place` knows.
    """
    name = next(name for name in layer.active_adapters if name in layer.lora_A)
    added = layer.lora_B[name](layer.lora_A[name](x.to(adapter.a.dtype))).mul_(adapter.scaling)
    if _arithmetic(layer) == _ROUNDED:
        return base.add_(added.to(base.dtype))
    added.add_(base)
    return added if added.dtype == base.dtype else base.copy_(added)


def adds_in_place(layer: Any) -> bool:
    """Whether it is known in which precision PEFT adds the two, by the file that the layer's forward comes from."""
    return _arithmetic(layer) in (_WIDE, _ROUNDED)


_WIDE, _ROUNDED = "peft.tuners.lora.layer", "peft.tuners.lora.bnb"
"""The sum is rounded to the base's precision, or the adapter's part before it is added."""


def _arithmetic(layer: Any) -> str:
    return type(layer).forward.__module__


def merge(weight: Tensor, adapter: Adapter) -> Tensor:
    """M = W + s B A (m, n), rounded once, in the dtype in which this device multiplies W's."""
    wide = promote(weight.detach())
    a, b = adapter.a.detach().to(wide.dtype), adapter.b.detach().to(wide.dtype)
    return torch.addmm(wide, b, a, alpha=adapter.scaling).to(product_dtype(weight))


def adapted_linear(
    x: Tensor, merged: Tensor, bias: Tensor | None, adapter: Adapter, dtype: torch.dtype, *, read: bool
) -> Tensor:
    """Y (..., m) = x M^T + b in `dtype`, for x (..., n); unless `read` it is NaN, so that a reader is loud."""
    return _Adapted.apply(x, merged, bias, adapter.a, adapter.b, adapter.scaling, dtype, read)  # type: ignore[no-any-return]


class _Adapted(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        merged: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
        dtype: torch.dtype,
        read: bool,
    ) -> Tensor:
        with no_autocast(x), unwidened():
            flat = x.reshape(-1, x.shape[-1]).to(merged.dtype)
            z = flat @ a.to(merged.dtype).T
            if read:
                y = flat @ merged.T if bias is None else torch.addmm(bias.to(merged.dtype), flat, merged.T)
                y = y.to(dtype)
            else:
                y = torch.full((len(flat), len(merged)), torch.nan, dtype=dtype, device=x.device)
        ctx.save_for_backward(x, merged, a, b, z)
        ctx.scaling = scaling
        return owned(y.reshape(*x.shape[:-1], len(merged)))

    @staticmethod
    @first_order
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator hides the names)
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, merged, a, b, z = ctx.saved_tensors
        with no_autocast(grad), unwidened():
            g = grad.reshape(-1, grad.shape[-1]).to(merged.dtype)
            grad_x = (g @ merged).to(x.dtype).reshape(x.shape) if ctx.needs_input_grad[0] else None
            z_grad, flat = (g @ b.to(g.dtype)).mul_(ctx.scaling), x.reshape(-1, x.shape[-1])
            # In 16 bits where their products are fast: rounded once, they err less than g does.
            grad_a = (z_grad.T @ flat if flat.dtype == g.dtype else contract_dense(z_grad, flat)).to(a.dtype)
            grad_b = (g.T @ z).to(b.dtype).mul_(ctx.scaling)
        return grad_x, None, None, grad_a, grad_b, None, None, None
