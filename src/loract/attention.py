"""How attached models run scaled dot product attention: coded, in blocks, or with what it saves freed of duplicates.

A call is met where torch is called, by a mode, so that every way of writing attention looks the same. transformers
repeats grouped heads before it calls torch; through its registry they are seen before that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from loract.codecs import Packed
from loract.device import agree, has_values
from loract.functions.attention import blockwise_attention, canonical, heads, supports
from loract.functions.base import Forward
from loract.saved import RunningSite

ATTENTION = "loract_sdpa"
"""Name in transformers' attention registry; modules reach it through a copy of their config."""
SHORTEST = 256
"""Queries below which torch's own kernel is as fast as blocks."""


@dataclass(frozen=True)
class Call:
    """The arguments of one scaled dot product attention, in torch's order and by its names."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    @property
    def supported(self) -> bool:
        """Whether `blockwise_attention` takes it."""
        exclusive = not self.is_causal or self.attn_mask is None
        return exclusive and supports(self.query, self.key, self.value, self.attn_mask, self.dropout_p)

    @property
    def in_blocks(self) -> bool:
        """Whether blocks are the faster way to run it."""
        return self.query.is_cpu and self.query.shape[2] >= SHORTEST and self.supported

    def blockwise(self, *, packed: Iterable[Packed] | None = None, forward: Forward | None = None) -> Tensor:
        """The output, keeping q, k and v or what is packed for them; `forward` gives it where bits matter."""
        scale = self.query.shape[-1] ** -0.5 if self.scale is None else self.scale
        return blockwise_attention(
            self.query,
            self.key,
            self.value,
            self.attn_mask,
            scale=scale,
            causal=self.is_causal,
            packed=None if packed is None else tuple(packed),
            forward=forward,
        )

    def plain(self) -> Tensor:
        """Torch's own output, of the arguments as they are: a broadcast head and a grouped one round otherwise."""
        return functional.scaled_dot_product_attention(
            self.query,
            self.key,
            self.value,
            self.attn_mask,
            self.dropout_p,
            self.is_causal,
            scale=self.scale,
            enable_gqa=self.enable_gqa,
        )

    def grouped(self) -> Call:
        """The same with key heads shared by groups of query heads, where nobody has repeated them."""
        shared = self.query.dim() == 4 and self.query.shape[1] != self.key.shape[1]
        return replace(self, enable_gqa=self.enable_gqa or shared)


class _Meeting(TorchFunctionMode):
    """While active, scaled dot product attention is given to `meet`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self.meet(Call(*args, **(kwargs or {})))

    def meet(self, call: Call) -> Tensor:
        raise NotImplementedError


class Keeping(_Meeting):
    """For the first run of a region: keeps each output of attention, packed by `encode`, in the order of the calls.

    Only where a second run does not need the output to get at the gradient, which torch's kernels elsewhere do.
    """

    def __init__(self, encode: Callable[[Tensor], Packed], kept: list[Packed]) -> None:
        super().__init__()
        self.encode, self.kept = encode, kept

    def meet(self, call: Call) -> Tensor:
        """Torch's output, packed as well."""
        out = call.plain()
        if call.in_blocks:
            self.kept.append(self.encode(canonical(out)))
        return out


class Blockwise(_Meeting):
    """For the second run: in blocks on CPU, grouped heads never repeated, no output that was kept computed again."""

    def __init__(self, kept: Iterable[Packed] = ()) -> None:
        super().__init__()
        self.kept = deque(kept)

    def meet(self, call: Call) -> Tensor:
        """The output, computed or kept."""
        if not call.in_blocks:
            return call.grouped().plain()
        if not self.kept:
            return call.blockwise()
        packed = self.kept.popleft()
        shape = torch.Size((*call.query.shape[:3], call.value.shape[3]))
        return call.blockwise(forward=lambda: heads(packed.read(), shape).to(call.query.dtype))


