"""Train one task in many ways from the same starts on the same rows; a finished run is a line and is never run again."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loract.cli.common import console, progress_bar
from loract.codecs import LowRank
from loract.compare import Contender, Ticker, Variant, contend, whole_step
from loract.cpu import fast_bf16
from loract.frontier import MODES, Journal, Settings, methods
from loract.memory import MIB
from loract.policy import preset
from loract.rangefinder import Gaussian
from loract.report.table import grid
from loract.rivals import base_dtype
from loract.studies import optimiser_of, reset_adapters, train_step

RECORDS = Path("results/experiments")
RIVALS = ("LoRA + checkpointing", "VeLoRA", "LoRA-FA")
PRESETS = ("exact", "balanced", "smallest")
RANKS = ("1/4", "1/8", "1/16")
EQUAL = ("LoRA", *RIVALS, "loract exact", "loract balanced", "loract sublayer 1/8", "loract tensor 1/8")
"""Methods that are compared at equal memory."""
SCORED = 32
"""Held-out rows at once."""

Columns = dict[str, Tensor]
"""A batch: tensors of equal first dimension."""


def variants() -> tuple[Variant, ...]:
    """Plain LoRA first; others' ways; the presets; LoRAct's modes by rank; and the modes with Gaussian sketches."""
    ranked = [f"loract {mode} {rank}" for mode in MODES for rank in RANKS]
    found = {v.name: v for v in methods([*RIVALS, *(f"loract {name}" for name in PRESETS), *ranked])}
    gaussian = [
        Variant(
            name=f"loract {mode} 1/8, RSVD",
            policy=preset(mode, codec=LowRank(rank=1 / 8, sampler=Gaussian(oversample=0.25))),
            note="a Gaussian matrix in place of sampled features",
        )
        for mode in MODES
    ]
    return (*(found[name] for name in ("LoRA", *RIVALS, *(f"loract {p}" for p in PRESETS), *ranked)), *gaussian)


@dataclass(frozen=True, kw_only=True)
class Task:
    """A model with adapters in training mode, rows to train on, rows that are held out, and what is asked of them."""

    model: Any
    train: Columns
    held_out: Columns
    loss: Callable[[Any, Columns], Tensor]
    """Mean over the rows of a batch."""
    right: Callable[[Any, Columns], Tensor] | None = None
    """How many rows are classified right; None: the loss is the score."""

    def batch(self, seed: int, step: int, rows: int) -> Columns:
        """Rows of one step: a seed is an order of all rows, which repeats."""
        total = len(next(iter(self.train.values())))
        order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
        chosen = order[(step * rows + torch.arange(rows)) % total]
        return {name: column[chosen] for name, column in self.train.items()}

    def score(self, model: Any) -> dict[str, float]:
        """Held-out loss, and accuracy where rows have classes."""
        total = len(next(iter(self.held_out.values())))
        loss = right = 0.0
        model.eval()
        try:
            with torch.no_grad():
                for start in range(0, total, SCORED):
                    batch = {name: column[start : start + SCORED] for name, column in self.held_out.items()}
                    rows = len(next(iter(batch.values())))
                    loss += float(self.loss(model, batch)) * rows
                    right += 0.0 if self.right is None else float(self.right(model, batch))
        finally:
            model.train()
        return {"loss": loss / total, **({} if self.right is None else {"accuracy": right / total})}


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One task and its sizes."""

    name: str
    title: str
    load: Callable[[], Task]
    steps: int
    rows: int
    """Rows of a step."""
    rate: float
    seeds: tuple[int, ...]
    equal_memory: bool = False
    """Whether methods are also compared with as many rows a step as fit into what `balanced` takes."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One way to train, from one start."""

    variant: Variant
    seed: int
    equal_memory: bool = False

    def __str__(self) -> str:
        return f"{self.variant.name}, seed {self.seed}" + (", equal memory" if self.equal_memory else "")


def runs(experiment: Experiment) -> list[Run]:
    """Every run: a seed after the other, so that what is there can be compared at any time."""
    every = variants()
    found = [Run(variant=v, seed=s) for s in experiment.seeds for v in every]
    if experiment.equal_memory:
        chosen = [v for v in every if v.name in EQUAL]
        found += [Run(variant=v, seed=s, equal_memory=True) for s in experiment.seeds for v in chosen]
    return found


def key(experiment: Experiment, run: Run) -> dict[str, Any]:
    """What identifies a run: all that it depends on, the policy's content and the machine."""
    settings = Settings(model=experiment.name, batch=experiment.rows, length=0, dtype="", steps=experiment.steps)
    found = settings.key(run.variant, "training")
    for unused in ("length", "dtype", "part"):
        found.pop(unused)
    return {**found, "rate": experiment.rate, "seed": run.seed, "equal_memory": run.equal_memory}


def bytes_of(contender: Contender, task: Task, batch: Columns) -> tuple[int, int]:
    """Saved and peak bytes of a step whose shapes were met before: the first one looks at more."""
    whole_step(contender.model, task, batch)
    contender.model.zero_grad(set_to_none=True)
    found = whole_step(contender.model, task, batch)
    contender.model.zero_grad(set_to_none=True)
    return found


def fitting(task: Task, variant: Variant, rows: int, budget: int) -> int:
    """The most rows, at least 1 and at most `rows`, whose step peaks within `budget` bytes."""
    least, most = 1, rows
    while least < most:
        middle = (least + most + 1) // 2
        contender = contend(task.model, variant)
        try:
            _, peak = bytes_of(contender, task, task.batch(0, 0, middle))
        finally:
            contender.close()
        least, most = (middle, most) if peak <= budget else (least, middle - 1)
    return least


