"""The way down where memory does not suffice: policies that keep less and less, and a micro-batch that runs again.

`smaller` goes towards fewer bytes. `loract.audit.tighter` goes the other way, towards less error.
"""

from __future__ import annotations

import gc
import heapq
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from loract.arguments import Draws
from loract.attach import Handle
from loract.codecs import Codec, Exact, LowRank, Quantized
from loract.codecs.base import Delayed, State
from loract.memory import MIB, StorageTracker
from loract.policy import PRESETS, REGIONS, Policy, Rule, preset
from loract.policyfile import describe
from loract.saved import RunningSite

LEAST_STEP = 4
"""Bits of the residual stream on the last rung: with three the gradient is half error."""
LEAST_SHARE, LEAST_COLUMNS = 1 / 32, 4
"""Ranks below which `smaller` does not go."""
ON_DEVICE = 256 * MIB
"""Gradients up to this size are copied where they are, larger ones to the host."""


def smaller(policy: Policy) -> Policy | None:
    """The next policy that keeps fewer bytes; None where nothing smaller has a gradient worth the name.

    What loses nothing goes first to a policy that loses nothing and takes more time: `exact` to `sublayer` with exact
    inputs. Then `balanced`, `smallest`, and `smallest` with 4 bits a step. Whole layers never are a rung: they keep
    less than their sublayers but take more while they run again, so that the peak rises. Sublayers and layers that
    are coded by themselves stay what they are, with half the rank or two bits less.

    Example:
        >>> [rung.name for rung in rungs(preset("exact"))]
        ['exact', 'sublayer', 'balanced', 'smallest', 'smallest with 4 bits']
        >>> smaller(preset("sublayer", rank=1 / 8)).rules[0].codec.rank
        0.0625
    """
    rules = [rule for rule in policy.rules if not rule.recomputed]
    regions = [rule for rule in rules if rule.kind in REGIONS]
    stream = [rule.codec for rule in rules if rule.kind == "stream"]
    if not regions:
        return preset("sublayer", codec=Exact()) if policy.lossless else preset("balanced")
    if stream:
        return _smaller_stream(policy, [codec.bits if isinstance(codec, Quantized) else 16 for codec in stream])
    if all(isinstance(rule.codec, Exact) for rule in regions):
        # An exact layer keeps about what `balanced` does, two coded steps.
        return preset("smallest" if any(rule.kind == "layer" for rule in regions) else "balanced")
    less = tuple(rule if rule.recomputed else replace(rule, codec=_smaller(rule.codec)) for rule in policy.rules)
    return None if less == policy.rules else replace(policy, rules=less)


def rungs(policy: Policy) -> tuple[Policy, ...]:
    """`policy` and all below it, each with fewer saved bytes than the one before."""
    found = [policy]
    while (below := smaller(found[-1])) is not None:
        found.append(below)
    return tuple(found)


def told(policy: Policy) -> str:
    """A policy in a sentence: its name, and its codecs where the name does not say them.

    Example:
        >>> told(preset("fast")), told(preset("sublayer", codec=Exact()))
        ('fast', 'sublayer with Exact()')
    """
    known = policy.name not in PRESETS or policy == preset(policy.name)
    codecs = dict.fromkeys(describe(rule.codec) for rule in policy.rules)
    return policy.name if known else f"{policy.name} with {', '.join(codecs)}"


def _smaller_stream(policy: Policy, bits: list[int]) -> Policy | None:
    """The first of the presets that takes no position in more bits than `policy` and something in fewer."""
    outputs = any(rule.kind == "attention_output" for rule in policy.rules)
    for below in (preset("balanced"), preset("smallest"), _least()):
        (step,) = (r.codec.bits for r in below.rules if r.kind == "stream" and isinstance(r.codec, Quantized))
        if step <= min(bits) and (step < max(bits) or outputs):
            return below
    return None


def _least() -> Policy:
    start = preset("smallest")

    def lessened(rule: Rule) -> Rule:
        if rule.kind != "stream" or not isinstance(rule.codec, Quantized):
            return rule
        return replace(rule, codec=replace(rule.codec, bits=LEAST_STEP))

    return Policy(name=f"smallest with {LEAST_STEP} bits", rules=tuple(map(lessened, start.rules)))


def _smaller(codec: Codec) -> Codec:
    if isinstance(codec, LowRank):
        rank = codec.rank // 2 if isinstance(codec.rank, int) else codec.rank / 2
        least = LEAST_COLUMNS if isinstance(codec.rank, int) else LEAST_SHARE
        return codec if rank < least else replace(codec, rank=rank)
    if isinstance(codec, Quantized) and codec.bits > LEAST_STEP:
        return replace(codec, bits=max(LEAST_STEP, codec.bits - 2))
    return codec


