"""Measure ways of running the same training step side by side: bytes, time ratios, gradient fidelity, losses.

Times are taken in alternating order in one run and reported as ratios: absolute times of a shared machine say little.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from loract.attach import Handle, attach
from loract.audit import Fidelity, compare_gradients, gradients
from loract.codecs import Exact
from loract.memory import step_bytes
from loract.policy import Policy, preset
from loract.workload import Work, unadapted

Progress = Callable[[str, int, int], None]
"""Called when a piece of work starts: what it is, how many are done, how many there are."""


class Ticker:
    """Counts pieces of work for a `Progress`."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self, text: str) -> None:
        """One more piece starts."""
        if self.progress is not None:
            self.progress(text, self.done, self.total)
        self.done += 1


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to run the step: plain, with torch's checkpointing, with a policy attached, or remade by `wrap`."""

    name: str
    policy: Policy | None = None
    checkpointing: int = 0
    """Every so many-th layer is checkpointed by torch; 0: none."""
    wrap: Callable[[Any], Any] | None = None
    """Takes the model's twin and returns it, or another model with the same values, doing it another way."""
    optimiser: Callable[[Any, float], torch.optim.Optimizer] | None = None
    """Makes the method's own optimiser of the model and a learning rate; None: AdamW."""
    compiled: bool = False
    """Compiled code runs beside dispatch modes: its bytes are the allocator's, and no mode may be active."""
    note: str = ""
    """What a reader of its figures has to know."""

    @property
    def plain(self) -> bool:
        """Whether it is the step as it is, whose gradient is the reference."""
        return self.policy is None and self.wrap is None and not self.checkpointing


STANDARD = (
    Variant(name="LoRA"),
    Variant(name="LoRA + checkpointing", checkpointing=1),
    Variant(name="loract exact", policy=preset("exact")),
    Variant(name="loract tensor 1/8", policy=preset("tensor", rank=1 / 8)),
    Variant(name="loract sublayer exact", policy=preset("sublayer", codec=Exact())),
    Variant(name="loract sublayer 1/8", policy=preset("sublayer", rank=1 / 8)),
    Variant(name="loract layer 1/8", policy=preset("layer", rank=1 / 8)),
    Variant(name="loract balanced", policy=preset("balanced")),
)
"""The reference, its rival, and the presets."""


@dataclass(kw_only=True, eq=False)
class Contender:
    """A variant applied to its own twin of the model, which shares every frozen weight with the others."""

    variant: Variant
    model: Any
    handle: Handle | None
    seconds: list[float] = field(default_factory=lambda: list[float]())

    def close(self) -> None:
        """Detach."""
        if self.handle is not None:
            self.handle.detach()


def contend(model: nn.Module, variant: Variant) -> Contender:
    """Apply `variant` to a twin of `model`: own trainable parameters of equal values, shared frozen ones."""
    frozen: dict[int, Any] = {id(p): p for p in model.parameters() if not p.requires_grad}
    twin: Any = copy.deepcopy(model, frozen)
    if variant.checkpointing:
        checkpointing(twin, variant.checkpointing)
    if variant.wrap is not None:
        twin = variant.wrap(twin)
    handle = None if variant.policy is None else attach(twin, variant.policy)
    return Contender(variant=variant, model=twin, handle=handle)


def checkpointing(model: Any, every: int) -> None:
    """Let torch checkpoint every so many-th layer of a model of transformers, with adapters or without."""
    base = unadapted(model)
    # transformers 5.23 renamed it
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": False}, **({"every_n_layers": every} if every > 1 else {}))


@dataclass(frozen=True, kw_only=True)
class Body:
    """One step of the model's body: bytes, without parameters and their gradients, and the output."""

    saved_bytes: int
    peak_bytes: int
    hidden: Tensor


Meter = Callable[[Callable[[], Tensor], Callable[[Tensor], object], list[Tensor]], tuple[int, int]]
"""Saved and peak bytes of one step, given its forward, its backward and the tensors not to count: `step_bytes`."""


