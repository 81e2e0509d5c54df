"""Scaled dot product attention through transformers' registry, keeping what it saves without duplicates."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from loract.saved import RunningSite

ATTENTION = "loract_sdpa"
"""Name in transformers' attention registry; modules reach it through a copy of their config."""


def register() -> None:
    """Offer our attention to transformers' registry, under its own name, once."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if ATTENTION in ALL_ATTENTION_FUNCTIONS:
        return
    inner = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kw: Any) -> Any:
        site = getattr(module, "_loract_site", None)
        if site is not None and site.ledger.recomputing and not site.ledger.trying and query.is_cpu:
            # `Blockwise` reads grouped heads as they are; with one group the function does not repeat them.
            module = cast(Any, SimpleNamespace(is_causal=getattr(module, "is_causal", True)))
        if site is None or not torch.is_grad_enabled() or not query.requires_grad or site.ledger.recomputing:
            return inner(module, query, key, value, mask, **kw)
        with attention_hooks(site, key, value, mask):
            return inner(module, query, key, value, mask, **kw)

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attention)


@contextmanager
def attention_hooks(site: RunningSite, key: Tensor, value: Tensor, mask: Tensor | None) -> Generator[None]:
    """Keep what scaled dot product attention saves without duplicates.

    A key or value repeated over the query heads is kept once per key head; a float mask that the kernel made from
    `mask` (bool) is kept as that bool tensor, one for all layers. A saved tensor is replaced only if it is equal.
    """
    kept = 0
    before = 0

    def pack(saved: Tensor) -> Any:
        nonlocal kept, before
        saved = saved.detach()  # kept with its graph, the output would keep itself alive
        if not saved.is_floating_point() or saved.dim() != 4:
            kept += site.ledger.claim(saved)
            return saved
        before += saved.numel() * saved.element_size()
        for source, rebuild in sources:
            if same(source, rebuild, saved):
                kept += site.ledger.claim(source)
                return (source.detach(), rebuild, saved.shape, saved.dtype, saved.stride())
        kept += site.ledger.claim(saved)
        return saved

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        source, rebuild, shape, dtype, stride = packed
        like = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        rebuilt = rebuild(source, like)
        assert rebuilt is not None
        return rebuilt

    def same(source: Tensor, rebuild: Callable[[Tensor, Tensor], Tensor | None], saved: Tensor) -> bool:
        # Comparing waits for the device, so an accelerator compares once for each pair of shapes.
        signature = (rebuild, source.shape, saved.shape, saved.dtype)
        if not saved.is_cpu and rebuild is _float_mask and signature in site.verified:
            return True
        candidate = rebuild(source, saved)
        equal = candidate is not None and torch.equal(candidate, saved)
        if equal:
            site.verified.add(signature)
        return equal

    sources: list[tuple[Tensor, Callable[[Tensor, Tensor], Tensor | None]]] = []
    if mask is not None and mask.dtype == torch.bool:
        sources.append((mask, _float_mask))
    sources += [(key, _repeated), (value, _repeated)]
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
    site.begin(before)
    site.stats.bytes_after += kept


def _repeated(source: Tensor, saved: Tensor) -> Tensor | None:
    """Source (B, heads, S, D) repeated head by head to the shape of `saved`; None where it cannot be."""
    batch, heads, length, width = source.shape
    if heads == saved.shape[1] or saved.shape[1] % heads or saved.shape != (batch, saved.shape[1], length, width):
        return None
    repeats = saved.shape[1] // heads
    return source[:, :, None].expand(batch, heads, repeats, length, width).reshape(saved.shape)


def _float_mask(mask: Tensor, saved: Tensor) -> Tensor | None:
    """0 where `mask` lets through, -inf elsewhere, in the shape and dtype of `saved`; None where it cannot be."""
    if saved.shape[-2:] != mask.shape[-2:] or mask.dim() != 4:
        return None
    if any(m not in (1, s) for m, s in zip(mask.shape, saved.shape, strict=True)):
        return None
    out = torch.zeros(mask.shape, dtype=saved.dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
    return out.expand(saved.shape)
