"""The residual stream as one running sum and coded increments, from which backward walks down.

In a residual network the input of each norm is a running sum, h_(l+1) = h_l + f_l(h_l). One decoded sum s is kept for
the whole stack, in fp32, and for each position the coded v = h_(l+1) - s; then s += decode(v). The loop is closed
(differential coding, as in DPCM): s stays within one coding error of h_(l+1) and errors do not add up. Backward walks
down, s -= decode(v), and finds every position again.

The coding holds for whatever a norm reads, so structure decides only about bytes: which norm follows which is read off
the autograd graph. What belongs to no stack (a norm after the sum, as in BERT) is coded by itself. The norm of a
sublayer's output (a sandwich norm) need not be kept at all: its output is what the next position adds.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from loract.codecs.base import Affine, Packed, contract_dense, kept_graph
from loract.cpu import unwidened
from loract.errors import LoractError
from loract.linalg import promote, row_chunks

Encode = Callable[[Tensor], Packed]
UNDECIDED = 2
"""Inputs held as they are until it is known what they are: the first of a stack, and that of a sandwich norm."""
HOPS = 4
"""Additions and casts between one position and the next (parallel branches are added one after the other)."""
SMALLEST_SCALE = 0.1
"""Share of a norm's mean scale below which a channel takes no correction from the loop."""
_ENTRY, _NORM = "loract_entry", "loract_norm"
_PASSING = ("AddBackward0", "ToCopyBackward0", "NativeDropoutBackward0", "MulBackward0", "ViewBackward0")


@dataclass(kw_only=True, eq=False)
class Chain:
    """Positions of one stack in one graph. `state` (N, n) holds the decoded value of position `at`.

    It is the only tensor of the library that changes between forward and backward. It and the codes are held here and
    not through save_for_backward, since both directions of the walk need them: each is dropped as soon as everything
    that was announced has read it, unless the graph is retained.
    """

    state: Tensor | None
    at: int = 0
    codes: list[Packed] = field(default_factory=lambda: list[Packed]())
    readers: list[int] = field(default_factory=lambda: [0])
    """Announced readers of each position, and of the increment that leads to it."""

    def push(self, x: Tensor, encode: Encode, sandwich: Sandwich | None = None) -> int:
        """Code x (N, n) as the next position and go there; `sandwich` is the norm whose output leads to it."""
        self._walk(len(self.codes))
        assert self.state is not None
        value = torch.empty_like(x)
        for part in row_chunks(x):
            step = x[part] - self.state[part]
            value[part] = step if sandwich is None else sandwich.normalised(part, step)
        packed = encode(value)
        self.codes.append(packed if sandwich is None else sandwich.increment(packed))
        self.readers.append(0)
        self._walk(len(self.codes))
        return self.at

    def decode(self, position: int, dtype: torch.dtype) -> Tensor:
        """The value at a position (N, n), as a copy."""
        self._check(position)
        self._walk(position)
        assert self.state is not None
        return self.state.to(dtype, copy=True)

    def code(self, position: int) -> Packed:
        """What leads to a position."""
        self._check(position)
        return self.codes[position - 1]

    def done(self, position: int) -> None:
        """An announced reader has read. What nobody will read is dropped, from the end of the stack down."""
        if kept_graph():
            return
        self.readers[position] -= 1
        while self.readers and self.readers[-1] <= 0:
            self.readers.pop()
            if self.codes:
                self._walk(len(self.codes) - 1)
                self.codes.pop()
        if not self.readers:
            self.state = None

    def _walk(self, position: int) -> None:
        assert self.state is not None
        while self.at != position:
            up = self.at < position
            code = self.codes[self.at if up else self.at - 1]
            with unwidened():
                for part in row_chunks(self.state):
                    self.state[part].add_(code.rows(part).decode(), alpha=1 if up else -1)
            self.at += 1 if up else -1

    def _check(self, position: int) -> None:
        if position >= len(self.readers):
            raise _dropped("walk down a residual stream that was dropped after the first")


def _dropped(what: str) -> LoractError:
    once, retain = (
        "one backward pass for each forward pass",
        "call backward(retain_graph=True) on all passes but the last",
    )
    return LoractError(f"a second {what}", once, retain)


@dataclass(frozen=True, kw_only=True, eq=False)
class Sandwich:
    """A norm whose output y = scale xhat + bias is what the sum gains: xhat is coded, for both.

    The loop's correction is added where it is small beside xhat: v = xhat + (step - y) / scale. Channels whose scale is
    next to nothing (Gemma's 1 + w reaches zero) wait for the next step.
    """

    x: Tensor
    scale: Tensor | None
    bias: Tensor | None
    rstd: Tensor
    mean: Tensor | None

    def normalised(self, part: slice, step: Tensor) -> Tensor:
        """V for rows of the step from the decoded sum to the new one."""
        centred = promote(self.x[part]) if self.mean is None else self.x[part] - self.mean[part]
        xhat = centred * self.rstd[part]
        missing = step - xhat if self.scale is None else torch.addcmul(step, xhat, self.scale, value=-1)
        if self.bias is not None:
            missing -= self.bias
        if self.scale is not None:
            least = SMALLEST_SCALE * self.scale.abs().mean()
            missing *= torch.where(self.scale.abs() < least, torch.zeros_like(self.scale), self.scale.reciprocal())
        return xhat.add_(missing)

    def increment(self, packed: Packed) -> Packed:
        """What the sum gains."""
        return packed.affine(cols=self.scale, bias=self.bias, dtype=self.rstd.dtype)


