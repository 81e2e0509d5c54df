"""Where the memory of one training step goes: bytes alive by phase, at the peak, by module, and over time."""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import CodeType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from loract.errors import LoractError
from loract.memory import StorageTracker
from loract.region import Region

T = TypeVar("T")

PHASES = ("forward", "loss", "backward", "optimiser")
COMPONENTS = (
    "frozen weights",
    "trained weights",
    "optimiser state",
    "inputs",
    "gradients",
    "saved activations",
    "saved by the loss",
    "temporaries",
)
"""What bytes alive are. Frozen weights include buffers; what forward or the loss has made and still holds when it ends
is saved, its result included; a temporary dies in the phase in which it is made."""
OUTSIDE = "outside modules"
"""Where storages come from that no module's forward has made: the loss, backward's operators, the optimiser."""
MOST_MOMENTS = 2000
LARGEST = 10


@dataclass(frozen=True, kw_only=True)
class Moment:
    """One point of a timeline: bytes alive after `event`, an operator that allocates, "free", "start" or "end"."""

    seconds: float
    phase: str
    bytes: int
    event: str


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One part of the step: bytes alive at its start and its end, and the most in between."""

    name: str
    start_bytes: int
    end_bytes: int
    peak_bytes: int
    allocator_peak_bytes: int | None = None
    """CUDA's own figure: with temporaries inside kernels, and with whatever else the process holds there."""


