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

from loract.attach import Handle, attach
from loract.audit import Fidelity, compare_gradients, gradients
from loract.codecs import Exact
from loract.memory import step_bytes
from loract.policy import Policy, preset
from loract.workload import Workload

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
    """One way to run the step: plain, with torch's checkpointing of every layer, or with a policy attached."""

    name: str
    policy: Policy | None = None
    checkpointing: bool = False

    @property
    def plain(self) -> bool:
        """Whether it is the step as it is, whose gradient is the reference."""
        return self.policy is None and not self.checkpointing


STANDARD = (
    Variant(name="LoRA"),
    Variant(name="LoRA + checkpointing", checkpointing=True),
    Variant(name="loract exact", policy=preset("exact")),
    Variant(name="loract tensor 1/8", policy=preset("tensor", rank=1 / 8)),
    Variant(name="loract sublayer exact", policy=preset("sublayer", codec=Exact())),
    Variant(name="loract sublayer 1/8", policy=preset("sublayer", rank=1 / 8)),
    Variant(name="loract layer 1/8", policy=preset("layer", rank=1 / 8)),
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
        base = twin.get_base_model()  # transformers 5.23 renamed it
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    handle = None if variant.policy is None else attach(twin, variant.policy)
    return Contender(variant=variant, model=twin, handle=handle)


@dataclass(frozen=True, kw_only=True)
class Body:
    """One step of the decoder body: bytes, without parameters and their gradients, and the output."""

    saved_bytes: int
    peak_bytes: int
    hidden: Tensor


def body_step(contender: Contender, work: Workload, ids: Tensor, upstream: Tensor) -> Body:
    """Measure one forward and backward of the decoder body. Parameters, the same for all variants, are excluded."""
    parameters = list(contender.model.parameters())
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    held = [*parameters, *(p.grad for p in parameters if p.grad is not None), ids, upstream]
    seen: list[Tensor] = []

    def backward(hidden: Tensor) -> None:
        hidden.backward(upstream)
        seen.append(hidden.detach())

    saved, peak = step_bytes(lambda: work.hidden(contender.model, ids), backward, held)
    contender.model.zero_grad(set_to_none=True)
    return Body(saved_bytes=saved, peak_bytes=peak, hidden=seen[0])


def alternate(contenders: Sequence[Contender], step: Callable[[Contender], None]) -> None:
    """One timed step of each contender in turn."""
    for contender in contenders:
        start = time.perf_counter()
        step(contender)
        contender.seconds.append(time.perf_counter() - start)


def time_ratio(contender: Contender, reference: Contender) -> float:
    """Median over the rounds of the contender's time divided by the reference's in the same round."""
    return statistics.median(a / b for a, b in zip(contender.seconds, reference.seconds, strict=True))


def fidelities(
    work: Workload, model: Any, variants: Sequence[Variant], ids: Tensor, tick: Ticker
) -> dict[str, Fidelity]:
    """Each variant's gradient of `model` in fp32 against plain autograd's, for one upstream gradient.

    The name "bf16" holds what the model's own dtype does to the plain gradient: the floor for any method.
    """
    wide = copy.deepcopy(model).float()
    upstream = work.upstream(wide, ids)

    def loss(twin: Any, ids: Tensor) -> Tensor:
        hidden = work.hidden(twin, ids)
        return (hidden * upstream.to(hidden.dtype)).sum()

    tick("gradient in fp32, plain")
    value, exact = gradients(wide, ids, loss)
    found: dict[str, Fidelity] = {}
    for variant in variants:
        if variant.plain:
            found[variant.name] = compare_gradients(value, exact, exact, [])
            continue
        tick(f"gradient in fp32, {variant.name}")
        twin = contend(wide, variant)
        value, ours = gradients(twin.model, ids, loss)
        found[variant.name] = compare_gradients(value, exact, ours, [] if twin.handle is None else twin.handle.stats())
        twin.close()
    tick("gradient in the model's own dtype")
    value, ours = gradients(model, ids, loss)
    model.zero_grad(set_to_none=True)
    found["bf16"] = compare_gradients(value, exact, ours, [])
    return found