def body_step(contender: Contender, work: Work, batch: Any, upstream: Tensor, meter: Meter = step_bytes) -> Body:
    """Measure one forward and backward of the model's body. Parameters, the same for all variants, are excluded."""
    parameters = list(contender.model.parameters())
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    leaves = [t for t in tree_leaves(batch) if isinstance(t, Tensor)]
    held = [*parameters, *(p.grad for p in parameters if p.grad is not None), *leaves, upstream]
    seen: list[Tensor] = []

    def backward(hidden: Tensor) -> None:
        hidden.backward(upstream)
        seen.append(hidden.detach())

    saved, peak = meter(lambda: work.hidden(contender.model, batch), backward, held)
    contender.model.zero_grad(set_to_none=True)
    return Body(saved_bytes=saved, peak_bytes=peak, hidden=seen[0])


def whole_step(model: nn.Module, work: Work, batch: Any) -> tuple[int, int]:
    """Saved and peak bytes of one step, the loss and the gradients that it makes included."""
    leaves = [t for t in tree_leaves(batch) if isinstance(t, Tensor)]
    held = [*model.parameters(), *model.buffers(), *leaves]
    return step_bytes(lambda: work.loss(model, batch), lambda loss: loss.backward(), held)


def alternate(contenders: Sequence[Contender], step: Callable[[Contender], None]) -> None:
    """One timed step of each contender in turn."""
    for contender in contenders:
        start = time.perf_counter()
        step(contender)
        contender.seconds.append(time.perf_counter() - start)


def time_ratio(contender: Contender, reference: Contender) -> float:
    """Median over the rounds of the contender's time divided by the reference's in the same round."""
    return statistics.median(a / b for a, b in zip(contender.seconds, reference.seconds, strict=True))


@dataclass(frozen=True, kw_only=True, eq=False)
class Yardstick:
    """The plain gradient of a model in fp32 for one upstream gradient: what every method is held against."""

    work: Work
    model: Any
    batch: Any
    upstream: Tensor
    loss: float
    exact: dict[str, Tensor]

    @classmethod
    def of(cls, work: Work, model: Any, batch: Any) -> Yardstick:
        """Measure with a copy of `model` in fp32."""
        wide = copy.deepcopy(model).float()
        upstream = work.upstream(wide, batch)
        loss, exact = gradients(wide, batch, inner(work, upstream))
        return cls(work=work, model=wide, batch=batch, upstream=upstream, loss=loss, exact=exact)

    def score(self, variant: Variant) -> Fidelity:
        """The variant's gradient, in fp32."""
        if variant.plain:
            return compare_gradients(self.loss, self.exact, self.exact, [])
        twin = contend(self.model, variant)
        try:
            loss, ours = gradients(twin.model, self.batch, inner(self.work, self.upstream))
            stats = [] if twin.handle is None else twin.handle.stats()
        finally:
            twin.close()
        return compare_gradients(loss, self.exact, ours, stats)

    def own(self, model: Any) -> Fidelity:
        """The gradient of `model` as it is, in its own dtype. Leaves no gradients behind."""
        loss, ours = gradients(model, self.batch, inner(self.work, self.upstream))
        model.zero_grad(set_to_none=True)
        return compare_gradients(loss, self.exact, ours, [])


def inner(work: Work, upstream: Tensor) -> Callable[[Any, Any], Tensor]:
    """A loss whose gradient with respect to the hidden state is `upstream`."""

    def loss(model: Any, batch: Any) -> Tensor:
        hidden = work.hidden(model, batch)
        return (hidden * upstream.to(hidden.dtype)).sum()

    return loss


def fidelities(work: Work, model: Any, variants: Sequence[Variant], batch: Any, tick: Ticker) -> dict[str, Fidelity]:
    """Each variant's gradient of `model` in fp32 against plain autograd's, for one upstream gradient.

    The name "bf16" holds what the model's own dtype does to the plain gradient: the floor for any method.
    """
    tick("gradient in fp32, plain")
    yardstick = Yardstick.of(work, model, batch)
    found: dict[str, Fidelity] = {}
    for variant in variants:
        if not variant.plain:
            tick(f"gradient in fp32, {variant.name}")
        found[variant.name] = yardstick.score(variant)
    tick("gradient in the model's own dtype")
    found["bf16"] = yardstick.own(model)
    return found
