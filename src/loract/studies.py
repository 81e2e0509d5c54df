"""The two measured studies: `benchmark` (bytes and time of one step) and `fine_tune` (training side by side)."""

from __future__ import annotations

import multiprocessing
import platform
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from loract.compare import (
    Body,
    Contender,
    Progress,
    Ticker,
    Variant,
    alternate,
    body_step,
    contend,
    fidelities,
    time_ratio,
)
from loract.cpu import fast_bf16, native_bf16
from loract.memory import Record, peak_rss_bytes, restart_peak_rss
from loract.workload import Work, Workload

LEARNING_RATE = 5e-4
WARM_STEPS = 8
"""A fresh adapter has B = 0 and no gradient in A, so fidelity is measured after a few short steps of training."""

FLOOR = "LoRA in bf16"
"""Name of the row that holds the fidelity of the model's own dtype."""


@dataclass(frozen=True, kw_only=True)
class FineTuned:
    """What `fine_tune` found: a record and a loss curve for each variant, and the models, still attached."""

    records: list[Record]
    losses: dict[str, list[float]]
    contenders: list[Contender]


def benchmark(
    work: Workload,
    variants: Sequence[Variant],
    *,
    batch: int,
    rounds: int,
    load: Callable[[], Workload] | None = None,
    progress: Progress | None = None,
) -> list[Record]:
    """One step of the decoder body on `batch` blocks: bytes, time and fidelity of each variant, relative to the first.

    The loss is chunked, costs every variant the same, and is left out: its gradient is computed once and handed to
    every backward. Times are medians over `rounds` alternating rounds. With a picklable `load`, which makes the same
    workload anew, each variant's resident peak is measured too, in a process of its own. Fidelity is measured in fp32;
    one more record holds what the model's own dtype does to the plain gradient.
    """
    plain = sum(v.plain for v in variants)
    tick = Ticker(progress, WARM_STEPS + 1 + len(variants) * (rounds + 2 + (load is not None)) + 2 - plain)
    ids = work.rows(-batch, batch)
    resident: dict[str, int] = {}
    for variant in variants if load is not None else ():
        assert load is not None
        tick(f"resident peak of {variant.name}")
        resident[variant.name] = resident_peak(load, variant, batch=batch)
    with fast_bf16():
        warm(work, tick)
        tick("gradient of the loss")
        upstream = work.upstream(work.model, ids)
        contenders = [contend(work.model, v) for v in variants]
        bodies: list[Body] = []
        for contender in contenders:  # which also fills allocators and kernel caches
            tick(f"bytes of {contender.variant.name}")
            bodies.append(body_step(contender, work, ids, upstream))

        def step(contender: Contender) -> None:
            tick(f"timing {contender.variant.name}")
            contender.model.zero_grad(set_to_none=True)
            work.hidden(contender.model, ids).backward(upstream)
            synchronise(upstream)

        for _ in range(rounds):
            alternate(contenders, step)
        for contender in contenders:
            contender.close()
            contender.model.zero_grad(set_to_none=True)
        scores = fidelities(work, work.model, variants, ids, tick)
    records: list[Record] = []
    for contender, body in zip(contenders, bodies, strict=True):
        score = scores[contender.variant.name]
        records.append(
            Record(
                name=contender.variant.name,
                saved_bytes=body.saved_bytes,
                peak_bytes=body.peak_bytes,
                step_seconds=statistics.median(contender.seconds),
                time_ratio=time_ratio(contender, contenders[0]),
                cosine=score.cosine,
                relative_error=score.relative_error,
                resident_bytes=resident.get(contender.variant.name),
                extra={
                    "forward_bit_identical": torch.equal(body.hidden, bodies[0].hidden),
                    "rounds": rounds,
                    "tokens": ids.numel(),
                    "seconds": contender.seconds,
                    **machine(),
                },
            )
        )
    own = scores["bf16"]
    return [*records, floor(records[0], own.cosine, own.relative_error)]


