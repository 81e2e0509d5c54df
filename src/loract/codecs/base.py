"""The two protocols of the library: a `Codec` turns an activation into a `Packed`, the only thing a graph keeps.

Canonical layout: X is (N tokens, n features); leading dimensions of an activation are flattened into tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from loract.device import has_values
from loract.linalg import promote, row_chunks


def tokens_features(x: Tensor) -> tuple[int, int]:
    """Canonical shape (N, n) of an activation of shape (..., n)."""
    features = x.shape[-1] if x.dim() else 1
    return (x.numel() // features if features else 0), features


class Packed(ABC):
    """A kept representation of X (N, n): what `save_for_backward` stores, and how to read it.

    `tensors` is everything kept; `bind` rebuilds the object around the same tensors after autograd has returned
    them, so that no tensor has to live on `ctx` (where saved-tensor hooks and offloaders would not see it).
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    error: Tensor | None = None
    """Relative Frobenius error ||X - decode()|| / ||X|| estimated a posteriori (0-d, on the device), or None."""
    factored: bool = False
    """Whether `linear` costs less than the product with a dense X."""
    lossy: bool = True
    """Whether `decode` may differ from X."""
    depth: int = 0
    """How many steps of recomputation lie between what is kept and X."""

    @property
    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """Tensors kept for backward."""

    @abstractmethod
    def bind(self, tensors: Sequence[Tensor | None]) -> Packed:
        """The same representation around `tensors` (as many as `self.tensors`; None stands for "not here")."""

    @abstractmethod
    def decode(self) -> Tensor:
        """X (N, n) in `dtype`, exact or approximate."""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors kept."""
        return sum(t.numel() * t.element_size() for t in self.tensors)

    def contract(self, g: Tensor) -> Tensor:
        """g^T X for g (N, r): (r, n) in fp32 (fp64 for fp64 g)."""
        return contract_dense(g, self.decode())

    def linear(self, weight: Tensor) -> Tensor:
        """X W^T for W (m, n): (N, m) in `dtype`."""
        return self.decode() @ weight.to(self.dtype).T

    def rows(self, part: slice) -> Packed:
        """X[part], for a slice of the rows, as a view of the same tensors: decodes to `decode()[part]`.

        Raises:
            NotImplementedError: where it could not be cheap, as of a recomputation.
        """
        raise NotImplementedError

    def affine(
        self,
        *,
        rows: Tensor | None = None,
        cols: Tensor | None = None,
        bias: Tensor | None = None,
        row_bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Packed:
        """View diag(rows) X diag(cols) + 1 bias^T + row_bias 1^T; rows, row_bias (N,), cols, bias (n,)."""
        return Affine(inner=self, vectors=(rows, cols, bias, row_bias), dtype=dtype or self.dtype)

    def reserve(self) -> None:  # noqa: B027 (most representations have nothing to do)
        """Announce one more reader in backward, which will call `read` or `contract` once (see `Recomputed`)."""

    def read(self) -> Tensor:
        """`decode()` for a reader that was announced."""
        return self.decode()


@runtime_checkable
class Codec(Protocol):
    """How a saved tensor is represented. Implementations are frozen dataclasses that carry their configuration."""

    def codes(self, tokens: int, features: int, dtype: torch.dtype) -> bool:
        """Whether a tensor of this size would be coded; False means that it is kept exactly."""
        ...

    def encode(self, x: Tensor, generator: torch.Generator | None = None, state: State | None = None) -> Packed:
        """Pack x (..., n). `generator` draws on x's device; `state` carries statistics from earlier steps."""
        ...


@dataclass(kw_only=True)
class State:
    """What one site remembers between steps: the rank in force, and the spectrum that will choose the next one."""

    rank: int | None = None
    spectrum: Delayed = field(default_factory=lambda: Delayed())
    memory: dict[str, Any] = field(default_factory=lambda: dict[str, Any]())
    """What else a codec carries over: plain tensors and numbers."""


