"""Scaled dot product attention on CPU, block by block: its output, and the gradients from scores formed again.

Rows of P are whole in a block: softmax needs no running maximum, and rowsum(P * dP) comes from P and dP.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loract.cpu import product_dtype
from loract.functions.attention_plan import SCORES, Block, Plan, attends, four, parts
from loract.linalg import promote

Part = tuple[slice, slice]
"""Batch entries and key heads."""


@dataclass(frozen=True)
class Operands:
    """q (B, H, S, D), k and v (B, Hkv, T, D), and which blocks of scores there are."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scale: float
    plans: tuple[Plan, ...]

    def grouped(self, x: Tensor) -> Tensor:
        """X (B, H, S, D) as a view (B, Hkv, H / Hkv, S, D): query heads beside the others that read their key head."""
        return x.unflatten(1, (self.key.shape[1], -1))

    def pieces(self) -> Iterator[tuple[Part, Plan]]:
        """Batch entries and key heads taken together, and their blocks."""
        batch, heads, group = len(self.query), self.key.shape[1], self.query.shape[1] // self.key.shape[1]
        for entry, plan in enumerate(self.plans):
            scores = max((b.rows.stop - b.rows.start) * (b.keys.stop - b.keys.start) for b in plan) * group
            fitting = max(1, SCORES // max(1, scores))
            entries = slice(0, batch) if len(self.plans) == 1 else slice(entry, entry + 1)
            for some in parts(entries, max(1, fitting // heads)):
                for part in parts(slice(0, heads), min(heads, fitting)):
                    yield (some, part), plan

    def bias(self, part: Part, rows: slice, keys: slice) -> Tensor:
        """The mask of a block (entries, heads, H / Hkv, rows, keys), or 1 where it is broadcast, bool or float."""
        if self.mask is None:  # causal
            at = torch.arange(rows.start, rows.stop)[:, None]
            return at >= torch.arange(keys.start, keys.stop)
        mask = four(self.mask).expand(-1, -1, self.query.shape[2], self.key.shape[2])[:, :, rows, keys]
        mask = mask if len(mask) == 1 else mask[part[0]]
        return mask[:, None] if mask.shape[1] == 1 else self.grouped(mask)[:, part[1]]


class _Scratch:
    """Buffers used again by every block: fresh ones would spend their time on page faults."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """A contiguous tensor of this shape, whatever it holds."""
        size = torch.Size(shape).numel()
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < size:
            self._buffers.pop(name, None)
            buffer = self._buffers[name] = torch.empty(size, dtype=self.dtype)
        return buffer[:size].view(shape)

    def joined(self, name: str, x: Tensor) -> Tensor:
        """X (entries, heads, T, D) as (entries * heads, T, D) in the working dtype, a view where possible."""
        entries, heads, length, width = x.shape
        flat = entries == 1 or heads == 1 or x.stride(0) == heads * x.stride(1)
        if flat and x.dtype == self.dtype and x.stride(3) == 1 and x.stride(2) >= width:
            return x.flatten(0, 1)
        self.take(name, *x.shape).copy_(x)
        return self.take(name, entries * heads, length, width)

    def stacked(self, name: str, x: Tensor) -> Tensor:
        """X (entries, heads, group, rows, D) as (entries * heads, group * rows, D), copied."""
        entries, heads, group, rows, width = x.shape
        self.take(name, *x.shape).copy_(x)
        return self.take(name, entries * heads, group * rows, width)

    def cast(self, name: str, x: Tensor) -> Tensor:
        """X in the working dtype, itself if it is."""
        return x if x.dtype == self.dtype else self.take(name, *x.shape).copy_(x)


def _probabilities(
    operands: Operands, part: Part, block: Block, query: Tensor, key: Tensor, scratch: _Scratch
) -> Tensor:
    """P (n, group * rows, keys) of a block, for query (n, group * rows, D) and key (n, keys, D)."""
    heads, rows, keys = part[1].stop - part[1].start, block.rows.stop - block.rows.start, key.shape[1]
    scores = _product(query, key.mT, scratch, "scores", operands.scale)
    by_head = scores.view(-1, heads, query.shape[1] // rows, rows, keys)
    for masked in block.masked:
        bias = operands.bias(part, block.rows, masked)
        edge = by_head[..., masked.start - block.keys.start : masked.stop - block.keys.start]
        if bias.dtype == torch.bool:
            edge.masked_fill_(~bias, -torch.inf)
        else:
            edge.add_(bias)
    torch.softmax(scores, -1, out=scores)
    if block.hollow:
        by_head.masked_fill_(~attends(operands.bias(part, block.rows, block.keys)).any(-1, keepdim=True), 0.0)
    return scores


def _like(x: Tensor) -> Tensor:
    """An empty tensor of x's shape (B, H, S, D), laid out as (B, S, H, D): its `canonical` form is a view."""
    batch, heads, length, width = x.shape
    return torch.empty(batch, length, heads, width, dtype=x.dtype, device=x.device).transpose(1, 2)


def _product(a: Tensor, b: Tensor, scratch: _Scratch, name: str, scale: float = 1.0) -> Tensor:
    """Scale a b (n, rows, columns) for a (n, rows, m) and b (n, m, columns)."""
    out = scratch.take(name, *a.shape[:2], b.shape[2])
    return torch.baddbmm(out, a, b, beta=0.0, alpha=scale, out=out)


def _scratches(operands: Operands) -> tuple[_Scratch, _Scratch]:
    """For scores and their gradients, at least fp32; for products that need no more than their operands' 16 bits."""
    scratch, narrow = _Scratch(promote(operands.query[:0]).dtype), product_dtype(operands.query)
    return scratch, scratch if narrow == scratch.dtype else _Scratch(narrow)


def output(operands: Operands) -> Tensor:
    """O = P V."""
    out = _like(operands.query)
    scratch, low = _scratches(operands)
    queries, outs = operands.grouped(operands.query), operands.grouped(out)
    for part, plan in operands.pieces():
        key = scratch.joined("key", operands.key[part])
        value = low.joined("value", operands.value[part])
        for block in plan:
            place = outs[part][:, :, :, block.rows]
            if block.keys.stop == 0:
                place.zero_()
                continue
            query = scratch.stacked("query", queries[part][:, :, :, block.rows])
            p = low.cast("p", _probabilities(operands, part, block, query, key[:, block.keys], scratch))
            place.copy_(_product(p, value[:, block.keys], low, "product").view(place.shape))
    return out


def operand_gradients(operands: Operands, grad: Tensor, wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """dQ, dK, dV, those that are wanted."""
    results = tuple(
        _like(t) if w else None for t, w in zip((operands.query, operands.key, operands.value), wanted, strict=True)
    )
    dq, dk, dv = results
    scratch, low = _scratches(operands)
    queries, grads = operands.grouped(operands.query), operands.grouped(grad)
    dqs = None if dq is None else operands.grouped(dq)
    for part, plan in operands.pieces():
        key = scratch.joined("key", operands.key[part])
        value = scratch.joined("value", operands.value[part])
        low_key = key if low is scratch else low.joined("key", operands.key[part])
        sum_k = None if dk is None else scratch.take("sum_k", *key.shape).zero_()
        sum_v = None if dv is None else scratch.take("sum_v", *value.shape).zero_()
        for block in plan:
            if block.keys.stop == 0:
                if dqs is not None:
                    dqs[part][:, :, :, block.rows].zero_()
                continue
            k, v = key[:, block.keys], value[:, block.keys]
            query = scratch.stacked("query", queries[part][:, :, :, block.rows])
            upstream = scratch.stacked("upstream", grads[part][:, :, :, block.rows])
            p = _probabilities(operands, part, block, query, k, scratch)
            if sum_v is not None:
                _accumulate(sum_v[:, block.keys], low.cast("p", p), low.cast("upstream", upstream), low)
            if dqs is None and sum_k is None:
                continue
            dp = _product(upstream, v.mT, scratch, "dp")
            # dS in dP's place, row by row: one pass where P * (dP - rowsum(P * dP)) would be three.
            ds = torch.ops.aten._softmax_backward_data.out(dp, p, -1, p.dtype, grad_input=dp)
            ds = low.cast("p", ds)
            if sum_k is not None:
                _accumulate(sum_k[:, block.keys], ds, low.cast("query", query), low)
            if dqs is not None:
                place = dqs[part][:, :, :, block.rows]
                product = _product(ds, low_key[:, block.keys], low, "upstream", operands.scale)
                place.copy_(product.view(place.shape))
        if dk is not None and sum_k is not None:
            dk[part] = sum_k.mul_(operands.scale).view(dk[part].shape)
        if dv is not None and sum_v is not None:
            dv[part] = sum_v.view(dv[part].shape)
    return results


def _accumulate(total: Tensor, a: Tensor, b: Tensor, low: _Scratch) -> None:
    """Total (n, keys, D) += a^T b for a (n, rows, keys) and b (n, rows, D)."""
    if total.dtype == low.dtype:
        total.baddbmm_(a.mT, b)
    else:
        total.add_(_product(a.mT, b, low, "sum"))