class Coding(_Meeting):
    """Keeps q, k and v as the `sites` for them say; without sites, what torch saves, freed of duplicates."""

    def __init__(self, site: RunningSite, sites: tuple[RunningSite, ...], forward: Forward | None = None) -> None:
        """`forward` gives the output in place of torch."""
        super().__init__()
        self.site, self.sites, self.forward = site, sites, forward

    def meet(self, call: Call) -> Tensor:
        """Torch's output, with another memory."""
        forward = self.forward or call.plain
        if not torch.is_grad_enabled() or not any(t.requires_grad for t in (call.query, call.key, call.value)):
            return forward()
        operands = [canonical(t) for t in (call.query, call.key, call.value)] if self.sites and call.supported else []
        if not any(site.lossy(x) for site, x in zip(self.sites, operands, strict=False)):
            with attention_hooks(self.site, call.query, call.key, call.value, call.attn_mask):
                return forward()
        packed: list[Packed] = []
        for site, x in zip(self.sites, operands, strict=True):
            site.begin(x.numel() * x.element_size())
            packed.append(site.share(x))
        return call.blockwise(packed=packed, forward=forward)


def register() -> None:
    """Offer our attention to transformers' registry, under its own name, once."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if ATTENTION in ALL_ATTENTION_FUNCTIONS:
        return
    inner = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kw: Any
    ) -> Any:
        site: RunningSite | None
        site, parts = getattr(module, "_loract_attention", (None, ()))
        # With one group the function does not repeat heads.
        grouped = cast(Any, SimpleNamespace(is_causal=getattr(module, "is_causal", True)))
        if site is None or site.ledger.trying:
            return inner(module, query, key, value, attention_mask, **kw)
        if site.ledger.recomputing:
            return inner(grouped if query.is_cpu else module, query, key, value, attention_mask, **kw)
        if not torch.is_grad_enabled() or not query.requires_grad:
            return inner(module, query, key, value, attention_mask, **kw)

        def forward() -> Tensor:
            return inner(module, query, key, value, attention_mask, **kw)[0].transpose(1, 2)

        with Coding(site, parts, forward):
            return inner(grouped, query, key, value, attention_mask, **kw)

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, torch.compiler.disable(attention))


@contextmanager
def attention_hooks(
    site: RunningSite, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> Generator[None]:
    """Keep what scaled dot product attention saves without duplicates.

    A key or value repeated over the query heads is kept once per key head; a float mask that the kernel made from
    `mask` (bool) is kept as that bool tensor, one for all layers. A saved tensor is replaced only if it is equal.
    """
    kept = 0
    before = 0
    position = 0
    matched: set[int] = set()

    def pack(saved: Tensor) -> Any:
        nonlocal kept, before, position
        saved = saved.detach()  # kept with its graph, the output would keep itself alive
        position += 1
        if not saved.is_floating_point() or saved.dim() != 4:
            kept += site.ledger.claim(saved)
            return saved
        before += saved.numel() * saved.element_size()
        found = [pair for index, pair in enumerate(sources) if same(index, *pair, saved)]
        # Where one comparison speaks for all calls to come, it must have told the sources apart.
        if found and (saved.is_cpu or len(found) == 1 or not has_values(saved)):
            source, rebuild = found[0]
            matched.add(id(source))
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

    def same(index: int, source: Tensor, rebuild: Callable[[Tensor, Tensor], Tensor | None], saved: Tensor) -> bool:
        # Comparing waits for the device, so an accelerator compares once: a kernel saves its tensors in one order.
        signature = (position, index, source.shape, source.dtype, saved.shape, saved.dtype)
        if not saved.is_cpu and signature in site.verified:
            return site.verified[signature]
        if saved.untyped_storage()._cdata == source.untyped_storage()._cdata:
            matched.add(id(source))  # as it is
        candidate = rebuild(source, saved)
        equal = candidate is not None and agree(candidate, saved)
        if equal and not has_values(saved) and rebuild is _repeated:
            # Queries and the output have that shape too. Keys and values are saved once each, the output after them.
            equal = saved.untyped_storage()._cdata != own and id(source) not in matched
        site.verified[signature] = equal
        return equal

    own = query.untyped_storage()._cdata
    sources: list[tuple[Tensor, Callable[[Tensor, Tensor], Tensor | None]]] = []
    if mask is not None and mask.dtype == torch.bool:
        sources.append((mask, _float_mask))
    sources += [(key, _repeated), (value, _repeated)]
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
    sources.clear()  # the graph holds the hooks, and with them everything that they can reach
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
