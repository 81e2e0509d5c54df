"""Scaled dot product attention that keeps q, k and v alone and forms its scores block by block, in backward again.

With P = softmax(scale Q K^T + mask) and O = P V, for the upstream gradient dO (FlashAttention, arXiv:2205.14135):
    dV = P^T dO,  dP = dO V^T,  dS = P * (dP - rowsum(P * dP)),  dQ = scale dS K,  dK = scale dS^T Q.
A block takes some queries with every key that any of them attends to. Rows of P are then whole: softmax needs no
running maximum, and rowsum(P * dP) = rowsum(dO * O) comes from P and dP, so that neither O nor its logsumexp is kept.
Keys outside a causal triangle, a sliding window, a document or the padding are never read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from loract.codecs.base import Packed
from loract.cpu import product_dtype, unwidened
from loract.errors import LoractError
from loract.functions.base import Forward, load, no_autocast, save
from loract.linalg import promote

QUERIES = 64
"""Queries in a block: more of them share fewer keys of a window or triangle."""
ROWS = 512
"""Rows of scores for one key head in a block, its query heads together: fewer make the products slow."""
SCORES = 1 << 20
"""Scores computed together: rows, key heads and batch entries are taken up to this many."""
SHORTEST = 256
"""Queries below which torch's own kernel is as fast."""
LEAST_ROWS = 32
"""Rows of scores that a block has however many keys there are."""


def supports(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float) -> bool:
    """Whether `blockwise_attention` takes these: four dimensions, one dtype, no dropout, no mask that trains."""
    tensors = (query, key, value)
    if dropout_p != 0 or any(t.dim() != 4 or t.dtype != query.dtype or t.device != query.device for t in tensors):
        return False
    if not query.is_floating_point() or any(t.numel() == 0 for t in tensors):
        return False
    batch, heads, length, width = query.shape
    if key.shape[:3] != value.shape[:3] or key.shape[0] != batch or key.shape[3] != width or heads % key.shape[1]:
        return False
    if query.is_cpu and value.shape[3] != width:
        return False
    if mask is None:
        return True
    if mask.requires_grad or mask.device != query.device or not 2 <= mask.dim() <= 4:
        return False
    if mask.dtype != torch.bool and not mask.is_floating_point():
        return False
    full = (batch, heads, length, key.shape[2])
    return all(m in (1, s) for m, s in zip(_four(mask).shape, full, strict=True))


