"""Sites at run time: encoding with their own random stream, sharing of packed tensors, byte counters.

And the saved-tensor-hook tier, for what attention saves twice: masks converted layer by layer and repeated heads.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary, WeakTensorKeyDictionary

from loract.codecs import Codec, Exact, Packed, State
from loract.codecs.base import Delayed
from loract.errors import Uncopied
from loract.functions.base import no_autocast
from loract.policy import Site

DEPTH = 3
"""Steps of recomputation allowed behind a shared tensor: norm, linear map, activation. Without a limit a chain of
regions would keep its first input alone and run everything before a region again for each of them."""


class Index:
    """Packed tensors by the tensor object they stand for.

    Weak, and checked against the tensor's version: keys by id or address would match dead tensors, whose memory is
    reused at once, and an in-place edit makes a packed tensor stale.
    """

    def __init__(self) -> None:
        self._packed: Any = WeakTensorKeyDictionary()

    def put(self, tensor: Tensor, packed: Packed) -> None:
        """`packed` stands for `tensor` as it is now. It must not hold `tensor`, which would then never die."""
        self._packed[tensor] = (tensor._version, packed)

    def get(self, tensor: Tensor) -> Packed | None:
        """What stands for `tensor`, or for the whole of which it is a reshaped view with the same features."""
        for candidate in (tensor, tensor._base):
            if candidate is None or candidate.numel() != tensor.numel() or candidate.shape[-1:] != tensor.shape[-1:]:
                continue
            if candidate is not tensor and not (candidate.is_contiguous() and tensor.is_contiguous()):
                continue
            version, packed = self._packed.get(candidate, (None, None))
            if packed is not None and version == candidate._version:
                return packed
        return None


class Ledger:
    """Counts each storage once, for as long as it lives."""

    def __init__(self) -> None:
        self._seen: Any = WeakIdKeyDictionary()
        self._thread = threading.local()

    @property
    def recomputing(self) -> bool:
        """Whether this thread runs a region again: what it packs meanwhile lives for a moment and does not count."""
        return getattr(self._thread, "recomputing", False)

    @contextmanager
    def recompute(self) -> Generator[None]:
        """For the time of running a region again."""
        before, self._thread.recomputing = self.recomputing, True
        try:
            yield
        finally:
            self._thread.recomputing = before

    def claim(self, *tensors: Tensor) -> int:
        """Bytes of those storages that were not counted before; none while recomputing."""
        total = 0
        if self.recomputing:
            return total
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage not in self._seen:
                self._seen[storage] = True
                total += storage.nbytes()
        return total

    def knows(self, tensor: Tensor) -> bool:
        """Whether the storage is already kept by somebody."""
        return tensor.untyped_storage() in self._seen


@dataclass(kw_only=True)
class SiteStats:
    """Bytes and error of one site over its last call with gradients."""

    kind: str
    name: str
    codec: str
    bytes_before: int = 0
    """Bytes plain autograd saves here."""
    bytes_after: int = 0
    """Bytes newly kept: a tensor that another site keeps already counts there."""
    calls: int = 0
    coded: bool = False
    """Whether the last call kept a coded tensor (False: exact, shared, or too small to shrink)."""
    error: float | None = None
    """Relative error of the coded tensor, a posteriori."""


@dataclass(kw_only=True, eq=False)
class RunningSite(Uncopied):
    """One site while attached."""

    site: Site
    codec: Codec
    seed: int
    index: Index
    ledger: Ledger
    again: Codec | None = None
    """Codec inside a region that runs again; None: exact, and a region is there none of its own."""
    step: int = 0
    state: State = field(default_factory=State)
    error: Delayed = field(default_factory=Delayed)
    verified: set[object] = field(default_factory=lambda: set[object]())
    stats: SiteStats = field(init=False)

    def __post_init__(self) -> None:
        """Start the counters."""
        self.stats = SiteStats(kind=self.site.kind, name=self.site.name, codec=type(self.codec).__name__)

    def begin(self, before: int) -> None:
        """One more call, in which plain autograd would save `before` bytes."""
        self.step += 1
        self.stats.calls += 1
        self.stats.bytes_before, self.stats.bytes_after, self.stats.coded = before, 0, False

    @property
    def acting(self) -> Codec:
        """The codec in force on this thread."""
        return self.again or Exact() if self.ledger.recomputing else self.codec

    def lossy(self, x: Tensor) -> bool:
        """Whether the codec would change x (..., n)."""
        features = x.shape[-1]
        return x.numel() > 0 and self.acting.codes(x.numel() // features, features, x.dtype)

    def encode(self, x: Tensor) -> Packed:
        """Pack x with this site's codec, drawing from the stream (seed, step, site) and never from the global one."""
        with torch.no_grad(), no_autocast(x):
            packed = self.acting.encode(x, self._generator(x.device), self.state)
        self.stats.coded |= packed.tensors[0] is not x
        if packed.error is not None:
            self.error.write(packed.error)
        self.keep(*packed.tensors)
        return packed

    def share(self, x: Tensor) -> Packed:
        """What stands for x: kept already by another site, or packed now and offered to the next."""
        if (packed := self.index.get(x)) is not None and packed.depth <= DEPTH:
            self.stats.coded |= not isinstance(self.acting, Exact)
            return packed
        if not self.lossy(x) or self.ledger.knows(x):  # an exact copy that somebody keeps anyway costs nothing
            self.keep(x)
            return Exact().encode(x)
        packed = self.encode(x)
        if packed.tensors[0] is not x:
            self.index.put(x, packed)
        return packed

    def proves(self, packed: Packed, x: Tensor) -> bool:
        """Whether `packed` gives x back bit for bit: compared at the first call of a kind alone, as it waits."""
        kind = (packed.shape, packed.dtype, x.grad_fn is None)
        if kind not in self.verified:
            if not torch.equal(packed.decode().reshape(x.shape), x):
                return False
            self.verified.add(kind)
        return True

    def keep(self, *tensors: Tensor) -> None:
        """Count tensors kept for backward."""
        self.stats.bytes_after += self.ledger.claim(*tensors)

    def report(self) -> SiteStats:
        """The counters, with the last error that has arrived from the device."""
        value = self.error.read()
        self.stats.error = None if value is None else float(value)
        return self.stats

    def _generator(self, device: torch.device) -> torch.Generator:
        key = hashlib.blake2b(f"{self.seed}/{self.step}/{self.site.name}".encode(), digest_size=7).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(key, "big"))


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