def measure(task: Task, experiment: Experiment, run: Run, budget: int | None, tick: Ticker) -> dict[str, Any]:
    """Train, measure a step's memory, and score."""
    reset_adapters(task.model, run.seed)
    tick(f"{run}: rows that fit" if run.equal_memory else f"{run}: begins")
    rows = experiment.rows if budget is None else fitting(task, run.variant, experiment.rows, budget)
    losses, seconds = list[float](), list[float]()
    contender = contend(task.model, run.variant)
    try:
        optimiser = optimiser_of(contender, experiment.rate)
        for index in range(experiment.steps):
            tick(f"{run}: step {index + 1} of {experiment.steps}")
            batch = task.batch(run.seed, index, rows)
            start = time.perf_counter()
            losses.append(train_step(task, contender.model, optimiser, batch))
            seconds.append(time.perf_counter() - start)
        tick(f"{run}: memory and held-out rows")
        saved, peak = bytes_of(contender, task, task.batch(run.seed, 0, rows))
        scores = task.score(contender.model)
    finally:
        contender.close()
    return {
        "rows": rows,
        "losses": losses,
        **scores,
        "saved_bytes": saved,
        "peak_bytes": peak,
        "step_seconds": statistics.median(seconds),
    }


def run_missing(experiment: Experiment, journal: Journal) -> None:
    """Run what the journal lacks. Nothing is loaded where nothing is lacking."""
    missing = [run for run in runs(experiment) if journal.get(key(experiment, run)) is None]
    if not missing:
        return
    with progress_bar() as progress:
        progress("loading the model", 0, 1)
        task = experiment.load()
        tick = Ticker(progress, len(missing) * (experiment.steps + 2))
        with fast_bf16() if base_dtype(task.model) == torch.bfloat16 else nullcontext():
            budget = None
            for run in missing:
                if run.equal_memory and budget is None:
                    budget = _budget(task, experiment)
                values = measure(task, experiment, run, budget if run.equal_memory else None, tick)
                journal.add(key(experiment, run), values)
                console.print(f"{run}: held-out loss {values['loss']:.4f}", highlight=False)


def _budget(task: Task, experiment: Experiment) -> int:
    """Peak bytes of a step of `balanced`."""
    contender = contend(task.model, next(v for v in variants() if v.name == "loract balanced"))
    try:
        return bytes_of(contender, task, task.batch(0, 0, experiment.rows))[1]
    finally:
        contender.close()


def table(found: Sequence[dict[str, Any]]) -> str:
    """Lines of a journal as a table in Markdown: means over the seeds, with what the seeds differ by."""
    by_name: dict[str, list[dict[str, Any]]] = {}
    for line in found:
        by_name.setdefault(line["method"], []).append(line["values"])
    if not by_name:
        return ""
    plain = by_name.get("LoRA") or next(iter(by_name.values()))
    several = max(map(len, by_name.values())) > 1
    score = "accuracy" if "accuracy" in plain[0] else None
    heads = ["method", *([score] if score else []), "held-out loss", "saved MiB", "of LoRA's", "peak MiB", "step time"]
    if len({values["rows"] for each in by_name.values() for values in each}) > 1:
        heads.insert(1, "rows a step")
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for name, each in by_name.items():
        cells = {
            "method": name,
            "rows a step": f"{statistics.median(v['rows'] for v in each):.0f}",
            "accuracy": _spread([100 * v["accuracy"] for v in each], 1, several) + " %" if score else "",
            "held-out loss": _spread([v["loss"] for v in each], 4 if not several else 3, several),
            "saved MiB": f"{_mean(each, 'saved_bytes') / MIB:.1f}",
            "of LoRA's": f"{100 * _mean(each, 'saved_bytes') / _mean(plain, 'saved_bytes'):.1f} %",
            "peak MiB": f"{_mean(each, 'peak_bytes') / MIB:.1f}",
            "step time": f"{_mean(each, 'step_seconds') / _mean(plain, 'step_seconds'):.2f}x",
        }
        lines.append([cells[head] for head in heads])
    return grid(lines)


def _mean(each: Sequence[dict[str, Any]], name: str) -> float:
    return statistics.fmean(values[name] for values in each)


def _spread(values: Sequence[float], digits: int, several: bool) -> str:
    """Mean, and half of what lies between the least and the greatest."""
    half = (max(values) - min(values)) / 2
    return f"{statistics.fmean(values):.{digits}f}" + (f" ± {half:.{digits}f}" if several else "")


def main(experiment: Experiment, arguments: Sequence[str] | None = None) -> None:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(
        description=f"{experiment.title}.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=experiment.steps)
    parser.add_argument("--rows", type=int, default=experiment.rows, help="rows of a step")
    parser.add_argument("--rate", type=float, default=experiment.rate, help="learning rate")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(experiment.seeds), help="of starts and orders")
    parser.add_argument("--out", type=Path, default=RECORDS, help="folder of the records")
    given = parser.parse_args(arguments)
    sizes = {"steps": given.steps, "rows": given.rows, "rate": given.rate, "seeds": tuple(given.seeds)}
    experiment = replace(experiment, **sizes)
    journal = Journal(given.out / f"{experiment.name}.jsonl")
    run_missing(experiment, journal)
    for equal in (False, True):
        chosen = [run for run in runs(experiment) if run.equal_memory is equal]
        lines = [{**key(experiment, run), "values": journal.get(key(experiment, run))} for run in chosen]
        if lines:
            console.print("At equal memory:" if equal else experiment.title, highlight=False)
            console.print(table(lines), markup=False, highlight=False)