class Blockwise(TorchFunctionMode):
    """While active, scaled dot product attention on CPU is computed in blocks, with grouped heads never repeated."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return _attend(*args, **(kwargs or {}))


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    exclusive = not is_causal or attn_mask is None
    if query.is_cpu and exclusive and supports(query, key, value, attn_mask, dropout_p) and query.shape[2] >= SHORTEST:
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        return blockwise_attention(query, key, value, attn_mask, scale=factor, causal=is_causal)
    grouped = enable_gqa or query.shape[1] != key.shape[1]
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=grouped
    )


def canonical(x: Tensor) -> Tensor:
    """(B, H, S, D) as (tokens, features) = (B S, H D), the layout that projections write: there a view, no copy."""
    batch, _, length, _ = x.shape
    return x.transpose(1, 2).reshape(batch * length, -1)


def blockwise_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scale: float,
    causal: bool,
    packed: Sequence[Packed] | None = None,
    forward: Forward | None = None,
) -> Tensor:
    """O = softmax(scale Q K^T + mask) V (B, H, S, D) in query's dtype, keeping q, k, v and the mask alone.

    query (B, H, S, D), key and value (B, Hkv, T, D); query head h reads key head h // (H / Hkv), never repeated. mask:
    None, bool (True: attends) or float (added), broadcast to (B, H, S, T). `causal`: query s attends to keys 0 to s.
    A query that attends to nothing has output and gradient zero, as in torch's kernels. `packed` stands for
    `canonical(query)`, `canonical(key)`, `canonical(value)` and is kept in their place. `forward()` gives the output
    where it has to be the model's own, bit for bit; otherwise it is computed in blocks.

    On CPU the scores of 16-bit tensors and their gradients are fp32; the other products too, where 16 bits are slow. The temporaries are, in fp32, at
    most 2 max(SCORES, LEAST_ROWS T) scores, the rows of q and dO that belong to them, and k, v, dk and dv of the key
    heads taken together (one, or as many as the same number of scores allows). Elsewhere backward runs torch's own
    kernel again: no loop is faster, and reading the mask would wait for the device.

    Raises:
        LoractError: for `causal` with a mask, or anything that `supports` denies.
    """
    if causal and mask is not None:
        raise LoractError("a mask with causal=True", "one of the two", "let the mask hide later keys, causal=False")
    if not supports(query, key, value, mask, 0.0):
        shapes = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in (query, key, value))
        raise LoractError(
            f"q, k, v {shapes} and mask {None if mask is None else tuple(mask.shape)}",
            "(B, H, S, D), (B, Hkv, T, D) twice, and a mask that broadcasts to (B, H, S, T) and does not train",
            "ask supports() first",
        )
    return _Attention.apply(query, key, value, mask, scale, causal, packed, forward)  # type: ignore[no-any-return]


class _Attention(Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float,
        causal: bool,
        packed: Sequence[Packed] | None,
        forward: Forward | None,
    ) -> Tensor:
        ctx.shapes = query.shape, key.shape, value.shape
        ctx.scale, ctx.causal = scale, causal
        packed = () if packed is None else tuple(packed)
        for p in packed:
            p.reserve()
        save(ctx, packed, mask, *(() if packed else (query, key, value)))
        # Found here, where the mask is the object that all layers share: hooks may give backward another one.
        ctx.plans = _plans(query, key, mask, causal) if query.is_cpu else ()
        if forward is not None:
            return forward()
        with no_autocast(query), unwidened():
            if not query.is_cpu:
                return _kernel(query, key, value, mask, scale, causal)
            return _output(_Operands(query, key, value, mask, scale, ctx.plans))

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator hides the names)
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        packed, (mask, *plain) = load(ctx)
        query, key, value = plain or (_heads(p.read(), shape) for p, shape in zip(packed, ctx.shapes, strict=True))
        assert query is not None
        assert key is not None
        assert value is not None
        wanted = ctx.needs_input_grad[:3]
        with no_autocast(grad), unwidened():
            if query.is_cpu:
                grads = _gradients(_Operands(query, key, value, mask, ctx.scale, ctx.plans), grad, wanted)
            else:
                grads = _kernel_gradients((query, key, value), mask, ctx.scale, ctx.causal, grad, wanted)
        return *grads, None, None, None, None, None


def _heads(flat: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `canonical`."""
    batch, heads, length, width = shape
    return flat.view(batch, length, heads, width).transpose(1, 2)


def _four(mask: Tensor) -> Tensor:
    return mask[(None,) * (4 - mask.dim())]


# What a block reads


@dataclass(frozen=True, kw_only=True)
class _Block:
    """Some queries with all keys that any of them attends to; numbers alone, so that no mask is kept."""

    rows: slice
    keys: slice
    masked: tuple[slice, ...]
    """The keys that some of the queries do not attend to; those outside need no masking."""
    hollow: bool
    """Whether a query attends to no key at all."""


_Plan = tuple[_Block, ...]
_Part = tuple[slice, slice]
"""Batch entries and key heads."""
_PLANS: Any = WeakTensorKeyDictionary()
"""Per mask: its version, and the plans by (S, T, rows). A model's layers share one mask."""