@dataclass(frozen=True, kw_only=True, eq=False)
class Branch:
    """A norm's input x = xhat / rstd + mean, from the code that leads to a position."""

    chain: Chain
    position: int
    rstd: Tensor
    mean: Tensor | None

    def decode(self, dtype: torch.dtype) -> Tensor:
        """X (N, n)."""
        code = self.chain.code(self.position)
        assert isinstance(code, Affine)
        out = torch.empty(code.shape, dtype=dtype, device=self.rstd.device)
        for part in row_chunks(out):
            x = code.inner.rows(part).decode() / self.rstd[part]
            out[part] = x if self.mean is None else x + self.mean[part]
        return out


@dataclass(kw_only=True, eq=False)
class Entry:
    """The input x (N, n) of one norm: held as it is, coded by itself, a position of a chain, or a branch of one."""

    x: Tensor | None
    kind: tuple[tuple[int, int], torch.dtype, torch.device]
    encode: Encode
    version: int
    """Of x when the norm read it."""
    layer: int | None = None
    """Where the norm is."""
    code: Packed | None = None
    chain: Chain | None = None
    position: int = 0
    branch: Branch | None = None
    norm: dict[str, Any] = field(default_factory=lambda: dict[str, Any]())
    """Scale, bias, rstd and mean of the norm, while undecided."""
    readers: int = 0

    def sandwich(self) -> Sandwich:
        """The norm that reads it, as one whose output is what a sum gains."""
        return Sandwich(x=self._held(), **self.norm)

    @property
    def undecided(self) -> bool:
        """Whether it is held as it is."""
        return self.x is not None

    @property
    def known(self) -> bool:
        """Whether its value can still be had."""
        return self.x is not None or self.code is not None or self.chain is not None

    @property
    def ends(self) -> bool:
        """Whether a chain may still go on from here."""
        return self.known and (self.chain is None or self.position == len(self.chain.codes))

    def settle(self) -> None:
        """Code it by itself."""
        if self.x is not None:
            self.code, self.x = self.encode(self._held()), None
            self.norm.clear()

    def begin(self) -> Chain:
        """The chain that it is in, or now begins."""
        if self.chain is None:
            x = self.decode()
            self.join(Chain(state=x.to(promote(x[:0]).dtype, copy=True)), 0)
        assert self.chain is not None
        return self.chain

    def join(self, chain: Chain, position: int, branch: Branch | None = None) -> None:
        """Be a position of a chain, or what becomes the increment that leads to it."""
        self.x = self.code = None
        self.norm.clear()
        self.chain, self.position, self.branch = chain, position, branch
        chain.readers[position] += self.readers

    def reserve(self) -> None:
        """Announce a reader."""
        self.readers += 1
        if self.chain is not None:
            self.chain.readers[self.position] += 1

    def decode(self) -> Tensor:
        """X (N, n) in its own dtype."""
        if self.branch is not None:
            return self.branch.decode(self.kind[1])
        if self.chain is not None:
            return self.chain.decode(self.position, self.kind[1])
        return self._held() if self.code is None else self.code.decode()

    def _held(self) -> Tensor:
        if self.x is None:
            raise _dropped("read of a norm's input that was dropped after the first backward pass")
        if not self.x.is_inference() and self.x._version != self.version:
            raise LoractError(
                "a norm's input that was edited in place after the norm had read it",
                "an input that stays as it is until backward",
                "write x = x + y for x += y, or leave this norm out of the policy",
            )
        return self.x

    def done(self) -> None:
        """An announced reader has read."""
        if self.chain is not None:
            self.chain.done(self.position)
        elif not kept_graph():
            self.readers -= 1
            if self.readers <= 0:
                self.x = self.code = None
                self.norm.clear()


@dataclass(frozen=True, kw_only=True, eq=False)
class Streamed(Packed):
    """An entry as a packed tensor. Its tensors are the chain's, not its own."""

    entry: Entry

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        """(N, n)."""
        return self.entry.kind[0]

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """Of x."""
        return self.entry.kind[1]

    @property
    def lossy(self) -> bool:  # type: ignore[override]
        """As far as is known now."""
        return True

    @property
    def tensors(self) -> tuple[Tensor, ...]:  # noqa: D102
        return ()

    def bind(self, tensors: Sequence[Tensor | None]) -> Packed:  # noqa: D102
        return self

    def decode(self) -> Tensor:  # noqa: D102
        return self.entry.decode()

    def contract(self, g: Tensor) -> Tensor:  # noqa: D102
        return contract_dense(g, self.read())

    def reserve(self) -> None:  # noqa: D102
        self.entry.reserve()

    def read(self) -> Tensor:  # noqa: D102
        x = self.entry.decode()
        self.entry.done()
        return x


