"""A module as a region that runs again in backward: what must hold for that, how it is proved, and the second run.

Each kind of call is tried once, on its own first inputs, before a region takes it over: see `Region.verdict`.
"""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from loract.codecs.base import Packed
from loract.functions.base import Autocast
from loract.functions.checkpoint import TOKENS
from loract.functions.linear import dense_weight, supplied_linear
from loract.saved import Ledger

Rebuild = Callable[[Sequence[Tensor]], Any]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a trial found out about one kind of call."""

    refused: str | None = None
    """Why the module may not run again."""
    decides: bool = False
    """Whether a choice (top-k, argmax) depends on the inputs: a coded input could choose otherwise."""
    unread: frozenset[int] = frozenset()
    """Linear maps whose value no gradient reads, by id."""
    differentiable: tuple[bool, ...] = ()
    """Which outputs have a gradient."""
    by_token: bool = False
    """Whether every token is treated by itself and nothing is drawn."""


class Region:
    """One module whose inner activations are not kept."""

    def __init__(self, module: nn.Module, ledger: Ledger, packed_of: Callable[[Tensor, Packed], None]) -> None:
        """`packed_of(x, packed)` is told which tensor of the second run is represented by what."""
        self.module, self.forward, self.ledger = module, module.forward, ledger
        self.packed_of = packed_of
        self.inner = [m for m in module.modules() if m is not module]
        self.linears: list[Any] = []
        self._verdicts: dict[object, Verdict] = {}
        self._lock = threading.RLock()
        self._run = threading.local()

    # -- the call ---------------------------------------------------------------------------------------------------

    def parameters(self) -> list[Tensor]:
        """Trainable parameters as they are now (a sharding wrapper swaps them around each pass)."""
        found = {id(p): p for _, _, p in self._slots()}
        return list(found.values())

    def verdict(self, tensors: Sequence[Tensor], coded: Sequence[Tensor], rebuild: Rebuild, rest: Rest) -> Verdict:
        """Try this kind of call, once: the same arguments in kind, training flags, adapters and precision.

        The module runs twice from the same random state, first as it is under no_grad, then on detached inputs and
        parameter aliases with a graph. It is refused where a second run changes something (buffers, inputs), gives
        other values, or reads trainable tensors that are no arguments. Watched operator by operator, the second run
        also shows which linear maps' values no gradient reads.
        """
        kinds = tuple((t.dtype, t.dim(), t.requires_grad) for t in tensors)
        key = (rest.key, kinds, Autocast.of(tensors[0]), self._state())
        if (reason := rest.refused() or self._observed()) is not None:
            return Verdict(refused=reason)
        if key not in self._verdicts:
            self._verdicts[key] = self._trial(tensors, {id(t) for t in coded}, rebuild)
        return self._verdicts[key]

    def values(self, rebuild: Rebuild, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Rebuild]:
        """The tensors in what the module's own forward returns, and a function that puts others in their places."""
        with self._lock:  # another thread may have aliases in the place of the parameters
            args, kwargs = rebuild(tensors)
            out, _, remake = _parts(self.forward(*args, **kwargs))
        return out, remake

    def again(self, rebuild: Rebuild, draws: Draws, autocast: Autocast, unread: frozenset[int]) -> Callable[..., Any]:
        """How to run the module a second time with a graph; see `Rerun.again`."""

        def run(inputs: Sequence[Tensor], packed: Sequence[Packed], skip: bool) -> tuple[list[Tensor], list[Tensor]]:
            for leaf, p in zip(inputs, packed, strict=True):
                if p.factored:
                    self.packed_of(leaf, p)
            routing = _Routing(unread=unread if skip else frozenset())
            return self._rerun(inputs, rebuild, draws, autocast, routing)

        return run

    def _rerun(
        self, inputs: Sequence[Tensor], rebuild: Rebuild, draws: Draws, autocast: Autocast, routing: _Routing
    ) -> tuple[list[Tensor], list[Tensor]]:
        with self._lock, self._aliased() as aliases, draws.replayed(), self.ledger.recompute(), torch.enable_grad():
            self._run.routing, before = routing, getattr(self._run, "routing", None)
            try:
                args, kwargs = rebuild(inputs)
                out = autocast.wrap(self.forward)(*args, **kwargs)
            finally:
                self._run.routing = before
        return flatten(out)[0], aliases

    # -- linear maps inside -----------------------------------------------------------------------------------------

    def linear(self, module: Any, lookup: Callable[[Tensor], Packed | None]) -> Callable[..., Any]:
        """A forward for the linear map `module`, which in a second run supplies its value more cheaply."""
        original = module.forward
        self.linears.append(module)

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            routing: _Routing | None = getattr(self._run, "routing", None)
            if routing is None:
                return original(x, *args, **kwargs)
            if routing.watch is not None:
                out = original(x, *args, **kwargs)
                routing.watch.label(out, id(module))
                return out
            read = id(module) not in routing.unread
            packed = lookup(x)
            if read and packed is None:
                return original(x, *args, **kwargs)
            weight = dense_weight(module)
            if weight is None or args or kwargs:
                return original(x, *args, **kwargs)
            if packed is None and weight.requires_grad:
                return original(x, *args, **kwargs)
            return supplied_linear(x, weight, module.bias, packed, read=read)

        return forward

    # -- the trial --------------------------------------------------------------------------------------------------

    def _observed(self) -> str | None:
        """Why this call may not run without a graph: somebody records values inside, whose gradient would be lost."""
        for module in self.inner:
            if any(not _dormant(hook) for hook in module._forward_hooks.values()):
                return f"values inside are recorded ({type(module).__name__} has a forward hook)"
        return None

    def _trial(self, tensors: Sequence[Tensor], coded: set[int], rebuild: Rebuild) -> Verdict:
        chosen = [id(t) in coded for t in tensors]
        tensors = [t.detach().clone().requires_grad_(t.requires_grad) for t in tensors]  # a run may change them
        buffers = list(self.module.buffers())
        kept = [b.clone() for b in buffers]
        versions = [t._version for t in (*buffers, *tensors)]
        draws, autocast = Draws.now(tensors), Autocast.of(tensors[0])
        with draws.replayed(), torch.no_grad():
            args, kwargs = rebuild(tensors)
            first = self.forward(*args, **kwargs)
            drew = draws.moved()
        if [t._version for t in (*buffers, *tensors)] != versions:
            for buffer, value in zip(buffers, kept, strict=True):
                buffer.data.copy_(value)
            return Verdict(refused="a run changes its buffers or its inputs")
        expected, others = flatten(first)
        if strange := [type(o).__name__ for o in others if not isinstance(o, (type(None), bool, int, float, str))]:
            return Verdict(refused=f"returns objects other than tensors ({', '.join(strange)})")
        by_token = not drew and len(expected) == 1 and self._by_token(tensors, rebuild)
        if by_token:  # some tokens then speak for all, and the wide tensors inside need not exist as a whole
            tensors = [
                tensors[0]
                .detach()
                .reshape(1, -1, tensors[0].shape[-1])[:, :TOKENS]
                .requires_grad_(tensors[0].requires_grad)
            ]
            expected = self._outputs(tensors, rebuild)
        watch = Watch()
        inputs = [t.detach().requires_grad_(t.requires_grad) for t in tensors]
        for leaf, is_coded in zip(inputs, chosen, strict=True):
            if is_coded:
                watch.derive(leaf)
        with watch:
            outputs, aliases = self._rerun(inputs, rebuild, draws, autocast, _Routing(watch=watch))
        if len(outputs) != len(expected) or not all(map(_equal, outputs, expected)):
            return Verdict(refused="a second run gives other values")
        if not _leaves(outputs) <= {id(t) for t in (*inputs, *aliases)}:
            return Verdict(refused="reads trainable tensors that are neither its arguments nor its parameters")
        unread = frozenset(id(m) for m in self.linears) & watch.unread
        return Verdict(
            decides=watch.decides,
            unread=unread,
            differentiable=tuple(out.requires_grad for out in outputs),
            by_token=by_token,
        )

    def _by_token(self, tensors: Sequence[Tensor], rebuild: Rebuild) -> bool:
        """Whether every other token, run alone, gives its part of the output.

        Every other: a half in a row may consist of whole samples, which attention treats alone too. With other values
        in the place of the trainable parameters: what mixes tokens may still be zero.
        """
        x = tensors[0]
        if len(tensors) != 1 or x.dim() != 3 or x.shape[:-1].numel() < 2:
            return False
        with self._lock, self._aliased(_shaken):
            (whole,) = self._outputs(tensors, rebuild)
            (part,) = self._outputs([x.reshape(-1, x.shape[-1])[None, 1::2]], rebuild)
        if whole.shape[:-1] != x.shape[:-1]:
            return False
        whole = whole.reshape(-1, whole.shape[-1])[1::2]
        # Products of other shapes round otherwise.
        tolerance = torch.finfo(whole.dtype).eps ** 0.75
        difference = (part.reshape(-1, part.shape[-1]) - whole).float().norm()
        return part.numel() == whole.numel() and bool(difference <= tolerance * whole.float().norm())

    def _outputs(self, tensors: Sequence[Tensor], rebuild: Rebuild) -> list[Tensor]:
        with torch.no_grad():
            args, kwargs = rebuild(tensors)
            return flatten(self.forward(*args, **kwargs))[0]

    def _state(self) -> tuple[object, ...]:
        """What else decides how the module runs: training flags, dropout, what trains, the adapters in force."""
        flags: list[object] = []
        adapters: list[object] = []
        for module in (self.module, *self.inner):
            trains = (p.requires_grad for p in module._parameters.values() if p is not None)
            flags.append((module.training, getattr(module, "p", None), *trains))
            if hasattr(module, "lora_A"):
                layer: Any = module
                adapters.append((tuple(layer.active_adapters), tuple(layer.merged_adapters), layer.disable_adapters))
        return tuple(flags), tuple(adapters)

    def _slots(self) -> Iterator[tuple[nn.Module, str, Tensor]]:
        for module in (self.module, *self.inner):
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.requires_grad:
                    yield module, name, parameter

    @contextmanager
    def _aliased(self, make: Callable[[Tensor], Tensor] = Tensor.detach) -> Generator[list[Tensor]]:
        """Detached aliases in the place of the trainable parameters: hooks on those must not fire twice."""
        slots = list(self._slots())
        aliases: dict[int, Tensor] = {}
        for module, name, parameter in slots:
            alias = aliases.setdefault(id(parameter), make(parameter).requires_grad_())
            module._parameters[name] = alias  # pyright: ignore[reportArgumentType]
        try:
            yield list(aliases.values())
        finally:
            for module, name, parameter in slots:
                module._parameters[name] = parameter  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True, kw_only=True)
