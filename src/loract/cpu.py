"""bf16 on processors that cannot multiply it: products taken in fp32 and rounded once.

Without AVX-512 or AMX, PyTorch multiplies bf16 matrices by plain loops, 10 to 300 times slower than fp32. Widening the
operands of each product gives what bf16 hardware gives (fp32 accumulation, one rounding) at nearly fp32's speed, while
everything that is stored stays bf16: memory and the ratio of two methods' times then mean what they mean elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode,  # pyright: ignore[reportPrivateUsage]
    _pop_mode_temporarily,  # pyright: ignore[reportPrivateUsage]
)
from torch.utils._pytree import tree_map_only

_aten = torch.ops.aten
_PRODUCTS: set[Callable[..., Any]] = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.baddbmm.default,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
}
_INTO = {_aten.mm.out: _aten.mm.default, _aten.addmm.out: _aten.addmm.default, _aten.bmm.out: _aten.bmm.default}
"""The same written into a tensor that is given."""


def native_bf16() -> bool:
    """Whether this processor multiplies bf16 matrices at full speed, as PyTorch itself decides it."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is None or bool(supported())


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which products of tensors like x are fast: fp32 for 16 bits on a processor that widens them."""
    fast = not x.is_cpu or (x.dtype == torch.bfloat16 and native_bf16())
    return x.dtype if fast else torch.promote_types(x.dtype, torch.float32)


class WidenedProducts(TorchDispatchMode):
    """While active, matrix products and attention's backward of bf16 CPU tensors are computed in fp32."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _INTO and _is_bf16_cpu(args[0]):
            out: Tensor = kwargs.pop("out")
            return out.copy_(_INTO[func](*tree_map_only(Tensor, _widen, args), **kwargs))
        if func not in _PRODUCTS or not _is_bf16_cpu(args[0]):
            return func(*args, **kwargs)
        out = func(*tree_map_only(Tensor, _widen, args), **kwargs)
        return tree_map_only(Tensor, lambda t: t.bfloat16() if t.dtype == torch.float32 else t, out)


def fast_bf16() -> AbstractContextManager[object]:
    """`WidenedProducts` where the processor needs it, nothing where it does not.

    Example:
        >>> a = torch.ones(2, 3, dtype=torch.bfloat16)
        >>> with fast_bf16():
        ...     (a @ a.T).dtype
        torch.bfloat16
    """
    return nullcontext() if native_bf16() else WidenedProducts()


def unwidened() -> AbstractContextManager[object]:
    """Without `WidenedProducts`, for arithmetic that is in fp32 anyway: many small operators spare the detour."""
    innermost = isinstance(_get_current_dispatch_mode(), WidenedProducts)
    return _pop_mode_temporarily() if innermost else nullcontext()


def _is_bf16_cpu(x: object) -> bool:
    return isinstance(x, Tensor) and x.dtype == torch.bfloat16 and x.is_cpu


def _widen(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.bfloat16 else x
