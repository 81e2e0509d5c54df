"""RMSNorm and LayerNorm families with one packed tensor for the norm and for everything that reads its output.

With r = rstd, xhat = r (x - mean) and y = xhat * w + b:
    dx = r (gw - [mean(gw)] - xhat mean(gw * xhat)),  gw = g * w    (the bracket only where the norm centres).
Exact codec: x is kept; xhat and y are recomputed by the module's own arithmetic. Lossy codecs factor s * xhat, from
which both xhat (columns 1/s) and y (columns w/s, bias b) are views.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from loract.codecs.base import Memo, Packed, Recomputed, tokens_features, unbound
from loract.cpu import unwidened
from loract.functions.base import Autocast, Forward, first_order, load, no_autocast, owned, save
from loract.linalg import promote, row_chunks, row_energies


@dataclass(frozen=True, kw_only=True)
class NormRole:
    """What a norm module computes: y = rstd (x - [mean]) (offset + weight) + bias over the last dimension."""

    centred: bool
    offset: float
    eps: float
    weight: str | None
    bias: str | None

    def scale(self, weight: Tensor | None) -> Tensor | None:
        """The factor offset + weight (n,), in fp32 or wider; None stands for ones."""
        return None if weight is None else promote(weight) + self.offset

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Rstd (N, 1) and, where the norm centres, mean (N, 1) of x (N, n), accumulated in fp32 or wider."""
        if self.centred:
            if not len(x):  # of which var_mean warns
                return promote(x[:, :1]), promote(x[:, :1])
            variance, mean = torch.var_mean(promote(x), dim=-1, keepdim=True, correction=0)
            return (variance + self.eps).rsqrt_(), mean
        return row_energies(x).div_(x.shape[-1]).add_(self.eps).rsqrt_()[:, None], None

    def mean(self, x: Tensor) -> Tensor | None:
        """Mean (N, 1) of x (N, n), where the norm centres.

        Of an inexact x its own mean is the better one to take out: with it goes what the errors have in common.
        """
        return promote(x).mean(-1, keepdim=True) if self.centred else None

    def normalise(self, x: Tensor, rstd: Tensor, mean: Tensor | None) -> Tensor:
        """Xhat (N, n) in fp32 or wider."""
        return (promote(x) if mean is None else x - mean) * rstd


def metric(scale: Tensor | None) -> Tensor | None:
    """Per-channel s in which xhat is factored: between 1 and |w|, never zero, so that no reader divides by zero.

    Factoring y = xhat * w serves its readers but loses channels with w = 0, which the norm's own backward needs
    (Gemma's 1 + w reaches zero in real weights); factoring xhat serves neither well where weights differ widely.
    """
    return None if scale is None else (1 + scale.abs()) / 2


@dataclass(kw_only=True)
class NormCall:
    """One call of a norm: how to run it, how to pack s * xhat (lossy) or x, and then what stands for its output.

    `statistics`: keep rstd, because x will come back inexact.
    """

    role: NormRole
    forward: Forward
    lossy: bool
    encode: Callable[[Tensor], Packed]
    statistics: bool = False
    output: Packed | None = None
    rstd: Tensor | None = None
    mean: Tensor | None = None


def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, call: NormCall) -> Tensor:
    """Y = call.forward(x) for x (..., n); `call.output` then represents y for the products that read it."""
    return _Norm.apply(x, weight, bias, call)  # type: ignore[no-any-return]


def normalised(packed: Packed, forward: Forward, x: Tensor, dtype: torch.dtype) -> Recomputed:
    """Forward(x) for x (..., n) that `packed` stands for, by the module's own arithmetic and never kept."""
    return Recomputed(
        inputs=(packed,),
        function=_reshaped(Autocast.of(x).wrap(forward), x.shape),
        shape=tokens_features(x),
        dtype=dtype,
        memo=Memo(packed),
    )


def represented(node: Any) -> Packed | None:
    """What stands for the output of the exact norm whose node in the graph this is; None for any other node."""
    output: Packed | None = getattr(node, "loract_output", None)
    return None if output is None else output.bind(node.saved_tensors[node.others :])


class _Norm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, call: NormCall) -> Tensor:
        y = owned(call.forward(x))
        ctx.role, ctx.lossy, ctx.like = call.role, call.lossy, (x.shape, x.dtype)
        ctx.dtypes = [None if t is None else t.dtype for t in (weight, bias)]
        flat, rstd, mean = x.reshape(-1, x.shape[-1]), None, None
        if call.lossy or call.statistics:
            with no_autocast(x):
                rstd, mean = call.rstd, call.mean = call.role.statistics(flat)
        if call.lossy:
            with no_autocast(x):
                assert rstd is not None
                scale = call.role.scale(weight)
                s = metric(scale)
                value = torch.empty_like(flat)
                for part in row_chunks(flat):
                    xhat = call.role.normalise(flat[part], rstd[part], None if mean is None else mean[part])
                    value[part] = xhat if s is None else xhat.mul_(s)
                packed = call.encode(value)
                inverse = None if s is None else s.reciprocal()
                cols = None if s is None or scale is None else scale / s
                shift = None if bias is None else promote(bias)
                call.output = packed.affine(cols=cols, bias=shift, dtype=y.dtype)
                packed = packed.affine(cols=inverse, dtype=promote(x[:0]).dtype)
        else:
            packed = call.encode(x)
            call.output = normalised(packed, call.forward, x, y.dtype)
            ctx.loract_output = unbound(call.output)
        packed.reserve()
        save(ctx, (packed,), weight, rstd)
        return y

    @staticmethod
    @first_order
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator hides the names)
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        (packed,), (weight, rstd) = load(ctx)
        role, (shape, dtype) = ctx.role, ctx.like
        with no_autocast(grad), unwidened():
            grad = grad.reshape(-1, shape[-1])
            kept, scale = packed.read(), role.scale(weight)
            out = torch.empty(kept.shape, dtype=dtype, device=kept.device)
            grad_weight = torch.zeros_like(scale) if scale is not None and ctx.needs_input_grad[1] else None
            for part in row_chunks(kept):  # the fp32 temporaries of some ten elementwise passes stay in cache
                g, x = grad[part], kept[part]
                if ctx.lossy:
                    assert rstd is not None
                    xhat, r = x, rstd[part]
                else:
                    r, m = role.statistics(x) if rstd is None else (rstd[part], role.mean(x))
                    xhat = role.normalise(x, r, m)
                gw = promote(g) if scale is None else g * scale
                if grad_weight is not None:
                    grad_weight += (g * xhat).sum(0)
                dot = (gw * xhat).mean(-1, keepdim=True)
                if role.centred:
                    gw = gw - gw.mean(-1, keepdim=True)
                out[part] = torch.addcmul(gw, xhat, dot, value=-1).mul_(r)
            grad_bias = promote(grad).sum(0) if ctx.needs_input_grad[2] else None
        cast = [None if g is None else g.to(d) for g, d in zip((grad_weight, grad_bias), ctx.dtypes, strict=True)]
        return out.reshape(shape), *cast, None


def _reshaped(forward: Forward, shape: torch.Size) -> Callable[[Packed], Tensor]:
    return lambda packed: forward(packed.read().reshape(shape))