class _Routing:
    """What the linear maps of a region do in the run that this thread makes."""

    unread: frozenset[int] = frozenset()
    watch: Watch | None = None


# -- arguments ----------------------------------------------------------------------------------------------------


def flatten(value: Any) -> tuple[list[Tensor], list[Any]]:
    """Tensors and other leaves of nested tuples, lists, dicts, model outputs and partials."""
    tensors, others, _ = _parts(value)
    return tensors, others


@dataclass(frozen=True, kw_only=True)
class Rest:
    """What a call's arguments hold beside tensors."""

    key: object
    caches: bool
    """Whether a key-value cache is among them."""

    def refused(self) -> str | None:
        """Why a module with such arguments may not run twice."""
        return "appends to a key-value cache that is filled" if self.caches else None


def arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Tensor], Rebuild, Rest]:
    """The tensors in a call's arguments, a function that puts others in their places, and the rest."""
    tensors, others, rebuild = _parts((args, kwargs))
    key = (str(tree_flatten((args, kwargs))[1]), tuple(_describe(o) for o in others))
    return tensors, rebuild, Rest(key=key, caches=any(hasattr(o, "get_seq_length") for o in others))


def activations(tensors: Sequence[Tensor], widths: frozenset[int]) -> list[Tensor]:
    """Those of a region's inputs that a codec may code: of a width that some weight has, with a gradient or first.

    Masks, rotary angles, positions and routing weights are none.
    """
    wide = [t for t in tensors if t.is_floating_point() and t.dim() >= 2 and t.shape[-1] in widths]
    first = next((t for t in wide if t.requires_grad), wide[0] if wide else None)
    return [t for t in wide if t.requires_grad or t is first]