class SoftLimit(BaseException):
    """A micro-batch took more than the run's own limit.

    No Exception: trials inside a step take those for an answer and go on.
    """


class SoftLimited(StorageTracker):
    """While active, what runs may add no more than `limit` bytes: the operator that passes it raises.

    On CUDA the allocator is asked after every operator, elsewhere storages are counted. Temporaries inside a kernel
    are not seen. It raises once, so that what cleans up afterwards can run.
    """

    def __init__(self, limit: int, device: torch.device) -> None:
        """Count from here."""
        super().__init__()
        self.limit, self.passed = limit, False
        self._cuda = device if device.type == "cuda" else None
        self._start = 0 if self._cuda is None else torch.cuda.memory_allocated(self._cuda)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, then look.

        Raises:
            SoftLimit: more is alive than the limit allows, for the first time.
        """
        if self._cuda is None:
            out = super().__torch_dispatch__(func, types, args, kwargs)
            added = self.current_bytes
        else:
            out = func(*args, **(kwargs or {}))
            added = torch.cuda.memory_allocated(self._cuda) - self._start
        if added > self.limit and not self.passed:
            self.passed = True
            raise SoftLimit(f"soft_limit of {self.limit / MIB:.6g} MiB passed")
        return out


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory does not suffice, on whatever device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError, SoftLimit)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _MESSAGES)


_MESSAGES = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "MPS backend out of memory",
)


def release() -> None:
    """Give back what a failed step held: its graph may be in cycles, and the allocator's cache in pieces."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def longest(rows: Any, count: int) -> list[int]:
    """The `count` rows with the most tokens; the first ones where rows have no `input_ids`."""
    if "input_ids" not in rows.column_names:
        return list(range(min(count, len(rows))))
    import pyarrow.compute

    arrow: Any = pyarrow.compute
    lengths = arrow.list_value_length(rows.with_format("arrow")["input_ids"]).to_pylist()
    return heapq.nlargest(count, range(len(lengths)), key=lengths.__getitem__)


@dataclass(frozen=True, kw_only=True)
class Moment:
    """All that a micro-batch changes in a model and its sites, as it is before it."""

    gradients: tuple[tuple[Tensor, Tensor | None, Tensor | None], ...]
    """Parameters, their gradients, and copies of those."""
    buffers: tuple[tuple[Tensor, Tensor], ...]
    draws: Draws
    sites: tuple[tuple[RunningSite, int, State], ...]

    def restore(self) -> None:
        """Make it so again."""
        with torch.no_grad():
            for parameter, gradient, kept in self.gradients:
                if gradient is not None and kept is not None:
                    gradient.copy_(kept)
                parameter.grad = gradient
            for buffer, kept in self.buffers:
                buffer.copy_(kept)
        self.draws.restore()
        for site, step, state in self.sites:
            site.step, site.state = step, _state(state)


class Moments:
    """Takes moments of an attached model. What it has is looked up once: that takes longer than the copies."""

    def __init__(self, handle: Handle) -> None:
        """Look it up."""
        self.handle = handle
        self._parameters, self._buffers = list(handle.model.parameters()), list(handle.model.buffers())
        self._places = list({parameter.device: parameter for parameter in self._parameters}.values())

    def now(self) -> Moment:
        """Copy it all. Nothing waits for the device, unless the gradients of earlier micro-batches are large."""
        trained = [p for p in self._parameters if p.requires_grad]
        size = sum(p.grad.nbytes for p in trained if p.grad is not None)
        return Moment(
            gradients=tuple((p, p.grad, None if p.grad is None else _copied(p.grad, size)) for p in trained),
            buffers=tuple((buffer, buffer.detach().clone()) for buffer in self._buffers),
            draws=Draws.now(self._places),
            sites=tuple((site, site.step, _state(site.state)) for site in self.handle.sites),
        )


def _copied(gradient: Tensor, size: int) -> Tensor:
    return gradient.detach().clone() if size <= ON_DEVICE else gradient.detach().to("cpu", copy=True)


def _state(state: State) -> State:
    """A copy; what codecs remember is replaced and never edited."""
    spectrum = Delayed()
    vars(spectrum).update(vars(state.spectrum))
    memory: Mapping[str, Any] = state.memory
    return State(rank=state.rank, spectrum=spectrum, memory=dict(memory))
