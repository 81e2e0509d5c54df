"""Measured bytes: saved for backward, peak, and records of both. Device neutral."""

from __future__ import annotations

import ctypes
import gc
import json
import resource
import sys
import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from loract.errors import InvalidSpec

T = TypeVar("T")
MIB = 1 << 20


class StorageTracker(TorchDispatchMode):
    """Bytes of the storages created while active and still alive, by weak references alone.

    It sees every tensor that an operator returns, in forward and in backward, and every death, so state parked on
    an autograd context counts as much as saved tensors. Storages that existed before are not counted; temporaries
    inside a kernel are not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current_bytes = 0
        self.peak_bytes = 0
        self._alive: dict[int, tuple[Any, int]] = {}
        self._before: set[int] = set()

    def exclude(self, tensors: Iterable[Tensor]) -> None:
        """Never count these tensors' storages (parameters, batches)."""
        self._before |= {t.untyped_storage()._cdata for t in tensors}

    def bytes_of(self, tensors: Iterable[Tensor]) -> int:
        """Counted bytes in the storages of `tensors`."""
        keys = {t.untyped_storage()._cdata for t in tensors}
        return sum(size for key, (_, size) in self._alive.items() if key in keys)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
                storage = leaf.untyped_storage()
                key = storage._cdata
                if key not in self._alive and key not in self._before and key not in inputs:
                    self._add(key, storage, leaf, func)
        return out

    def _add(self, key: int, storage: torch.UntypedStorage, made: Tensor, operator: Any) -> None:
        """Count a storage; `made` and `operator` are for those who follow where it comes from."""
        size = storage.nbytes()
        if size == 0:
            return
        self._alive[key] = (weakref.ref(storage, lambda _, key=key, size=size: self._drop(key, size)), size)
        self.current_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.current_bytes)

    def _drop(self, key: int, size: int) -> None:
        self._alive.pop(key, None)
        self.current_bytes -= size


def saved_bytes(forward: Callable[[], T], parameters: Iterable[Tensor] = ()) -> tuple[int, T]:
    """Bytes of storages created by `forward()` that are alive after it, without its outputs'; and the output.

    What autograd keeps for backward plus whatever else the forward left behind.
    """
    with StorageTracker() as tracker:
        tracker.exclude(parameters)
        output = forward()
    leaves = [t for t in tree_leaves(output) if isinstance(t, Tensor)]
    return tracker.current_bytes - tracker.bytes_of(leaves), output


def peak_bytes(step: Callable[[], object], parameters: Iterable[Tensor] = ()) -> int:
    """Peak bytes that `step()` adds: the allocator's on CUDA, the tracker's elsewhere."""
    return step_bytes(step, lambda _: None, parameters)[1]


def step_bytes(
    forward: Callable[[], T], backward: Callable[[T], object], parameters: Iterable[Tensor] = ()
) -> tuple[int, int]:
    """(saved bytes after `forward()`, peak bytes of the whole step) of one step `backward(forward())`."""
    held = list(parameters)
    cuda = any(p.is_cuda for p in held)
    start = 0
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
    with StorageTracker() as tracker:
        tracker.exclude(held)
        output = forward()
        saved = tracker.current_bytes - tracker.bytes_of(t for t in tree_leaves(output) if isinstance(t, Tensor))
        backward(output)
    if cuda:
        torch.cuda.synchronize()
        return saved, torch.cuda.max_memory_allocated() - start
    return saved, tracker.peak_bytes


def peak_rss_bytes() -> int:
    """Peak resident bytes of this process so far, or since `restart_peak_rss`."""
    if _STATUS.exists():
        return _status_bytes("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def restart_peak_rss() -> int:
    """Give freed memory back, let the peak start again from here where Linux allows it, and return the resident bytes.

    The difference of `peak_rss_bytes` over a step is meaningful in a fresh process only.
    """
    gc.collect()
    if not _STATUS.exists():
        return peak_rss_bytes()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


_STATUS = Path("/proc/self/status")


def _status_bytes(key: str) -> int:
    line = next(text for text in _STATUS.read_text().splitlines() if text.startswith(key))
    return int(line.split()[1]) * 1024


_UNITS = {"": 1, "b": 1} | {
    name: base**power
    for power, letter in enumerate("kmgt", start=1)
    for name, base in ((f"{letter}b", 1000), (f"{letter}ib", 1024), (letter, 1024))
}


def parse_bytes(size: str | int) -> int:
    """Bytes that a person wrote: "2GiB", "500 MiB", "16GB", or a number of bytes.

    Raises:
        InvalidSpec: no number, an unknown unit, or nothing left.

    Example:
        >>> parse_bytes("2GiB"), parse_bytes("1.5 kB"), parse_bytes(4096)
        (2147483648, 1500, 4096)
    """
    text = str(size).strip().lower()
    number = text.rstrip("bikmgt ")
    unit = text[len(number) :].strip()
    try:
        found = int(float(number) * _UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        found = 0
    if isinstance(size, bool) or found < 1:
        raise InvalidSpec(f"size {size!r}", "a number of bytes with a unit", "try 8GiB")
    return found


@dataclass(frozen=True, kw_only=True)
class Record:
    """One measured configuration. Bytes are bytes, times seconds; None where it was not measured."""

    name: str
    saved_bytes: int
    peak_bytes: int
    step_seconds: float
    time_ratio: float
    cosine: float | None = None
    relative_error: float | None = None
    train_loss: float | None = None
    held_out_loss: float | None = None
    resident_bytes: int | None = None
    """Peak resident bytes of a fresh process over one step, minus those before it."""
    extra: dict[str, Any] = field(default_factory=lambda: dict[str, Any]())

    def append(self, path: Path) -> None:
        """Add the record to a JSON-lines file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(asdict(self)) + "\n")
