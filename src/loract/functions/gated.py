"""act(gate) * up, and a lone act(x): the product is never stored, it is rebuilt from the packed operands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from loract.codecs.base import Memo, Packed, Recomputed, tokens_features
from loract.functions.base import Autocast, Forward, load, save


@dataclass(kw_only=True)
class GatedCall:
    """One call: the activation, the packed operands, and afterwards what stands for the output."""

    activation: Forward
    gate: Packed
    up: Packed | None
    output: Packed | None = None


def gated(gate: Tensor, up: Tensor | None, call: GatedCall) -> Tensor:
    """act(gate) * up for gate, up (..., n), or act(gate) where up is None; `call.output` then represents it."""
    return _Gated.apply(gate, up, call)  # type: ignore[no-any-return]


class _Gated(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor | None, call: GatedCall) -> Tensor:
        active = call.activation(gate)
        out = active if up is None else active * up
        operands = (call.gate,) if call.up is None else (call.gate, call.up)
        ctx.activation = Autocast.of(gate).wrap(call.activation)
        ctx.like = [None if t is None else (t.shape, t.dtype) for t in (gate, up)]
        call.output = Recomputed(
            inputs=operands,
            function=_rebuilt(ctx.activation),
            shape=tokens_features(gate),
            dtype=out.dtype,
            memo=Memo(),
        )
        save(ctx, operands)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        operands, _ = load(ctx)
        (shape, dtype), like_up = ctx.like
        gate = operands[0].decode().detach().reshape(shape).requires_grad_()
        with torch.enable_grad():
            active = ctx.activation(gate)
        grad_up = None
        upstream = grad
        if like_up is not None:
            grad_up = (grad * active.detach()).to(like_up[1]) if ctx.needs_input_grad[1] else None
            upstream = grad * operands[1].decode().reshape(like_up[0])
        grad_gate = None
        if ctx.needs_input_grad[0]:
            (grad_gate,) = torch.autograd.grad(active, gate, upstream.to(active.dtype))
            grad_gate = grad_gate.to(dtype)
        return grad_gate, grad_up, None


def _rebuilt(activation: Forward) -> Forward:
    # A closure over ctx would tie the output's representation to the graph and keep both alive.
    def product(gate: Tensor, *up: Tensor) -> Tensor:
        active = activation(gate)
        return active * up[0] if up else active

    return product