class Streams:
    """Finds out what each norm's input is. One for each attached model; every thread has its own recent past."""

    def __init__(self) -> None:
        self._thread = threading.local()

    def enter(self, x: Tensor, encode: Encode, layer: int | None = None) -> Streamed:
        """What stands for x (..., n), the input of a norm in a layer."""
        flat = x.detach().reshape(-1, x.shape[-1])
        kind = ((flat.shape[0], flat.shape[1]), x.dtype, x.device)
        node: Any = x.grad_fn
        known = None if node is None else _marked(node, x.output_nr)
        if known is not None and known.kind == kind and known.known:
            return Streamed(entry=known)  # parallel branches read one sum
        version = 0 if flat.is_inference() else flat._version
        entry = Entry(x=flat, kind=kind, encode=encode, version=version, layer=layer)
        with torch.no_grad():
            self._place(entry, flat, node)
        if node is None:
            self._thread.start = weakref.ref(entry)
        else:
            node.metadata[_ENTRY] = (x.output_nr, weakref.ref(entry))
        return Streamed(entry=entry)

    def output(self, y: Tensor, entry: Entry, **norm: Tensor | None) -> None:
        """`y` is the output of the norm that reads `entry`; `norm` is its scale, bias, rstd and mean."""
        if entry.undecided:
            entry.norm = norm
        node: Any = y.grad_fn
        if node is not None:
            node.metadata[_NORM] = weakref.ref(entry)

    def _place(self, entry: Entry, flat: Tensor, node: Any) -> None:
        recent = self._recent()
        previous = self._previous(node, entry.layer)
        if previous is None or previous.kind != entry.kind:
            for norm_input in _norms(node):  # its output is added to something that is no stack
                norm_input.settle()
            recent.append(weakref.ref(entry))
            if len(recent) > UNDECIDED and (oldest := recent.popleft()()) is not None:
                oldest.settle()
            return
        chain = previous.begin()
        norms = [norm_input for norm_input in _norms(node) if norm_input.kind == entry.kind] if _plain_sum(node) else []
        sandwich = norms[0].sandwich() if len(norms) == 1 else None
        position = chain.push(flat, entry.encode, sandwich)
        entry.join(chain, position)
        if sandwich is not None:
            branch = Branch(chain=chain, position=position, rstd=sandwich.rstd, mean=sandwich.mean)
            norms[0].join(chain, position, branch)
        while recent:
            if (other := recent.popleft()()) is not None:
                other.settle()

    def _previous(self, node: Any, layer: int | None) -> Entry | None:
        """The position that this sum continues."""
        start: Entry | None = getattr(self._thread, "start", lambda: None)()
        for before, index in _summands(node):
            if before is not None:
                found = _marked(before, index)
            else:  # what needs no gradient leaves no trace in the graph: the last such input, while it is the end
                # A norm before the first layer is the embeddings' own, and what goes on is its output.
                found = start if start is not None and start.ends and start.layer == layer else None
            if found is not None:
                return found
        return None

    def _recent(self) -> deque[Any]:
        if not hasattr(self._thread, "recent"):
            self._thread.recent = deque[Any]()
        return self._thread.recent


def _summands(node: Any) -> Iterator[tuple[Any, int]]:
    """Edges that lead into a value: through additions and casts, or of the one operator that made it."""
    level = [] if node is None else [node]
    for _ in range(HOPS):
        edges = [(n, edge) for n in level for edge in n.next_functions]
        yield from (edge for n, edge in edges if edge[0] is not None or _passing(n))
        level = [before for _, (before, _) in edges if before is not None and _passing(before)]


def _passing(node: Any) -> bool:
    return type(node).__name__ in _PASSING


def _plain_sum(node: Any) -> bool:
    return type(node).__name__ == "AddBackward0" and node._saved_alpha == 1


def _norms(node: Any) -> list[Entry]:
    """Undecided inputs of the norms whose outputs this operator reads."""
    edges = () if node is None else node.next_functions
    references = [before.metadata.get(_NORM) for before, _ in edges if before is not None]
    found = [reference() for reference in references if reference is not None]
    return [entry for entry in found if entry is not None and entry.undecided]


def _marked(node: Any, index: int) -> Entry | None:
    number, reference = node.metadata.get(_ENTRY, (None, None))
    entry = reference() if number == index and reference is not None else None
    return entry if entry is not None and entry.known and entry.branch is None else None
