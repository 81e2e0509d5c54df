"""A region of the model that keeps its packed inputs alone and runs again in backward.

Trainable parameters are inputs of the Function, so that distributed wrappers, accumulation and users' hooks see one
ordinary gradient each; the second run reads detached aliases of them, whose gradients autograd.grad returns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from loract.codecs.base import Memo, Packed, Recomputed, tokens_features
from loract.codecs.exact import ExactPacked
from loract.functions.base import first_order, load, owned, save

Leaves = Sequence[Tensor]
TOKENS = 1024
"""Tokens taken at a time where a region acts on each by itself: enough for efficient products."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Again:
    """How to run the module a second time; see `Rerun.again`. `release` drops what its runs share."""

    run: Callable[[Leaves, Sequence[Packed], Sequence[Packed], bool], tuple[list[Tensor], list[Tensor]]]
    release: Callable[[], None]


@dataclass(kw_only=True, eq=False)
class Rerun:
    """One call of a region: how to run it, its packed inputs, and afterwards what stands for each output.

    `values(tensors)` runs the module as it is: the tensors that it returns, and how to put others in their places.
    `again.run(inputs, packed, kept, unread)` runs it with a graph from leaves, given what is packed for each and what
    the first run has `kept` on its way, and returns its outputs and the aliases of the trainable parameters; with
    `unread` it may leave out values that no gradient depends on, the outputs' among them.
    """

    values: Callable[[Leaves], tuple[list[Tensor], Callable[[Leaves], Any]]]
    again: Again
    operands: tuple[Packed, ...]
    differentiable: tuple[bool, ...]
    """Which outputs have a gradient."""
    by_token: bool
    """Whether the module acts on every token by itself: backward may then take some at a time."""
    kept: list[Packed] = field(default_factory=lambda: list[Packed]())
    """Values inside the module that the first run packs. They may be lossy: gradients read them, outputs never."""
    remake: Callable[[Leaves], Any] | None = None
    outputs: list[tuple[Tensor, Packed]] = field(default_factory=lambda: list[tuple[Tensor, Packed]]())


def checkpoint(rerun: Rerun, tensors: Leaves, parameters: Leaves) -> Any:
    """What the module returns for `tensors`; `rerun.outputs` then pairs its tensors with what stands for them."""
    out: Any = _Checkpoint.apply(rerun, len(tensors), *tensors, *parameters)
    assert rerun.remake is not None
    rerun.outputs = [(t, packed) for t, (_, packed) in zip(out, rerun.outputs, strict=True)]
    return rerun.remake(out)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Graph:
    """The region with its graph, rebuilt once for its own gradient and for the readers of its outputs."""

    again: Again
    like: tuple[tuple[torch.Size, bool], ...]
    """Shape of each input, and whether it requires a gradient."""
    by_token: bool
    memo: Memo

    def get(
        self, operands: Sequence[Packed], kept: Sequence[Packed] = ()
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Inputs (leaves), outputs, and aliases of the trainable parameters."""
        return self.memo.get(lambda: self._rebuild(operands, kept))  # type: ignore[return-value]

    def _rebuild(
        self, operands: Sequence[Packed], kept: Sequence[Packed]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        inputs = [
            _dense(p, shape).detach().requires_grad_(grad) for p, (shape, grad) in zip(operands, self.like, strict=True)
        ]
        outputs, aliases = self.again.run(inputs, operands, () if self.read else kept, not self.read)
        self.again.release()
        return inputs, outputs, aliases

    @property
    def read(self) -> bool:
        """Whether somebody else reads an output."""
        return self.memo.readers > 1

    def gradients(
        self, operands: Sequence[Packed], kept: Sequence[Packed], grads: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """Gradients of the inputs and of the trainable parameters."""
        if self.by_token and not self.read and grads[0] is not None:
            return self._by_token(operands[0], grads[0])
        inputs, outputs, aliases = self.get(operands, kept)
        return _gradients(outputs, grads, [*inputs, *aliases], retain=self.memo.kept)

    def _by_token(self, packed: Packed, grad: Tensor) -> list[Tensor | None]:
        """The same for one input, some tokens at a time: the wide tensors inside never exist as a whole."""
        shape, wanted = self.like[0]
        grad = grad.reshape(-1, grad.shape[-1])
        dense = None if packed.factored else packed.read()
        out: Tensor | None = None
        sums: list[Tensor | None] = []
        for start in range(0, len(grad), TOKENS):
            part = slice(start, start + TOKENS)
            rows = packed.rows(part) if dense is None else packed
            leaf = (rows.decode() if dense is None else dense[part])[None].detach().requires_grad_(wanted)
            outputs, aliases = self.again.run([leaf], [rows], (), True)
            upstream = grad[part].reshape(outputs[0].shape)
            grad_leaf, *others = _gradients(outputs, [upstream], [leaf, *aliases], retain=False)
            del outputs  # with its graph, before the next part is run
            if grad_leaf is not None:
                out = grad_leaf.new_empty(len(grad), shape[-1]) if out is None else out
                out[part] = grad_leaf[0]
            sums = others if start == 0 else [_sum(a, b) for a, b in zip(sums, others, strict=True)]
        self.again.release()
        return [None if out is None else out.reshape(shape), *sums]

    def value(self, index: int) -> Callable[..., Tensor]:
        """The function of the operands that gives output `index`."""
        return lambda *operands: self.get(operands)[1][index].detach()


class _Checkpoint(Function):
    @staticmethod
    def forward(ctx: Any, rerun: Rerun, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        inputs = tensors[:count]
        outputs, rerun.remake = rerun.values(inputs)
        outputs = [owned(out) for out in outputs]
        like = tuple((t.shape, t.requires_grad) for t in inputs)
        ctx.graph = graph = _Graph(again=rerun.again, like=like, by_token=rerun.by_token, memo=Memo())
        graph.memo.reserve()
        for packed in (*rerun.operands, *rerun.kept):
            packed.reserve()
        for i, out in enumerate(outputs):
            shape, memo = tokens_features(out), Memo(graph.memo)
            packed = Recomputed(inputs=rerun.operands, function=graph.value(i), shape=shape, dtype=out.dtype, memo=memo)
            rerun.outputs.append((out, packed))
        # The parameters for their versions alone: autograd refuses those that were edited since.
        save(ctx, (*rerun.operands, *rerun.kept), *tensors[count:])
        ctx.count = len(rerun.operands)
        ctx.mark_non_differentiable(*(out for out, grad in zip(outputs, rerun.differentiable, strict=True) if not grad))
        return tuple(outputs)

    @staticmethod
    @first_order
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator hides the names)
        ctx: Any, *grads: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        packed, _ = load(ctx)
        return None, None, *ctx.graph.gradients(packed[: ctx.count], packed[ctx.count :], grads)


def _gradients(outputs: Leaves, grads: Sequence[Tensor | None], leaves: Leaves, *, retain: bool) -> list[Tensor | None]:
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    if not pairs:
        return [None] * len(leaves)
    reached, upstream = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(reached, wanted, upstream, allow_unused=True, retain_graph=retain))
    return [next(found) if leaf.requires_grad else None for leaf in leaves]


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a.add_(b)


def _dense(packed: Packed, shape: torch.Size) -> Tensor:
    # An exact tensor keeps its layout: flattening an expanded mask would write it out.
    return packed.kept[0] if isinstance(packed, ExactPacked) else packed.read().reshape(shape)