class Delayed:
    """A device tensor read later without waiting for the device.

    Reading it at once would stall the queue of kernels: `read` returns None until the copy has arrived.
    """

    def __init__(self) -> None:
        self._host: Tensor | None = None
        self._event: torch.cuda.Event | None = None

    def write(self, value: Tensor) -> None:
        """Start copying `value` to the host; a tensor without values never arrives."""
        value = value.detach()
        if not has_values(value):
            return
        if value.is_cuda:
            host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            host.copy_(value, non_blocking=True)
            self._host, self._event = host, torch.cuda.Event()
            self._event.record()
        else:
            self._host, self._event = value.clone(), None

    def read(self) -> Tensor | None:
        """The last value that has arrived, or None."""
        if self._event is not None and not self._event.query():
            return None
        return self._host

    def wait(self) -> Tensor | None:
        """The last value written, waiting for it; None if there was none."""
        if self._event is not None:
            self._event.synchronize()
        return self._host


@dataclass(frozen=True, kw_only=True, eq=False)
class Stored(Packed):
    """Base of representations that own their tensors."""

    kept: tuple[Tensor, ...]
    shape: tuple[int, int]
    dtype: torch.dtype
    error: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:  # noqa: D102
        return self.kept

    def bind(self, tensors: Sequence[Tensor | None]) -> Packed:  # noqa: D102
        return replace(self, kept=tuple(tensors))


@dataclass(frozen=True, kw_only=True, eq=False)
class Affine(Packed):
    """Lazy view diag(rows) X diag(cols) + 1 bias^T + row_bias 1^T of another representation.

    Row and column scaling commute with X ~ C P^T, so a norm's normalised input and its output share one set of
    factors: reading either costs no second decomposition.
    """

    inner: Packed
    vectors: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        """(N, n)."""
        return self.inner.shape

    @property
    def factored(self) -> bool:  # type: ignore[override]
        """As the representation that it views."""
        return self.inner.factored

    @property
    def lossy(self) -> bool:  # type: ignore[override]
        """As the representation that it views."""
        return self.inner.lossy

    @property
    def tensors(self) -> tuple[Tensor, ...]:  # noqa: D102
        return (*self.inner.tensors, *(v for v in self.vectors if v is not None))

    def bind(self, tensors: Sequence[Tensor | None]) -> Packed:  # noqa: D102
        # An absent vector cannot be told from an unbound one by value, so the unbound ones keep a placeholder.
        split = len(self.inner.tensors)
        rest = iter(tensors[split:])
        bound = tuple(None if v is None else (_UNBOUND if (t := next(rest)) is None else t) for v in self.vectors)
        return replace(self, inner=self.inner.bind(tensors[:split]), vectors=bound)

    def rows(self, part: slice) -> Packed:  # noqa: D102
        rows, cols, bias, row_bias = self.vectors
        vectors = (None if rows is None else rows[part], cols, bias, None if row_bias is None else row_bias[part])
        return replace(self, inner=self.inner.rows(part), vectors=vectors)

    def _scaled(self, index: int, g: Tensor) -> Tensor | None:
        vector = self.vectors[index]
        return None if vector is None else vector.to(g.dtype)

    def decode(self) -> Tensor:  # noqa: D102
        x = promote(self.inner.decode())
        rows, cols, bias, row_bias = (self._scaled(i, x) for i in range(4))
        if rows is not None:
            x = x * rows[:, None]
        if cols is not None:
            x = x * cols
        if bias is not None:
            x = x + bias
        if row_bias is not None:
            x = x + row_bias[:, None]
        return x.to(self.dtype)

    def contract(self, g: Tensor) -> Tensor:  # noqa: D102
        g = promote(g)
        rows, cols, bias, row_bias = (self._scaled(i, g) for i in range(4))
        out = self.inner.contract(g if rows is None else g * rows[:, None])
        if cols is not None:
            out = out * cols
        if bias is not None:
            out = out + g.sum(0)[:, None] * bias
        if row_bias is not None:
            out = out + (row_bias @ g)[:, None]
        return out

    def linear(self, weight: Tensor) -> Tensor:  # noqa: D102
        w = promote(weight)
        rows, cols, bias, row_bias = (self._scaled(i, w) for i in range(4))
        out = self.inner.linear(w if cols is None else w * cols)
        if rows is None and bias is None and row_bias is None:
            return out.to(self.dtype)
        out = promote(out)
        if rows is not None:
            out = out * rows[:, None]
        if bias is not None:
            out = out + w @ bias
        if row_bias is not None:
            out = out + row_bias[:, None] * w.sum(1)
        return out.to(self.dtype)