@dataclass(frozen=True, kw_only=True)
class Contributor:
    """Like storages that are alive at the peak: of one component, module, operator and shape."""

    component: str
    module: str
    operator: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    """Of all of them together."""
    count: int = 1


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One training step. Bytes alive include weights, optimiser state and inputs, which are there before it."""

    phases: tuple[Phase, ...]
    peak_phase: str
    peak_bytes: int
    saved_bytes: int
    """As `memory.saved_bytes` counts them: alive after forward, without its outputs."""
    components: Mapping[str, int]
    """Bytes alive at the peak by `COMPONENTS`; they add up to `peak_bytes`."""
    contributors: tuple[Contributor, ...]
    """The largest at the peak, among what the step has made."""
    saved_by_module: Mapping[str, int]
    """Saved bytes by the innermost module that was running when they were made, most first; they add up too."""
    timeline: tuple[Moment, ...]


def adamw(model: nn.Module) -> torch.optim.AdamW:
    """AdamW over what trains, as it is in the middle of a run: its state exists. At a learning rate of zero.

    So a step allocates what a step of training does and changes no weight. Leaves no gradients.

    Raises:
        LoractError: nothing trains.
    """
    trained = _trained(model)
    optimiser = torch.optim.AdamW(trained, lr=0.0)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    model.zero_grad(set_to_none=True)
    return optimiser


def profile_step(
    model: nn.Module,
    forward: Callable[[], T],
    loss: Callable[[T], Tensor],
    *,
    optimiser: torch.optim.Optimizer | None = None,
    inputs: Iterable[Tensor] = (),
) -> Profile:
    """Run `loss(forward()).backward()` and a step of the optimiser (by default `adamw(model)`), watching every storage.

    Modules get no hooks: a hook inside a region that runs again would keep it from doing so. Gradients of before are
    dropped, and so are the step's.

    Raises:
        LoractError: nothing trains.

    Example:
        >>> layer, x = nn.Linear(8, 4, bias=False), torch.ones(2, 8)
        >>> found = profile_step(layer, lambda: layer(x).exp(), lambda y: y.sum(), inputs=[x])
        >>> found.components["trained weights"], found.components["optimiser state"]
        (128, 260)
    """
    model.zero_grad(set_to_none=True)
    optimiser = adamw(model) if optimiser is None else optimiser
    given = list(inputs)
    held = _held(model, optimiser, given)
    recorder = _Recorder(model, sum(held.values()))
    recorder.exclude([*model.parameters(), *model.buffers(), *_state(optimiser), *given])
    try:
        with recorder:
            with recorder.phase("forward"):
                output = forward()
            outputs = {t.untyped_storage()._cdata for t in tree_leaves(output) if isinstance(t, Tensor)}
            saved = [made for key, made in recorder.alive.items() if key not in outputs]
            with recorder.phase("loss"):
                value = loss(output)
                del output  # a training loop forgets it too, and what the graph needs of it stays
            with recorder.phase("backward"):
                value.backward()
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    recorder.label(parameter.grad, "gradients", name.rpartition(".")[0] or type(model).__name__)
            with recorder.phase("optimiser"):
                optimiser.step()
            for tensor in _state(optimiser):
                recorder.label(tensor, "optimiser state")
    finally:
        model.zero_grad(set_to_none=True)
    return recorder.profile(held, saved)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise LoractError("a model of which nothing trains", "trainable parameters", "add adapters or unfreeze weights")
    return trained


def _state(optimiser: torch.optim.Optimizer) -> list[Tensor]:
    return [t for state in optimiser.state.values() for t in tree_leaves(state) if isinstance(t, Tensor)]


def _held(model: nn.Module, optimiser: torch.optim.Optimizer, inputs: Iterable[Tensor]) -> dict[str, int]:
    """Bytes that are there before the step, by component; each storage once."""
    seen: set[int] = set()

    def count(tensors: Iterable[Tensor]) -> int:
        new = {key: s.nbytes() for t in tensors if (key := (s := t.untyped_storage())._cdata) not in seen}
        seen.update(new)
        return sum(new.values())

    return {
        "trained weights": count(_trained(model)),
        "frozen weights": count([*model.parameters(), *model.buffers()]),
        "optimiser state": count(_state(optimiser)),
        "inputs": count(inputs),
    }


@dataclass(kw_only=True, eq=False)
class _Made:
    """A storage that the step made, its component unknown at first. `born` and `died` are numbers of events."""

    what: Contributor
    phase: str
    born: int
    died: float = math.inf

    def known(self, ends: Mapping[str, int]) -> Contributor:
        """With its component, given the events at which phases end."""
        kept = {"forward": "saved activations", "loss": "saved by the loss"} if self.died > ends[self.phase] else {}
        return replace(self.what, component=self.what.component or kept.get(self.phase, "temporaries"))


class _Recorder(StorageTracker):
    """A tracker that writes down every birth and death."""

    def __init__(self, model: nn.Module, held_bytes: int) -> None:
        super().__init__()
        self.alive: dict[int, _Made] = {}
        self._made: list[_Made] = []
        self._moments: list[Moment] = []
        self._phases: list[Phase] = []
        self._ends: dict[str, int] = {}
        self._phase = PHASES[0]
        self._held_bytes = held_bytes
        self._names = {id(m): name or type(m).__name__ for name, m in model.named_modules()}
        self._cuda = any(p.is_cuda for p in model.parameters())
        self._start = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Generator[None]:
        """What happens inside belongs to this phase."""
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self._phase, first = name, len(self._moments)
        self._log("start")
        yield
        self._ends[name] = len(self._moments)
        self._log("end")
        if self._cuda:
            torch.cuda.synchronize()
        allocator = torch.cuda.max_memory_allocated() if self._cuda else None
        sizes = [moment.bytes for moment in self._moments[first:]]
        sizes = {"start_bytes": sizes[0], "end_bytes": sizes[-1], "peak_bytes": max(sizes)}
        self._phases.append(Phase(name=name, allocator_peak_bytes=allocator, **sizes))

    def label(self, tensor: Tensor, component: str, module: str | None = None) -> None:
        """Say what the tensor's storage has been all along, and whose."""
        if (made := self.alive.get(tensor.untyped_storage()._cdata)) is not None:
            made.what = replace(made.what, component=component, module=module or made.what.module)

    def profile(self, held: Mapping[str, int], saved: Iterable[_Made]) -> Profile:
        """All that has been seen."""
        moments = self._moments[: self._ends[PHASES[-1]] + 1]
        peak = max(range(len(moments)), key=lambda i: moments[i].bytes)
        components, largest, by_module = Counter(held), Counter[Contributor](), Counter[str]()
        for made in self._made:
            if made.born <= peak < made.died:
                found = made.known(self._ends)
                components[found.component] += found.bytes
                largest[found] += found.bytes
        for made in saved:
            by_module[made.what.module] += made.what.bytes
        return Profile(
            phases=tuple(self._phases),
            peak_phase=moments[peak].phase,
            peak_bytes=moments[peak].bytes,
            saved_bytes=by_module.total(),
            components={name: components[name] for name in COMPONENTS},
            contributors=tuple(
                replace(one, count=total // one.bytes, bytes=total) for one, total in largest.most_common(LARGEST)
            ),
            saved_by_module=dict(by_module.most_common()),
            timeline=tuple(moments[i] for i in _sampled([m.bytes for m in moments], self._ends.values())),
        )

    def _log(self, event: str) -> None:
        now, alive = time.perf_counter() - self._start, self._held_bytes + self.current_bytes
        self._moments.append(Moment(seconds=now, phase=self._phase, bytes=alive, event=event))

    def _add(self, key: int, storage: torch.UntypedStorage, made: Tensor, operator: Any) -> None:
        super()._add(key, storage, made, operator)
        if key not in self._alive:  # no bytes
            return
        name = str(operator).removesuffix(".default")
        what = Contributor(
            component="",
            module=self._running(),
            operator=name,
            shape=tuple(made.shape),
            dtype=str(made.dtype).removeprefix("torch."),
            bytes=self._alive[key][1],
        )
        self.alive[key] = record = _Made(what=what, phase=self._phase, born=len(self._moments))
        self._made.append(record)
        self._log(name)

    def _drop(self, key: int, size: int) -> None:
        super()._drop(key, size)
        self.alive.pop(key).died = len(self._moments)
        self._log("free")

    def _running(self) -> str:
        """The innermost module that is being called, or run again, as Python's own stack has it.

        The frames that are read hold a call's arguments anyway: reading any other's variables prolongs their life.
        """
        frame = sys._getframe(1)
        while frame is not None:
            if (module_of := _CALLS.get(frame.f_code)) is not None:
                name = self._names.get(id(module_of(frame.f_locals["self"])))
                if name is not None:
                    return name
            frame = frame.f_back
        return OUTSIDE


_CALLS: dict[CodeType, Callable[[Any], nn.Module]] = {
    nn.Module._call_impl.__code__: lambda module: module,
    Region._run.__code__: lambda region: region.module,
}


def _sampled(sizes: Sequence[int], ends: Iterable[int]) -> list[int]:
    """Numbers of at most MOST_MOMENTS events: of each stretch the lowest and the highest, and the ends of phases."""
    if len(sizes) <= MOST_MOMENTS:
        return list(range(len(sizes)))
    kept = {0, *ends, *(end + 1 for end in ends)} & set(range(len(sizes)))
    stretches = (MOST_MOMENTS - len(kept)) // 2
    for part in range(stretches):
        chunk = range(part * len(sizes) // stretches, (part + 1) * len(sizes) // stretches)
        kept |= {min(chunk, key=lambda i: sizes[i]), max(chunk, key=lambda i: sizes[i])}
    return sorted(kept)