def without_empty_cache(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments without a key-value cache that is empty still: a second run would append to it."""
    layer = next((i for m in module.modules() if isinstance(i := getattr(m, "layer_idx", None), int)), 0)

    def dropped(value: Any) -> Any:
        return None if hasattr(value, "get_seq_length") and not value.get_seq_length(layer) else value

    return tuple(map(dropped, args)), {name: dropped(value) for name, value in kwargs.items()}


def _parts(value: Any) -> tuple[list[Tensor], list[Any], Rebuild]:
    leaves, spec = tree_flatten(value)
    tensors: list[Tensor] = []
    others: list[Any] = []
    makers: list[Callable[[Iterator[Tensor]], Any]] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            tensors.append(leaf)
            makers.append(next)
        elif isinstance(leaf, functools.partial):
            part: functools.partial[Any] = leaf
            inner, rest, remake = _parts((part.args, part.keywords))
            tensors += inner
            others += [part.func, *rest]
            makers.append(functools.partial(_remade, part.func, remake, len(inner)))
        else:
            others.append(leaf)
            makers.append(functools.partial(_same, leaf))
    return tensors, others, lambda given: tree_unflatten([make(it) for it in [iter(given)] for make in makers], spec)


def _same(leaf: Any, _: Iterator[Tensor]) -> Any:
    return leaf


def _remade(function: Callable[..., Any], remake: Rebuild, count: int, given: Iterator[Tensor]) -> Any:
    args, kwargs = remake([next(given) for _ in range(count)])
    return functools.partial(function, *args, **kwargs)


def _describe(leaf: Any) -> object:
    return leaf if isinstance(leaf, (type(None), bool, str, int, float)) else type(leaf).__qualname__


# -- random state -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Draws:
    """The global random state before a run, on the CPU and on the devices of its tensors."""

    cpu: Tensor
    devices: tuple[tuple[torch.device, Tensor], ...]

    @classmethod
    def now(cls, tensors: Sequence[Tensor]) -> Draws:
        """The state now."""
        devices = {t.device for t in tensors if t.is_cuda}
        return cls(cpu=torch.get_rng_state(), devices=tuple((d, torch.cuda.get_rng_state(d)) for d in devices))

    def moved(self) -> bool:
        """Whether something was drawn since."""
        now = [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d, _ in self.devices)]
        then = [self.cpu, *(state for _, state in self.devices)]
        return not all(map(torch.equal, now, then))

    @contextmanager
    def replayed(self) -> Generator[None]:
        """Draw what was drawn then; afterwards the global state is as it was."""
        with torch.random.fork_rng(devices=[d for d, _ in self.devices]):
            torch.set_rng_state(self.cpu)
            for device, state in self.devices:
                torch.cuda.set_rng_state(state, device)
            yield


# -- watching a run -----------------------------------------------------------------------------------------------

_aten = torch.ops.aten
_LINEAR = {
    _aten.add.Tensor,
    _aten.add_.Tensor,
    _aten.sub.Tensor,
    _aten.sub_.Tensor,
    _aten.neg.default,
    _aten._to_copy.default,
    _aten.clone.default,
    _aten.copy_.default,
    _aten.cat.default,
    _aten.native_dropout.default,
    _aten.index_add_.default,
    _aten.index_add.default,
}
"""Operators whose gradient does not depend on the operand's value."""
_SCALING = {
    _aten.mul.Tensor,
    _aten.mul_.Tensor,
    _aten.div.Tensor,
    _aten.div_.Tensor,
    _aten.mul.Scalar,
    _aten.div.Scalar,
}
"""The same, if the factor needs no gradient."""
_SHAPES = {_aten.empty_like.default, _aten.zeros_like.default, _aten.ones_like.default}
"""Operators that look at shapes alone."""
_DECISIONS = {
    _aten.topk.default,
    _aten.argmax.default,
    _aten.argmin.default,
    _aten.argsort.default,
    _aten.sort.default,
    _aten.sort.stable,
    _aten.nonzero.default,
    _aten.multinomial.default,
    _aten.bucketize.Tensor,
}


_INPUT = -1
"""The mark of values that derive from the inputs; the others are labels."""


class Watch(TorchDispatchMode):
    """Follows values through a run, by storage.

    A label is put on each linear map's output and follows it through operators whose gradient does not read it; an
    operator that may read it (any other, and anything inside a custom Function, where gradients are off) marks the
    label as read. Beside it, `decides` tells whether a choice was made from a value that derives from the inputs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.decides = False
        self._seen: set[int] = set()
        self._read: set[int] = set()
        self._marks: dict[int, tuple[Any, frozenset[int]]] = {}

    @property
    def unread(self) -> frozenset[int]:
        """Labels of values that no gradient reads."""
        return frozenset(self._seen - self._read)

    def label(self, out: Tensor, label: int) -> None:
        """Follow this value. A map that is run twice keeps one label for both."""
        self._seen.add(label)
        self._mark(out, self._of(out) & {_INPUT} | {label})

    def derive(self, x: Tensor) -> None:
        """Call x an input."""
        self._mark(x, self._of(x) | {_INPUT})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        marks = frozenset[int]().union(*map(self._of, given))
        out = func(*args, **kwargs)
        if func in _SHAPES or func.is_view:
            return out  # a view shares its storage, and so its marks
        self.decides |= _INPUT in marks and func in _DECISIONS
        if not self._blind(func, given):
            self._read |= marks - {_INPUT}
            marks &= {_INPUT}
        for t in tree_flatten(out)[0]:
            if isinstance(t, Tensor) and marks:
                self._mark(t, marks | self._of(t))
        return out

    def _blind(self, func: Any, given: Sequence[Tensor]) -> bool:
        """Whether the gradient of this operator ignores the labelled operands' values."""
        if not torch.is_grad_enabled():
            return False
        if func in _SCALING:
            return len(given) < 2 or not given[1].requires_grad
        return func in _LINEAR

    def _of(self, t: Tensor) -> frozenset[int]:
        return self._marks.get(t.untyped_storage()._cdata, (None, frozenset[int]()))[1]

    def _mark(self, t: Tensor, marks: frozenset[int]) -> None:
        storage = t.untyped_storage()
        key = storage._cdata
        # The address of a dead storage is soon another's: its marks have to go with it.
        self._marks[key] = (weakref.ref(storage, lambda _, key=key: self._marks.pop(key, None)), marks)


# -- checks -------------------------------------------------------------------------------------------------------


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())


def _shaken(parameter: Tensor) -> Tensor:
    generator = torch.Generator(parameter.device).manual_seed(0)
    noise = torch.empty_like(parameter).uniform_(-0.5, 0.5, generator=generator)
    return parameter.detach() + noise


def _leaves(outputs: Sequence[Tensor]) -> set[int]:
    """Ids of the leaves that the outputs' graph reaches."""
    found: set[int] = set()
    todo: list[Any] = [out.grad_fn for out in outputs if out.grad_fn is not None]
    seen: set[Any] = set(todo)
    found |= {id(out) for out in outputs if out.grad_fn is None and out.requires_grad}
    while todo:
        node = todo.pop()
        if (variable := getattr(node, "variable", None)) is not None:
            found.add(id(variable))
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                todo.append(following)
    return found


def _dormant(hook: Any) -> bool:
    """Whether a hook is transformers' recorder of outputs while nothing is being recorded."""
    name = "transformers.utils.output_capturing"
    if getattr(hook, "__module__", None) != name:
        return False
    recording = sys.modules[name]._active_collector.get()
    held = dict(zip(hook.__code__.co_freevars, hook.__closure__, strict=True))
    return recording is None or held["key"].cell_contents not in recording