_UNBOUND = torch.empty(0)


class Announced(Protocol):
    """What wants to know beforehand how many will read it."""

    def reserve(self) -> None:
        """Announce one reader."""
        ...


class Memo:
    """A value rebuilt once for several readers of one backward pass, dropped after the last of them.

    `source` is what the rebuilding reads: all readers of this one count there as one.
    """

    def __init__(self, source: Announced | None = None) -> None:
        self.readers = 0
        """Readers announced so far."""
        self._left = 0
        self._value: object | None = None
        self._source = source

    @property
    def kept(self) -> bool:
        """Whether another reader is still to come."""
        return self._value is not None

    def reserve(self) -> None:
        """Announce a reader, during forward."""
        if self._left == 0 and self._source is not None:
            self._source.reserve()
        self._left += 1
        self.readers += 1

    def get(self, rebuild: Callable[[], object]) -> object:
        """The value, rebuilt if need be. A backward pass over a retained graph is followed by another like it."""
        value = rebuild() if self._value is None else self._value
        self._left = max(0, self._left - 1)
        self._value = value if self._left > 0 else None
        if self._left == 0 and kept_graph():
            self._left = self.readers
        return value


def kept_graph() -> bool:
    """Whether the backward pass that this thread is in retains its graph."""
    engine: Any = torch._C
    return bool(engine._autograd._get_current_graph_task_keep_graph())


@dataclass(frozen=True, kw_only=True, eq=False)
class Recomputed(Packed):
    """f(X_1, ..., X_m) of other representations, rebuilt when read and never stored.

    `function` maps the inputs to the tensor; `memo` lets the readers of one backward pass share the result.
    """

    inputs: tuple[Packed, ...]
    function: Callable[..., Tensor]
    shape: tuple[int, int]
    dtype: torch.dtype
    memo: Memo = field(default_factory=Memo)

    @property
    def depth(self) -> int:  # type: ignore[override]
        """One more than that of the deepest input."""
        return 1 + max(packed.depth for packed in self.inputs)

    @property
    def lossy(self) -> bool:  # type: ignore[override]
        """Whether an input is."""
        return any(packed.lossy for packed in self.inputs)

    @property
    def tensors(self) -> tuple[Tensor, ...]:  # noqa: D102
        return tuple(t for packed in self.inputs for t in packed.tensors)

    def bind(self, tensors: Sequence[Tensor | None]) -> Packed:  # noqa: D102
        return replace(self, inputs=bind_all(self.inputs, tensors))

    def decode(self) -> Tensor:  # noqa: D102
        with torch.no_grad():
            return self.function(*self.inputs).reshape(self.shape)

    def contract(self, g: Tensor) -> Tensor:  # noqa: D102
        return contract_dense(g, self.read())

    def read(self) -> Tensor:  # noqa: D102
        x = self.memo.get(self.decode)
        assert isinstance(x, Tensor)
        return x

    def reserve(self) -> None:  # noqa: D102
        self.memo.reserve()


def bind_all(packed: Sequence[Packed], tensors: Sequence[Tensor | None]) -> tuple[Packed, ...]:
    """Bind a flat sequence of tensors to several representations in order."""
    bound: list[Packed] = []
    for p in packed:
        count = len(p.tensors)
        bound.append(p.bind(tensors[:count]))
        tensors = tensors[count:]
    return tuple(bound)


def unbound(packed: Packed) -> Packed:
    """The representation without its tensors, for `ctx`: everything but what `save_for_backward` keeps."""
    return packed.bind([None] * len(packed.tensors))


def contract_dense(g: Tensor, x: Tensor) -> Tensor:
    """g^T x accumulated in fp32; on CPU never with a whole wide copy of x, which would undo the saving it serves."""
    g = promote(g)
    if x.dtype == g.dtype:
        return g.T @ x
    out = g.new_zeros(g.shape[1], x.shape[1])
    for part in row_chunks(x):
        out.addmm_(g[part].T, x[part].to(g.dtype))
    return out
