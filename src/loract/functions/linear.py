"""A linear map inside a region that runs again: its gradient is the map's own, its value is supplied.

From factors X ~ C P^T the value is C (W P)^T, for k/n of the multiplications. Where nothing reads the value (the last
projection of a sublayer: the gradient of a linear map does not depend on what the map returned) it is not computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from loract.codecs.base import Packed
from loract.functions.base import Autocast, first_order, load, no_autocast, owned, save
from loract.linalg import promote


def dense_weight(module: Any) -> Tensor | None:
    """W (m, n) of the map x W^T + b that `module` computes; None where that is not known for certain."""
    read = WEIGHTS.get(type(module).__name__)
    return None if read is None else read(module)


def _dense(module: Any) -> Tensor | None:
    # A weight of a class of its own (torchao's) multiplies in a way of its own.
    weight: Tensor = module.weight
    return weight if type(module) is nn.Linear and not is_traceable_wrapper_subclass(weight) else None


def _four_bit(module: Any) -> Tensor | None:
    from bitsandbytes.functional import dequantize_4bit

    weight = module.weight
    state = getattr(weight, "quant_state", None)
    if state is None or getattr(state, "packing_format_for_cpu", False):  # a layout for inference
        return None
    dtype = module.compute_dtype if module.compute_dtype is not None else state.dtype
    return dequantize_4bit(weight.data, state).to(dtype)


PACKS = "support_avx512bf16_for_cpu"
"""Attribute of bitsandbytes' 4-bit maps: whether evaluation on a CPU may change the weight's layout."""


def packing(model: nn.Module) -> list[nn.Module]:
    """The 4-bit maps of `model` that would change their weight's layout when they are evaluated, changed back.

    On a CPU with bf16 arithmetic bitsandbytes (0.50) packs a weight at its first evaluation without gradients, for
    good, and products with a packed weight have no gradient: training after an evaluation would go on with wrong
    gradients and no more than a warning. Switch the attribute `PACKS` off on these modules to prevent it. Packing has
    rounded the scales to bf16, and changing it back does not undo that.
    """
    found = [module for module in model.modules() if getattr(module, PACKS, False)]
    for module in found:
        weight: Any = module.weight
        if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
            from bitsandbytes.functional import (
                _convert_weight_packed_for_cpu_inverse as unpack,  # pyright: ignore[reportPrivateUsage]
            )

            weight.data, state = unpack(weight.data, weight.quant_state)
            if not state.nested:  # its scales, (blocks of a row, rows) while packed, are left so
                state.absmax = state.absmax.T.reshape(-1).float()
            weight.quant_state = state
    return found


WEIGHTS: dict[str, Callable[[Any], Tensor | None]] = {
    "Linear": _dense,
    "Conv1D": lambda module: module.weight.T,
    "Linear4bit": _four_bit,
}
"""By the class's name, so that no optional package is imported. A subclass may compute anything: it is not listed."""


def supplied_linear(x: Tensor, weight: Tensor, bias: Tensor | None, packed: Packed | None, *, read: bool) -> Tensor:
    """A tensor (..., m) in the place of x W^T + b, for x (..., n), W (m, n), with that map's gradient.

    `packed` represents x: the value is computed from it where `read`, and so is W's gradient where W trains.
    Unread, the value is NaN, so that a reader that should not exist is loud.
    """
    return _Supplied.apply(x, weight, bias, packed, read)  # type: ignore[no-any-return]


class _Supplied(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, packed: Packed | None, read: bool) -> Tensor:
        autocast = Autocast.of(x)
        dtype = autocast.dtype if autocast.enabled else weight.dtype
        shape = (*x.shape[:-1], weight.shape[0])
        if read:
            assert packed is not None
            with no_autocast(x):
                value = packed.linear(weight).to(dtype).reshape(shape)
                if bias is not None:
                    value += bias
        else:
            value = torch.full(shape, torch.nan, dtype=dtype, device=x.device)
        save(ctx, () if packed is None else (packed,), weight)
        ctx.dtypes = (x.dtype, None if bias is None else bias.dtype)
        return owned(value)

    @staticmethod
    @first_order
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator hides the names)
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        packed, (weight,) = load(ctx)
        assert weight is not None
        x_dtype, bias_dtype = ctx.dtypes
        grad_x = grad_weight = grad_bias = None
        with no_autocast(grad):
            if ctx.needs_input_grad[0]:
                grad_x = (grad.to(weight.dtype) @ weight).to(x_dtype)
            if ctx.needs_input_grad[1]:
                grad_weight = packed[0].contract(grad.reshape(-1, grad.shape[-1])).to(weight.dtype)
            if ctx.needs_input_grad[2]:
                grad_bias = promote(grad).reshape(-1, grad.shape[-1]).sum(0).to(bias_dtype)
        return grad_x, grad_weight, grad_bias, None, None