def resident_peak(load: Callable[[], Workload], variant: Variant, *, batch: int) -> int:
    """Peak resident bytes that a step of the decoder body adds, in a fresh process, after a step on eight tokens.

    The operating system's view, beside the tracker's: it includes temporaries inside kernels and fragmentation.
    `load` must be picklable.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_resident_peak, load, variant, batch).result()


def _resident_peak(load: Callable[[], Workload], variant: Variant, batch: int) -> int:
    with fast_bf16():
        work = load()
        contender = contend(work.model, variant)
        ids = work.train[:batch]
        upstream = torch.full((*ids.shape, work.head.shape[1]), 1e-4, dtype=next(work.model.parameters()).dtype)
        # Weights are mapped from their file and kernels loaded when first used: both belong to no method.
        work.hidden(contender.model, ids[:1, :8]).backward(upstream[:1, :8])
        before = restart_peak_rss()
        work.hidden(contender.model, ids).backward(upstream)
        return peak_rss_bytes() - before


def fine_tune(
    work: Workload, variants: Sequence[Variant], *, steps: int, batch: int, progress: Progress | None = None
) -> FineTuned:
    """Train each variant from the same start on the same blocks, a step of each in turn; then measure.

    Losses are those of training and of held-out text; fidelity belongs to the model as the first variant trained it.
    """
    tick = Ticker(progress, len(variants) * (steps + 3) + 2 - sum(v.plain for v in variants))
    losses: dict[str, list[float]] = {v.name: [] for v in variants}
    with fast_bf16():
        contenders = [contend(work.model, v) for v in variants]
        optimisers = {c.variant.name: optimiser_of(c) for c in contenders}
        for index in range(steps):
            ids = work.train[index * batch : (index + 1) * batch]

            def step(contender: Contender, ids: Tensor = ids, index: int = index) -> None:
                name = contender.variant.name
                tick(f"step {index + 1} of {steps}, {name}")
                losses[name].append(train_step(work, contender.model, optimisers[name], ids))

            alternate(contenders, step)
        for contender in contenders:  # the first step fills allocators and caches
            contender.seconds = contender.seconds[1:] or contender.seconds
        ids = work.train[:batch]
        upstream = work.upstream(contenders[0].model, ids)
        bodies: list[Body] = []
        for contender in contenders:
            tick(f"bytes of {contender.variant.name}")
            bodies.append(body_step(contender, work, ids, upstream))
        held_out: list[float] = []
        for contender in contenders:
            tick(f"held-out loss of {contender.variant.name}")
            held_out.append(evaluate(work, contender.model))
        scores = fidelities(work, contenders[0].model, variants, ids, tick)
    records: list[Record] = []
    for contender, body, loss in zip(contenders, bodies, held_out, strict=True):
        name = contender.variant.name
        records.append(
            Record(
                name=name,
                saved_bytes=body.saved_bytes,
                peak_bytes=body.peak_bytes,
                step_seconds=statistics.median(contender.seconds),
                time_ratio=time_ratio(contender, contenders[0]),
                cosine=scores[name].cosine,
                relative_error=scores[name].relative_error,
                train_loss=statistics.fmean(losses[name][-4:]),
                held_out_loss=loss,
                extra={"steps": steps, "tokens": ids.numel(), **machine()},
            )
        )
    own = scores["bf16"]
    records.append(floor(records[0], own.cosine, own.relative_error))
    return FineTuned(records=records, losses=losses, contenders=contenders)


def evaluate(work: Work, model: Any) -> float:
    """Loss on the held-out blocks."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return float(work.loss(model, work.held_out))
    finally:
        model.train(training)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    device = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU {torch.backends.cpu.get_cpu_capability()}"
    )
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "bf16_products": "native" if native_bf16() else "widened to fp32",
        "torch": torch.__version__,
        "platform": platform.platform(),
    }


def warm(work: Work, tick: Ticker) -> None:
    """Train the adapters for a few short steps."""
    optimiser = adamw(work.model)
    for index in range(WARM_STEPS):
        tick(f"warming the adapters, step {index + 1} of {WARM_STEPS}")
        train_step(work, work.model, optimiser, work.warm_batch(index))


def adamw(model: Any, rate: float = LEARNING_RATE, *, decay: float = 0.01) -> torch.optim.Optimizer:
    """AdamW over what trains: the optimiser of every study."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=decay)


def optimiser_of(contender: Contender, rate: float = LEARNING_RATE) -> torch.optim.Optimizer:
    """The variant's own optimiser, or AdamW."""
    return (contender.variant.optimiser or adamw)(contender.model, rate)


def reset_adapters(model: Any, seed: int) -> None:
    """Adapters as PEFT makes them: A drawn with `seed`, B zero.

    So are the linear maps of which PEFT keeps a copy to train, as a classification model's head.
    """
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for module in model.modules():
            if isinstance(module, LoraLayer):
                for name in module.active_adapters:
                    module.reset_lora_parameters(name, True)
            elif isinstance(module, ModulesToSaveWrapper):
                for linear in module.modules_to_save.modules():
                    if isinstance(linear, nn.Linear):
                        linear.reset_parameters()


def train_step(work: Work, model: Any, optimiser: torch.optim.Optimizer, batch: Any) -> float:
    """One step of training; the loss before it."""
    loss = work.loss(model, batch)
    loss.backward()
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return float(loss.detach())


def floor(plain: Record, cosine: float, relative_error: float) -> Record:
    """The row for the model's own dtype: the plain record with the scores of the plain gradient in that dtype."""
    return replace(
        plain,
        name=FLOOR,
        cosine=cosine,
        relative_error=relative_error,
        extra={"note": "the plain gradient in the model's own dtype against fp32: the floor for any method"},
    )


def synchronise(like: Tensor) -> None:
    """Wait for the device of `like`."""
    if like.is_cuda:
        torch.cuda.synchronize()
