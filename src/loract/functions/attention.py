"""Scaled dot product attention that keeps q, k and v alone and forms its scores block by block, in backward again.

With P = softmax(scale Q K^T + mask) and O = P V, for the upstream gradient dO (FlashAttention, arXiv:2205.14135):
    dV = P^T dO,  dP = dO V^T,  dS = P * (dP - rowsum(P * dP)),  dQ = scale dS K,  dK = scale dS^T Q.
A block takes some queries with every key that any of them attends to. Rows of P are then whole: softmax needs no
running maximum, and rowsum(P * dP) = rowsum(dO * O) comes from P and dP, so that neither O nor its logsumexp is kept.
Keys outside a causal triangle, a sliding window, a document or the padding are never read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional

from loract.codecs.base import Packed
from loract.cpu import unwidened
from loract.errors import LoractError
from loract.functions.attention_blocks import Operands, operand_gradients, output
from loract.functions.attention_plan import four, plans_of
from loract.functions.base import Forward, first_order, load, no_autocast, owned, save


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
    return all(m in (1, s) for m, s in zip(four(mask).shape, full, strict=True))


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

    On CPU the scores of 16-bit tensors and their gradients are fp32; the other products too, where 16 bits are slow.
    The temporaries are, in fp32, at most 2 max(SCORES, LEAST_ROWS T) scores, the rows of q and dO that belong to them,
    and k, v, dk and dv of the key heads taken together (one, or as many as the same number of scores allows).
    Elsewhere backward runs torch's own kernel again: no loop is faster, and reading the mask would wait for the device.

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
        ctx.plans = plans_of(query, key, mask, causal) if query.is_cpu else ()
        if forward is not None:
            return owned(forward())
        with no_autocast(query), unwidened():
            if not query.is_cpu:
                return _kernel(query, key, value, mask, scale, causal)
            return owned(output(Operands(query, key, value, mask, scale, ctx.plans)))

    @staticmethod
    @first_order
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator hides the names)
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        packed, (mask, *plain) = load(ctx)
        query, key, value = plain or (heads(p.read(), shape) for p, shape in zip(packed, ctx.shapes, strict=True))
        assert query is not None
        assert key is not None
        assert value is not None
        wanted = ctx.needs_input_grad[:3]
        with no_autocast(grad), unwidened():
            if query.is_cpu:
                grads = operand_gradients(Operands(query, key, value, mask, ctx.scale, ctx.plans), grad, wanted)
            else:
                grads = _kernel_gradients((query, key, value), mask, ctx.scale, ctx.causal, grad, wanted)
        return *grads, None, None, None, None, None


def heads(flat: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `canonical`."""
    batch, heads, length, width = shape
    return flat.view(batch, length, heads, width).transpose(1, 2)


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
