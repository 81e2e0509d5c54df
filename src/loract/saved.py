"""Sites at run time: encoding with their own random stream, sharing of packed tensors, byte counters."""

from __future__ import annotations

import base64
import ctypes
import hashlib
import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary, WeakTensorKeyDictionary

from loract.codecs import Codec, Exact, Packed, State
from loract.codecs.base import Delayed
from loract.device import agree, generator
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

    def factors(self, tensor: Tensor) -> Packed | None:
        """The same, if products with it are cheaper than dense ones."""
        packed = self.get(tensor)
        return packed if packed is not None and packed.factored else None


class Ledger:
    """Counts each storage once, for as long as it lives."""

    def __init__(self) -> None:
        self._seen: Any = WeakIdKeyDictionary()
        self._thread = threading.local()

    @property
    def recomputing(self) -> bool:
        """Whether this thread runs a region again: what it packs meanwhile lives for a moment and does not count."""
        return getattr(self._thread, "recomputing", False)

    @property
    def trying(self) -> bool:
        """Whether that run is a trial: it may be made again, and so must not move the sites' random streams on."""
        return getattr(self._thread, "trying", False)

    @contextmanager
    def recompute(self, *, trial: bool = False) -> Generator[None]:
        """For the time of running a region again."""
        before = self.recomputing, self.trying
        self._thread.recomputing, self._thread.trying = True, trial or self.trying
        try:
            yield
        finally:
            self._thread.recomputing, self._thread.trying = before

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
    verified: dict[object, bool] = field(default_factory=lambda: dict[object, bool]())
    """What comparing values once has shown, by kind of call: a comparison waits for the device."""
    stats: SiteStats = field(init=False)

    def __post_init__(self) -> None:
        """Start the counters."""
        self.stats = SiteStats(kind=self.site.kind, name=self.site.name, codec=type(self.codec).__name__)

    def forget(self) -> None:
        """Start anew: counters, random stream, and what earlier calls have taught."""
        self.step, self.state, self.error = 0, State(), Delayed()
        self.__post_init__()

    def begin(self, before: int) -> None:
        """One more call, in which plain autograd would save `before` bytes."""
        self.step += not self.ledger.trying
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
        state = State(rank=self.state.rank) if self.ledger.trying else self.state
        with torch.no_grad(), no_autocast(x):
            packed = self.acting.encode(x, self._generator(x.device), state)
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
            self.verified[kind] = agree(packed.decode().reshape(x.shape), x)
        return self.verified[kind]

    def keep(self, *tensors: Tensor) -> None:
        """Count tensors kept for backward."""
        self.stats.bytes_after += self.ledger.claim(*tensors)

    def report(self) -> SiteStats:
        """The counters, with the last error that has arrived from the device."""
        value = self.error.read()
        self.stats.error = None if value is None else float(value)
        return self.stats

    def state_dict(self) -> dict[str, Any]:
        """What the next call depends on, in JSON's types: the position in the random stream, earlier statistics."""
        spectrum = self.state.spectrum.wait()
        return {
            "step": self.step,
            "rank": self.state.rank,
            "spectrum": None if spectrum is None else spectrum.tolist(),
            "dtype": None if spectrum is None else str(spectrum.dtype).removeprefix("torch."),
            "memory": {name: _as_json(value) for name, value in self.state.memory.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from such a state."""
        self.step, self.state = int(state["step"]), State(rank=state["rank"])
        if state["spectrum"] is not None:
            self.state.spectrum.write(torch.tensor(state["spectrum"], dtype=getattr(torch, state["dtype"])))
        self.state.memory = {name: _from_json(value) for name, value in state["memory"].items()}

    def _generator(self, device: torch.device) -> torch.Generator:
        key = hashlib.blake2b(f"{self.seed}/{self.step}/{self.site.name}".encode(), digest_size=7).digest()
        return generator(device, int.from_bytes(key, "big"))


def _as_json(value: Any) -> Any:
    """A number, a tuple of numbers as a list, or a tensor as its bytes in base64."""
    if not isinstance(value, Tensor):
        return value
    host = value.detach().cpu().contiguous()
    raw = ctypes.string_at(host.data_ptr(), host.nbytes)
    dtype = str(host.dtype).removeprefix("torch.")
    return {"bytes": base64.b64encode(raw).decode("ascii"), "dtype": dtype, "shape": list(host.shape)}


def _from_json(value: Any) -> Any:
    """The inverse, with tensors on the host."""
    if isinstance(value, dict):
        kept: dict[str, Any] = value  # pyright: ignore[reportUnknownVariableType]
        raw = torch.frombuffer(bytearray(base64.b64decode(kept["bytes"])), dtype=torch.uint8)
        return raw.view(getattr(torch, kept["dtype"])).reshape(kept["shape"])
    return tuple(value) if isinstance(value, list) else value  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