def _plans(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool) -> tuple[_Plan, ...]:
    """The blocks of every batch entry, or one plan for all of them."""
    length, keys = query.shape[2], key.shape[2]
    group = query.shape[1] // key.shape[1]
    rows = max(1, min(QUERIES, min(ROWS, max(LEAST_ROWS, SCORES // keys)) // group))
    if mask is None:
        return (tuple(_causal_blocks(length, keys, rows) if causal else _full_blocks(length, keys, rows)),)
    if mask.is_inference():  # has no version: an edit would go unseen
        return _masked_plans(_four(mask), length, keys, rows)
    version, plans = _PLANS.get(mask, (None, {}))
    if version != mask._version:
        plans = {}
        _PLANS[mask] = (mask._version, plans)
    if (length, keys, rows) not in plans:
        plans[length, keys, rows] = _masked_plans(_four(mask), length, keys, rows)
    return plans[length, keys, rows]


def _parts(whole: slice, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, whole.stop)) for start in range(whole.start, whole.stop, step))


def _full_blocks(length: int, keys: int, rows: int) -> Iterator[_Block]:
    for part in _parts(slice(0, length), rows):
        yield _Block(rows=part, keys=slice(0, keys), masked=(), hollow=False)


def _causal_blocks(length: int, keys: int, rows: int) -> Iterator[_Block]:
    for part in _parts(slice(0, length), rows):
        end = min(part.stop, keys)
        masked = (slice(part.start, end),) if part.start < end else ()
        yield _Block(rows=part, keys=slice(0, end), masked=masked, hollow=False)


def _masked_plans(mask: Tensor, length: int, keys: int, rows: int) -> tuple[_Plan, ...]:
    if len(mask) > 1 and torch.equal(mask[1:], mask[:1].expand_as(mask[1:])):
        mask = mask[:1]
    plans = tuple(tuple(_masked_blocks(entry, length, keys, rows)) for entry in mask)
    return plans[:1] if all(plan == plans[0] for plan in plans) else plans


def _masked_blocks(mask: Tensor, length: int, keys: int, rows: int) -> Iterator[_Block]:
    mask = mask.expand(-1, length, keys)
    for part in _parts(slice(0, length), rows):
        block = mask[:, part]
        seen = _attends(block)
        free = seen if mask.dtype == torch.bool else block == 0
        # As bytes: reductions of bools are ten times slower.
        some = seen.view(torch.uint8).amax((0, 1)).nonzero().flatten().tolist()
        every = free.view(torch.uint8).amin((0, 1)).nonzero().flatten().tolist()
        if not some:
            yield _Block(rows=part, keys=slice(0, 0), masked=(), hollow=True)
            continue
        first, end = some[0], some[-1] + 1
        if every and len(every) == every[-1] + 1 - every[0]:
            edges = slice(first, every[0]), slice(every[-1] + 1, end)
        else:
            edges = (slice(first, end),)
        masked = tuple(edge for edge in edges if edge.start < edge.stop)
        hollow = not every and not bool(seen.any(-1).all())
        yield _Block(rows=part, keys=slice(first, end), masked=masked, hollow=hollow)


def _attends(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask != -torch.inf


# Blocks on CPU


@dataclass(frozen=True)
class _Operands:
    """q (B, H, S, D), k and v (B, Hkv, T, D), and which blocks of scores there are."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scale: float
    plans: tuple[_Plan, ...]

    def grouped(self, x: Tensor) -> Tensor:
        """X (B, H, S, D) as a view (B, Hkv, H / Hkv, S, D): query heads beside the others that read their key head."""
        return x.unflatten(1, (self.key.shape[1], -1))

    def pieces(self) -> Iterator[tuple[_Part, _Plan]]:
        """Batch entries and key heads taken together, and their blocks."""
        batch, heads, group = len(self.query), self.key.shape[1], self.query.shape[1] // self.key.shape[1]
        for entry, plan in enumerate(self.plans):
            scores = max((b.rows.stop - b.rows.start) * (b.keys.stop - b.keys.start) for b in plan) * group
            fitting = max(1, SCORES // max(1, scores))
            entries = slice(0, batch) if len(self.plans) == 1 else slice(entry, entry + 1)
            for some in _parts(entries, max(1, fitting // heads)):
                for part in _parts(slice(0, heads), min(heads, fitting)):
                    yield (some, part), plan

    def bias(self, part: _Part, rows: slice, keys: slice) -> Tensor:
        """The mask of a block (entries, heads, H / Hkv, rows, keys), or 1 where it is broadcast, bool or float."""
        if self.mask is None:  # causal
            at = torch.arange(rows.start, rows.stop)[:, None]
            return at >= torch.arange(keys.start, keys.stop)
        mask = _four(self.mask).expand(-1, -1, self.query.shape[2], self.key.shape[2])[:, :, rows, keys]
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

    def wide(self, name: str, x: Tensor) -> Tensor:
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
    operands: _Operands, part: _Part, block: _Block, query: Tensor, key: Tensor, scratch: _Scratch
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
        by_head.masked_fill_(~_attends(operands.bias(part, block.rows, block.keys)).any(-1, keepdim=True), 0.0)
    return scores


def _like(x: Tensor) -> Tensor:
    """An empty tensor of x's shape (B, H, S, D), laid out as (B, S, H, D): its `canonical` form is a view."""
    batch, heads, length, width = x.shape
    return torch.empty(batch, length, heads, width, dtype=x.dtype, device=x.device).transpose(1, 2)


def _product(a: Tensor, b: Tensor, scratch: _Scratch, name: str, scale: float = 1.0) -> Tensor:
    """Scale a b (n, rows, columns) for a (n, rows, m) and b (n, m, columns)."""
    out = scratch.take(name, *a.shape[:2], b.shape[2])
    return torch.baddbmm(out, a, b, beta=0.0, alpha=scale, out=out)


def _scratches(operands: _Operands) -> tuple[_Scratch, _Scratch]:
    """For scores and their gradients, at least fp32; for products that need no more than their operands' 16 bits."""
    scratch, narrow = _Scratch(promote(operands.query[:0]).dtype), product_dtype(operands.query)
    return scratch, scratch if narrow == scratch.dtype else _Scratch(narrow)


def _output(operands: _Operands) -> Tensor:
    """O = P V."""
    out = _like(operands.query)
    scratch, low = _scratches(operands)
    queries, outs = operands.grouped(operands.query), operands.grouped(out)
    for part, plan in operands.pieces():
        key = scratch.wide("key", operands.key[part])
        value = low.wide("value", operands.value[part])
        for block in plan:
            place = outs[part][:, :, :, block.rows]
            if block.keys.stop == 0:
                place.zero_()
                continue
            query = scratch.stacked("query", queries[part][:, :, :, block.rows])
            p = low.cast("p", _probabilities(operands, part, block, query, key[:, block.keys], scratch))
            place.copy_(_product(p, value[:, block.keys], low, "product").view(place.shape))
    return out


def _gradients(operands: _Operands, grad: Tensor, wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """dQ, dK, dV, those that are wanted."""
    results = tuple(
        _like(t) if w else None for t, w in zip((operands.query, operands.key, operands.value), wanted, strict=True)
    )
    dq, dk, dv = results
    scratch, low = _scratches(operands)
    queries, grads = operands.grouped(operands.query), operands.grouped(grad)
    dqs = None if dq is None else operands.grouped(dq)
    for part, plan in operands.pieces():
        key = scratch.wide("key", operands.key[part])
        value = scratch.wide("value", operands.value[part])
        low_key = key if low is scratch else low.wide("key", operands.key[part])
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


# Torch's kernel on other devices


def _kernel(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    if grouped and mask is not None:  # with a mask, grouped heads fall back to a kernel that forms all scores
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
        grouped = False
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )


def _kernel_gradients(
    operands: Sequence[Tensor], mask: Tensor | None, scale: float, causal: bool, grad: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_(w) for t, w in zip(operands, wanted, strict=True)]
        query, key, value = leaves
        out = _kernel(query, key, value, mask, scale, causal)
    found = iter(torch.autograd.grad(out, [t for t in leaves if t.requires_grad], grad))
    return tuple(next(found) if w else None for w in wanted)
