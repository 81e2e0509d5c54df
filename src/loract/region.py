"""A module as a region that runs again in backward: what must hold for that, how it is proved, and the second run.

Each kind of call is tried once, on its own first inputs, before a region takes it over: see `Region.verdict`.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from loract.arguments import Draws, Parts, Rebuild, Rest, parts
from loract.attention import Blockwise
from loract.codecs.base import Packed
from loract.device import agree, generator, has_values, holds
from loract.errors import LoractError
from loract.functions.adapted import adapted_linear, adds_in_place, in_place, merge, single_adapter
from loract.functions.base import Autocast
from loract.functions.checkpoint import TOKENS, Again
from loract.functions.linear import dense_weight, supplied_linear
from loract.saved import Index, Ledger
from loract.sharding import is_unit
from loract.watch import Mixing, Watch


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

    def __init__(self, module: nn.Module, ledger: Ledger, index: Index) -> None:
        """`index` is where the sites inside look for what stands for a tensor."""
        self.module, self.forward, self.ledger, self.index = module, module.forward, ledger, index
        self.inner = [m for m in module.modules() if m is not module]
        self._verdicts: dict[object, Verdict] = {}
        self._lock = threading.RLock()
        self._thread = threading.local()

    def parameters(self) -> list[Tensor]:
        """Trainable parameters as they are now (a sharding wrapper swaps them around each pass)."""
        with self._lock:  # another thread may have aliases in their place
            found = {id(p): p for _, _, p in self._slots()}
        return list(found.values())

    def plain(self, *args: Any, **kwargs: Any) -> Any:
        """What the module's own forward returns, with the parameters themselves in its graph."""
        with self._lock:
            return self.forward(*args, **kwargs)

    def verdict(self, tensors: Sequence[Tensor], coded: Sequence[Tensor], rebuild: Rebuild, rest: Rest) -> Verdict:
        """Try this kind of call, once: the same arguments in kind, training flags, adapters and precision.

        The module runs twice from the same random state, first as it is under no_grad, then on detached inputs and
        parameter aliases with a graph. It is refused where a second run changes something (buffers, inputs), gives
        other values, or reads trainable tensors that are no arguments. Watched operator by operator, the second run
        also shows which linear maps' values no gradient reads.
        """
        if (reason := rest.refused() or self._observed()) is not None:
            return Verdict(refused=reason)
        kinds = tuple((t.dtype, t.dim(), t.requires_grad) for t in tensors)
        key = (rest.key, kinds, Autocast.of(tensors[0]), self._state())
        if key not in self._verdicts:
            self._verdicts[key] = self._trial(tensors, {id(t) for t in coded}, rebuild)
        return self._verdicts[key]

    def values(self, rebuild: Rebuild, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Rebuild]:
        """The tensors in what the module's own forward returns, and a function that puts others in their places."""
        with self._lock:
            found = self._run(rebuild, tensors)
        return found.tensors, found.rebuild

    def again(self, rebuild: Rebuild, draws: Draws, autocast: Autocast, unread: frozenset[int]) -> Again:
        """How to run the module a second time with a graph, as it is now; see `Rerun.again`."""
        with self._lock:
            training, then = self._training(), self._conditions()

        def run(
            inputs: Sequence[Tensor], packed: Sequence[Packed], kept: Sequence[Packed], skip: bool
        ) -> tuple[list[Tensor], list[Tensor]]:
            for leaf, p in zip(inputs, packed, strict=True):
                if p.factored:
                    self.index.put(leaf, p)
            routing = _Routing(unread=unread if skip else frozenset(), merged=merged, kept=tuple(kept))
            with self._lock, self._mode(training):
                if self._conditions() != then:
                    raise LoractError(
                        f"{type(self.module).__name__} with other adapters, dropout or parameters in backward",
                        "those of its forward pass",
                        "run backward before they change, or attach a policy that runs nothing again (exact, tensor)",
                    )
                return self._rerun(inputs, rebuild, draws, autocast, routing)

        merged: dict[int, Tensor] = {}
        return Again(run=run, release=merged.clear)

    def _rerun(
        self, inputs: Sequence[Tensor], rebuild: Rebuild, draws: Draws, autocast: Autocast, routing: _Routing
    ) -> tuple[list[Tensor], list[Tensor]]:
        trial = routing.watch is not None
        attention = nullcontext() if trial else Blockwise(routing.kept)
        recomputing = self.ledger.recompute(trial=trial)
        with self._lock, self._aliased() as aliases, draws.replayed(), recomputing, attention, torch.enable_grad():
            self._thread.routing, before = routing, self._routing
            try:
                found = autocast.wrap(self._run)(rebuild, inputs)
            finally:
                self._thread.routing = before
        return found.tensors, aliases

    def _run(self, rebuild: Rebuild, tensors: Sequence[Tensor]) -> Parts:
        args, kwargs = rebuild(tensors)
        return parts(self.forward(*args, **kwargs))

    @property
    def _routing(self) -> _Routing | None:
        return getattr(self._thread, "routing", None)

    def linear(self, module: Any) -> Callable[..., Any]:
        """A forward for the linear map `module`, which in a second run supplies its value more cheaply."""
        original = module.forward

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if (routing := self._routing) is None:
                return original(x, *args, **kwargs)
            if routing.watch is not None:
                out = original(x, *args, **kwargs)
                routing.watch.label(out, id(module))
                return out
            read = id(module) not in routing.unread
            packed = self.index.factors(x)
            cheaper = (packed is not None or not read) and not args and not kwargs
            weight = dense_weight(module) if cheaper else None
            if weight is None or (packed is None and weight.requires_grad):
                return original(x, *args, **kwargs)
            return supplied_linear(x, weight, module.bias, packed, read=read)

        return forward

    def adapted(self, layer: Any) -> Callable[..., Any]:
        """A forward for the LoRA layer `layer`, which in a second run is one product with the merged weight."""
        original, base = layer.forward, layer.base_layer

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            routing = self._routing
            known = not args and not kwargs and not Autocast.of(x).enabled
            adapter = single_adapter(layer) if known else None
            if adapter is None or (routing is not None and routing.watch is not None):
                return original(x, *args, **kwargs)
            if routing is None:
                plain = not torch.is_grad_enabled() and x.is_floating_point() and getattr(layer, _CASTS, True)
                plain = plain and adds_in_place(layer)
                return in_place(base(x), x, layer, adapter) if plain else original(x)
            weight = dense_weight(base)
            if weight is None or weight.requires_grad or self.index.factors(x) is not None:
                return original(x)
            if id(base) not in routing.merged:
                routing.merged[id(base)] = merge(weight, adapter)
            read = id(base) not in routing.unread
            return adapted_linear(x, routing.merged[id(base)], base.bias, adapter, weight.dtype, read=read)

        return forward

    def _observed(self) -> str | None:
        """Why this call may not run without a graph, or not later: hooks inside are there in the first run for certain.

        One that records values would lose their gradient; one that adds arguments (PEFT's for adapters by sample or by
        token) is gone in backward.
        """
        cached = parametrize._cache_enabled > 0  # values that a run without a graph would leave to the others
        if cached and any(map(parametrize.is_parametrized, (self.module, *self.inner))):
            return "parametrized weights inside are cached beyond the call"
        for module in self.inner:
            if is_unit(module):  # its weights are gone when its part has run, in the second run too
                return f"parts of it are sharded by themselves ({type(module).__name__}): shard whole blocks"
            if module._forward_pre_hooks:
                return f"arguments come from a hook ({type(module).__name__} has a forward pre-hook)"
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
            first = self._run(rebuild, tensors)
            drew = draws.moved()
        if [t._version for t in (*buffers, *tensors)] != versions:
            for buffer, value in zip(buffers, kept, strict=True):
                buffer.data.copy_(value)
            return Verdict(refused="a run changes its buffers or its inputs")
        expected, plain = first.tensors, (type(None), bool, int, float, str)
        if strange := [type(o).__name__ for o in first.others if not isinstance(o, plain)]:
            return Verdict(refused=f"returns objects other than tensors ({', '.join(strange)})")
        by_token = not drew and len(expected) == 1 and self._by_token(tensors, rebuild)
        if by_token:  # some tokens then speak for all, and the wide tensors inside need not exist as a whole
            x = tensors[0]
            tensors = [x.detach().reshape(1, -1, x.shape[-1])[:, :TOKENS].requires_grad_(x.requires_grad)]
            with torch.no_grad():
                expected = self._run(rebuild, tensors).tensors
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
        return Verdict(
            decides=watch.decides,
            unread=watch.unread,
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
        if not has_values(x):
            with torch.no_grad(), Mixing() as mixing:
                self._run(rebuild, tensors)
            return not mixing.found
        with self._lock, self._aliased(_shaken), torch.no_grad():
            (whole,) = self._run(rebuild, tensors).tensors
            rows = x.reshape(-1, x.shape[-1])[1::2]
            if len(rows) == x.shape[1]:  # as many as in a sample: the module may be made for that number
                rows = rows[1:]
            try:
                (part,) = self._run(rebuild, [rows[None]]).tensors
            except (MemoryError, torch.OutOfMemoryError):
                raise
            except Exception:  # made for one number of tokens
                return False
        if whole.shape[:-1] != x.shape[:-1] or len(rows) == 0:
            return False
        whole = whole.reshape(-1, whole.shape[-1])[1::2][-len(rows) :]
        if part.numel() != whole.numel():
            return False
        # Products of other shapes round otherwise.
        tolerance = torch.finfo(whole.dtype).eps ** 0.75
        difference = (part.reshape(whole.shape) - whole).float().norm()
        return holds(difference <= tolerance * whole.float().norm())

    def _training(self) -> list[bool]:
        return [module.training for module in (self.module, *self.inner)]

    @contextmanager
    def _mode(self, training: Sequence[bool]) -> Generator[None]:
        """The training flags of an earlier moment."""
        before = self._training()
        try:
            for module, flag in zip((self.module, *self.inner), training, strict=True):
                module.training = flag
            yield
        finally:
            for module, flag in zip((self.module, *self.inner), before, strict=True):
                module.training = flag

    def _conditions(self) -> tuple[object, ...]:
        """What must be in backward as it was, beside training flags, which are put back."""
        return self._state(), [id(p) for p in self.parameters()]

    def _state(self) -> tuple[object, ...]:
        """What else decides how the module runs: training flags, dropout, what trains, the adapters in force."""
        flags: list[object] = []
        adapters: list[object] = []
        for module in (self.module, *self.inner):
            trains = (p.requires_grad for p in module._parameters.values() if p is not None)
            flags.append((module.training, getattr(module, "p", None), *trains))
            if hasattr(module, "merged_adapters"):
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


_CASTS = "cast_input_dtype_enabled"


@dataclass(frozen=True, kw_only=True)
class _Routing:
    """What the linear maps of a region do in the run that this thread makes."""

    unread: frozenset[int] = frozenset()
    watch: Watch | None = None
    kept: tuple[Packed, ...] = ()
    """Outputs of attention from the first run."""
    merged: dict[int, Tensor] = field(default_factory=lambda: dict[int, Tensor]())
    """Weights of adapted linear maps, by id of the base: made once for all tokens of one backward."""


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return agree(a, b) or holds(((a == b) | ((a != a) & (b != b))).all())


def _shaken(parameter: Tensor) -> Tensor:
    draws = generator(parameter.device, 0)
    noise = torch.empty_like(parameter).uniform_(-0.5, 0.5, generator=draws)
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
