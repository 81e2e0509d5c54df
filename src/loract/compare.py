"""Measure ways of running the same training step side by side: bytes, time ratios, gradient fidelity.

Times are taken in alternating order in one run and reported as ratios: absolute times of a shared machine say little.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from loract.attach import Handle, attach
from loract.audit import Fidelity, Loss, compare_gradients, gradients
from loract.memory import peak_bytes, saved_bytes
from loract.policy import Policy, preset


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to run the step: plain, with torch's checkpointing of every layer, or with a policy attached."""

    name: str
    policy: Policy | None = None
    checkpointing: bool = False


STANDARD = (
    Variant(name="LoRA"),
    Variant(name="LoRA + checkpointing", checkpointing=True),
    Variant(name="loract exact", policy=preset("exact")),
    Variant(name="loract tensor 1/8", policy=preset("tensor", rank=1 / 8)),
)
"""The reference, its rival, and the presets."""


@dataclass(kw_only=True, eq=False)
class Contender:
    """A variant applied to its own twin of the model, which shares every frozen weight with the others."""

    variant: Variant
    model: Any
    handle: Handle | None
    seconds: list[float] = field(default_factory=lambda: list[float]())

    @property
    def trainable(self) -> list[nn.Parameter]:
        """Parameters that receive gradients."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def close(self) -> None:
        """Detach."""
        if self.handle is not None:
            self.handle.detach()


def contend(model: nn.Module, variant: Variant) -> Contender:
    """Apply `variant` to a twin of `model`: own trainable parameters of equal values, shared frozen ones."""
    frozen: dict[int, Any] = {id(p): p for p in model.parameters() if not p.requires_grad}
    twin: Any = copy.deepcopy(model, frozen)
    if variant.checkpointing:
        twin.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    handle = None if variant.policy is None else attach(twin, variant.policy)
    return Contender(variant=variant, model=twin, handle=handle)


def measure_bytes(
    contender: Contender, forward: Callable[[Any], Tensor], backward: Callable[[Tensor], None]
) -> tuple[int, int]:
    """(saved bytes after forward, peak bytes of a step) of `forward(model)` and `backward(output)`.

    Parameters and their gradients are excluded: every variant has the same.
    """
    parameters = list(contender.model.parameters())
    for parameter in contender.trainable:
        parameter.grad = torch.zeros_like(parameter)
    saved, output = saved_bytes(lambda: forward(contender.model), parameters)
    backward(output)
    del output
    peak = peak_bytes(lambda: backward(forward(contender.model)), parameters)
    contender.model.zero_grad(set_to_none=True)
    return saved, peak


def alternate(
    contenders: Sequence[Contender], step: Callable[[Contender], None], rounds: int, advance: Callable[[], None]
) -> None:
    """Run `rounds` timed steps of each contender in turn, after one untimed; `advance` is called after each."""
    for turn in range(rounds + 1):
        for contender in contenders:
            start = time.perf_counter()
            step(contender)
            if turn:
                contender.seconds.append(time.perf_counter() - start)
            advance()


def time_ratios(contenders: Sequence[Contender]) -> dict[str, float]:
    """Median over the rounds of each contender's time divided by the first one's in the same round."""
    first = contenders[0].seconds
    return {
        c.variant.name: statistics.median(ours / plain for ours, plain in zip(c.seconds, first, strict=True))
        for c in contenders
    }


def fidelities(contenders: Sequence[Contender], batch: Any, loss: Loss) -> Mapping[str, Fidelity]:
    """Each contender's gradient on `batch` against the first one's."""
    _, exact = gradients(contenders[0].model, batch, loss)
    found: dict[str, Fidelity] = {}
    for contender in contenders:
        ours_value, ours = gradients(contender.model, batch, loss)
        sites = [] if contender.handle is None else contender.handle.stats()
        found[contender.variant.name] = compare_gradients(ours_value, exact, ours, sites)
    return found
