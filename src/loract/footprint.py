"""A short training run with all that it holds: weights, activations, gradients, the optimiser's state, the peak."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from loract.cpu import fast_bf16
from loract.head import head_loss
from loract.memory import StorageTracker
from loract.optim import ProjectedAdamW
from loract.studies import evaluate
from loract.workload import Workload

TRACKED = 3
"""Steps whose memory is followed: the first finds bases of projections, the second has moments."""

Make = Callable[[nn.Module], torch.optim.Optimizer]
"""Makes the optimiser of what trains in a model."""


@dataclass(frozen=True, kw_only=True)
class Headed(Workload):
    """With a loss that makes the gradient of the head's weight once, and hands it over apart from the embedding's."""

    apart: Callable[[Tensor], Tensor]

    def head_loss(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Mean next-token cross entropy."""
        return head_loss(hidden[:, :-1].flatten(0, 1), self.apart(self.head), ids[:, 1:].flatten(), chunk=64)


@dataclass(kw_only=True)
class Footprint:
    """What a run held and how it went. Memory is the most of the first `TRACKED` steps, in bytes of storages."""

    weight_bytes: int
    """Parameters and buffers as they are stored, with the scales and tables of quantised ones; tied ones once."""
    activation_bytes: int = 0
    """What the model's body has left for backward when it returns, without its output."""
    gradient_bytes: int = 0
    """The most at one time: what the loss made in forward, or all gradients and waiting projections that there are when
    a parameter's gradient is complete and not yet projected."""
    state_bytes: int = 0
    """Moments and bases, between steps."""
    peak_bytes: int = 0
    """Weights and everything else that lives at the highest moment, temporaries that operators return among it."""
    step_seconds: float = 0.0
    """Median of the steps that are not followed."""
    losses: list[float] = field(default_factory=lambda: list[float]())
    """Of training."""
    held_out: float = 0.0
    """After the last step."""


def footprint(work: Workload, make: Make, steps: int, tick: Callable[[str], None]) -> Footprint:
    """Train for `steps` of one block each, more than `TRACKED`, and evaluate."""
    model, tracker, seconds = work.model, StorageTracker(), list[float]()
    found = Footprint(weight_bytes=stored_bytes([*model.state_dict().values(), *model.buffers()]))
    trained = [p for p in model.parameters() if p.requires_grad]

    def look(_: Tensor) -> None:
        whole = stored_bytes(p.grad for p in trained if p.grad is not None)
        waiting = optimiser.waiting_bytes if isinstance(optimiser, ProjectedAdamW) else 0
        found.gradient_bytes = max(found.gradient_bytes, whole + waiting)

    def step(index: int) -> None:
        tick(f"step {index + 1}")
        start, ids = time.perf_counter(), work.rows(index, 1)
        before = tracker.current_bytes
        hidden = headed.hidden(model, ids)
        after = tracker.current_bytes - tracker.bytes_of([hidden])
        loss = headed.head_loss(hidden, ids)
        made = tracker.current_bytes - tracker.bytes_of([hidden, loss]) - after
        del hidden
        found.activation_bytes = max(found.activation_bytes, after - before)
        found.gradient_bytes = max(found.gradient_bytes, made)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        found.losses.append(float(loss.detach()))
        seconds.append(time.perf_counter() - start)

    # Before the optimiser's own hooks, which take gradients away.
    hooks = [p.register_post_accumulate_grad_hook(look) for p in trained]
    optimiser = make(model)
    apart = optimiser.apart if isinstance(optimiser, ProjectedAdamW) else lambda weight: weight
    headed = Headed(**vars(work), apart=apart)
    tracker.exclude([*model.parameters(), *model.buffers(), work.train, work.held_out])
    try:
        with fast_bf16():
            with tracker:
                for index in range(TRACKED):
                    step(index)
            while hooks:
                hooks.pop().remove()
            for index in range(TRACKED, steps):
                step(index)
            tick("held-out loss")
            found.held_out = evaluate(headed, model)
    finally:
        if isinstance(optimiser, ProjectedAdamW):
            optimiser.close()
    state = (v for values in optimiser.state.values() for v in values.values() if isinstance(v, Tensor))
    found.state_bytes = stored_bytes(state)
    found.peak_bytes = found.weight_bytes + tracker.peak_bytes
    found.step_seconds = statistics.median(seconds[TRACKED:])
    return found


def stored_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' storages, each counted once."""
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(sizes.values())
