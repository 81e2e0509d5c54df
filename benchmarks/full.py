"""Training every weight: what AdamW takes, and what projected gradients and coded activations leave of it.

Gemma-3-270M, all weights in one dtype, the tied embedding among them; LoRA beside it. All methods see the same blocks
in the same order. Memory is everything that lives: weights, gradients, moments, activations, temporaries, at the
height of the first three steps (the first finds the bases, the second has moments). Each method has a learning rate of
its own, the best of those tried, which are all in the records. Finished runs are kept: a rerun does the rest.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loract.attach import attach
from loract.cli.common import console, parse_dtype, progress_bar
from loract.compare import Progress, Ticker
from loract.errors import InvalidSpec, nearest
from loract.footprint import TRACKED, Footprint, footprint
from loract.frontier import Journal
from loract.memory import MIB
from loract.optim import ProjectedAdamW, Projection
from loract.policy import preset
from loract.policyfile import describe
from loract.rangefinder import Gaussian, RangeFinder, Sampled
from loract.report.table import grid
from loract.studies import adamw, machine
from loract.weights import gemma_270m
from loract.workload import Workload, workload

Make = Callable[[nn.Module, float], torch.optim.Optimizer]


undecayed = partial(adamw, decay=0.0)


def projected(finder: RangeFinder) -> Make:
    """A quarter of the directions, moments in 8 bits, gradients projected during backward."""

    def make(model: nn.Module, rate: float) -> torch.optim.Optimizer:
        projection = Projection(finder=finder)
        return ProjectedAdamW(model.parameters(), lr=rate, projection=projection, during_backward=True)

    return make


@dataclass(frozen=True, kw_only=True)
class Method:
    """How a model is trained."""

    name: str
    make: Make
    rates: tuple[float, ...]
    policy: str | None = None
    adapters: bool = False


METHODS = (
    Method(name="AdamW", make=undecayed, rates=(1e-5, 2e-5)),
    Method(name="AdamW, balanced", make=undecayed, rates=(1e-5,), policy="balanced"),
    Method(name="projected, balanced", make=projected(Sampled()), rates=(2e-5,), policy="balanced"),
    Method(name="Gaussian projected, balanced", make=projected(Gaussian()), rates=(2e-5,), policy="balanced"),
    Method(name="LoRA", make=undecayed, rates=(5e-4,), adapters=True),
    Method(name="LoRA, balanced", make=undecayed, rates=(5e-4,), policy="balanced", adapters=True),
)


@dataclass(frozen=True, kw_only=True)
class Study:
    """The sizes."""

    steps: int
    length: int
    held_out: int
    dtype: str

    def key(self, method: Method, rate: float) -> dict[str, Any]:
        """What identifies a run."""
        rules = (
            None if method.policy is None else [f"{r.kind} {describe(r.codec)}" for r in preset(method.policy).rules]
        )
        return {**vars(self), "method": method.name, "rate": rate, "rules": rules, **machine()}


Load = Callable[[Study, bool], Workload]


def real(study: Study, adapters: bool) -> Workload:
    """Gemma-3-270M. Without adapters its embedding, which is the head too, trains like all else."""
    sizes = {"length": study.length, "train": study.steps, "held_out": study.held_out}
    work = workload(str(gemma_270m()), dtype=parse_dtype(study.dtype), **sizes)
    return work if adapters else whole(work)


def whole(work: Workload) -> Workload:
    """The model under the adapters, every weight of it training."""
    model = work.model.unload()
    model.requires_grad_(True)
    return replace(work, model=model, head=model.get_output_embeddings().weight)


def run(work: Workload, method: Method, rate: float, steps: int, tick: Callable[[str], None]) -> Footprint:
    """Train and evaluate."""
    with nullcontext() if method.policy is None else attach(work.model, method.policy):
        return footprint(work, partial(method.make, rate=rate), steps, tick)


def run_missing(load: Load, study: Study, chosen: Sequence[Method], journal: Journal, progress: Progress) -> None:
    """Every method at each of its rates."""
    missing = [(m, r) for m in chosen for r in m.rates if journal.get(study.key(m, r)) is None]
    tick = Ticker(progress, len(missing) * (study.steps + 2))
    for method, rate in missing:
        name = f"{method.name}, {rate:g}"
        tick(f"{name}: loading")
        work = load(study, method.adapters)
        values = asdict(run(work, method, rate, study.steps, lambda text, name=name: tick(f"{name}: {text}")))
        journal.add(study.key(method, rate), values)
        console.print(f"{name}: held-out {values['held_out']:.4f}, peak {values['peak_bytes'] / MIB:.0f} MiB")


def table(study: Study, chosen: Sequence[Method], journal: Journal) -> str:
    """The best rate of each method, in Markdown; the first method is what the others are held against."""
    lines = [["", "rate", "moments MiB", "peak MiB", "less", "held-out", "against the first", "step s"]]
    lines.append(["---", *["---:"] * 7])
    reference: dict[str, Any] | None = None
    for method in chosen:
        found = [(r, v) for r in method.rates if (v := journal.get(study.key(method, r))) is not None]
        rate, values = min(found, key=lambda pair: pair[1]["held_out"])
        reference = reference or values
        less = 100 * (1 - values["peak_bytes"] / reference["peak_bytes"])
        change = 100 * (values["held_out"] / reference["held_out"] - 1)
        sizes = (f"{values[key] / MIB:.0f}" for key in ("state_bytes", "peak_bytes"))
        own = "-" if values is reference else f"{less:.1f} %"
        against = "-" if values is reference else f"{change:+.2f} %"
        lines.append(
            [
                method.name,
                f"{rate:g}",
                *sizes,
                own,
                f"{values['held_out']:.4f}",
                against,
                f"{values['step_seconds']:.1f}",
            ]
        )
    return grid(lines)


def main(arguments: Sequence[str] | None = None, load: Load = real) -> None:
    """Run what is missing, print the table and write it beside the records."""
    names = [method.name for method in METHODS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=24, help="of one block each")
    parser.add_argument("--length", type=int, default=512, help="tokens of a block")
    parser.add_argument("--held-out", type=int, default=16, help="blocks")
    parser.add_argument("--dtype", default="fp32", help="of all weights: fp32 or bf16")
    parser.add_argument("--methods", nargs="+", default=names, help="some of the methods; the first is the reference")
    parser.add_argument("--out", type=Path, default=Path("results/full"), help="folder for the results")
    given = parser.parse_args(arguments)
    if given.steps <= TRACKED:
        raise InvalidSpec(f"--steps {given.steps}", f"more than {TRACKED}", "raise it")
    for name in given.methods:
        if name not in names:
            raise InvalidSpec(f"method {name!r}", f"one of {', '.join(names)}", nearest(name, names))
    chosen = [next(m for m in METHODS if m.name == name) for name in given.methods]
    study = Study(steps=given.steps, length=given.length, held_out=given.held_out, dtype=given.dtype)
    journal = Journal(given.out / "records.jsonl")
    torch.manual_seed(0)
    with progress_bar() as progress:
        run_missing(load, study, chosen, journal, progress)
    found = table(study, chosen, journal)
    (given.out / "table.md").write_text(found, encoding="utf-8")
    console.print(found, markup=False, highlight=False)


if __name__ == "__main__":
    main()
