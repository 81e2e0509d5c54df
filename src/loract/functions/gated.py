"""act(gate) * up, and a lone act(x): the product is never stored, it is rebuilt from the packed operands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from loract.codecs.base import Memo, Packed, Recomputed, tokens_features
from loract.functions.base import Autocast, Forward, first_order, load, save


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


@dataclass(frozen=True, kw_only=True)
class _Rebuilt:
    """The operands and act(gate) with its graph, rebuilt once for both of their readers.

    In backward the product's reader comes first, then the product's own gradient: each would otherwise decode the
    operands and run the activation again.
    """

    activation: Forward
    shape: torch.Size
    memo: Memo

    def get(self, operands: Sequence[Packed]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gate (a leaf), act(gate) and up, of the activation's own shape."""
        return self.memo.get(lambda: self._rebuild(operands))  # type: ignore[return-value]

    def _rebuild(self, operands: Sequence[Packed]) -> tuple[Tensor, Tensor, Tensor | None]:
        gate = operands[0].read().detach().reshape(self.shape).requires_grad_()
        with torch.enable_grad():
            active = self.activation(gate)
        return gate, active, operands[1].read().reshape(self.shape) if len(operands) > 1 else None

    def product(self, *operands: Packed) -> Tensor:
        """The output."""
        _, active, up = self.get(operands)
        return active.detach() if up is None else active.detach() * up


class _Gated(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor | None, call: GatedCall) -> Tensor:
        active = call.activation(gate)
        out = active if up is None else active * up
        operands = (call.gate,) if call.up is None else (call.gate, call.up)
        for packed in operands:
            packed.reserve()
        activation = Autocast.of(gate).wrap(call.activation)
        # Not ctx itself: the output's representation would tie the graph to itself and keep both alive.
        ctx.rebuilt = rebuilt = _Rebuilt(activation=activation, shape=gate.shape, memo=Memo())
        rebuilt.memo.reserve()
        call.output = Recomputed(
            inputs=operands,
            function=rebuilt.product,
            shape=tokens_features(gate),
            dtype=out.dtype,
            memo=Memo(rebuilt.memo),
        )
        save(ctx, operands)
        return out

    @staticmethod
    @first_order
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator hides the names)
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        operands, _ = load(ctx)
        gate, active, up = ctx.rebuilt.get(operands)
        grad_up = (grad * active.detach()).to(up.dtype) if up is not None and ctx.needs_input_grad[1] else None
        grad_gate = None
        if ctx.needs_input_grad[0]:
            upstream = grad if up is None else grad * up
            (grad_gate,) = torch.autograd.grad(active, gate, upstream.to(active.dtype), retain_graph=True)
        return grad_gate, grad_up, None
