"""Train one task in many ways from the same starts on the same rows. A finished run is a line, and not run again."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from experiments.tables import tables
from loract.cli import silence
from loract.cli.common import console, progress_bar
from loract.codecs import LowRank
from loract.compare import Contender, Ticker, Variant, alternate, contend, time_ratio, whole_step
from loract.cpu import fast_bf16
from loract.frontier import MODES, Journal, Settings, methods
from loract.policy import preset
from loract.rangefinder import Gaussian
from loract.studies import optimiser_of, reset_adapters, train_step

RECORDS = Path("results/experiments")
RIVALS = ("LoRA + checkpointing", "VeLoRA", "LoRA-FA")
PRESETS = ("exact", "balanced", "smallest")
RANKS = ("1/4", "1/8", "1/16")
EQUAL = ("LoRA", *RIVALS, "loract exact", "loract balanced", "loract sublayer 1/8", "loract tensor 1/8")
"""Methods that are compared at equal memory."""
SCORED = 32
"""Held-out rows at once."""
ROUNDS = 5
"""Timed steps of each method, all methods in turn."""

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


def split(columns: Columns, every: int = 4) -> tuple[Columns, Columns]:
    """Rows to train on, and every so-many-th, held out."""
    held_out = torch.arange(len(next(iter(columns.values())))) % every == every - 1
    return ({k: v[~held_out] for k, v in columns.items()}, {k: v[held_out] for k, v in columns.items()})


def classification(model: Any, logits: Callable[[Any, Columns], Tensor], train: Columns, held_out: Columns) -> Task:
    """The task to tell from a row's (rows, classes) `logits` its class, in `labels`."""

    def loss(model: Any, batch: Columns) -> Tensor:
        return functional.cross_entropy(logits(model, batch), batch["labels"])

    def right(model: Any, batch: Columns) -> Tensor:
        return (logits(model, batch).argmax(1) == batch["labels"]).sum()

    return Task(model=model, train=train, held_out=held_out, loss=loss, right=right)


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


def time_key(experiment: Experiment, variant: Variant) -> dict[str, Any]:
    """What identifies a time, which belongs to no seed."""
    found = key(experiment, Run(variant=variant, seed=0))
    for unused in ("seed", "equal_memory", "steps", "rate"):
        found.pop(unused)
    return {**found, "rounds": ROUNDS}


def bytes_of(task: Task, variant: Variant, rows: int) -> tuple[int, int]:
    """Saved and peak bytes of a step of so many rows, the second one: the first looks at shapes."""
    contender, batch = contend(task.model, variant), task.batch(0, 0, rows)
    try:
        for _ in range(2):
            found = whole_step(contender.model, task, batch)
            contender.model.zero_grad(set_to_none=True)
        return found
    finally:
        contender.close()


def fitting(task: Task, variant: Variant, rows: int, budget: int) -> int:
    """The most rows, at least 1 and at most `rows`, whose step peaks within `budget` bytes."""
    least, most = 1, rows
    while least < most:
        middle = (least + most + 1) // 2
        _, peak = bytes_of(task, variant, middle)
        least, most = (middle, most) if peak <= budget else (least, middle - 1)
    return least


def measure(task: Task, experiment: Experiment, run: Run, budget: int | None, tick: Ticker) -> dict[str, Any]:
    """Train, measure a step's memory, and score."""
    reset_adapters(task.model, run.seed)
    tick(f"{run}: rows that fit" if run.equal_memory else f"{run}: begins")
    rows = experiment.rows if budget is None else fitting(task, run.variant, experiment.rows, budget)
    losses = list[float]()
    contender = contend(task.model, run.variant)
    try:
        optimiser = optimiser_of(contender, experiment.rate)
        for index in range(experiment.steps):
            tick(f"{run}: step {index + 1} of {experiment.steps}")
            batch = task.batch(run.seed, index, rows)
            losses.append(train_step(task, contender.model, optimiser, batch))
        tick(f"{run}: memory and held-out rows")
        saved, peak = whole_step(contender.model, task, task.batch(run.seed, 0, rows))
        contender.model.zero_grad(set_to_none=True)
        scores = task.score(contender.model)
    finally:
        contender.close()
    return {
        "rows": rows,
        "losses": losses,
        **scores,
        "saved_bytes": saved,
        "peak_bytes": peak,
    }


def time_all(task: Task, experiment: Experiment, journal: Journal, tick: Ticker) -> None:
    """Forward and backward of all methods in turn, round after round; ratios to LoRA's time in the same round."""
    batch = task.batch(0, 0, experiment.rows)
    contenders = [contend(task.model, variant) for variant in variants()]

    def step(contender: Contender) -> None:
        tick(f"timing {contender.variant.name}")
        task.loss(contender.model, batch).backward()
        contender.model.zero_grad(set_to_none=True)

    try:
        for _ in range(ROUNDS + 1):
            alternate(contenders, step)
    finally:
        for contender in contenders:
            contender.close()
            contender.seconds = contender.seconds[1:]  # the first step looks at shapes and fills caches
    for contender in contenders:
        ratio = time_ratio(contender, contenders[0])
        values = {"time_ratio": ratio, "seconds": contender.seconds}
        journal.add(time_key(experiment, contender.variant), values)


def run_missing(experiment: Experiment, journal: Journal) -> None:
    """Run what the journal lacks. Nothing is loaded where nothing is lacking."""
    missing = [run for run in runs(experiment) if journal.get(key(experiment, run)) is None]
    untimed = any(journal.get(time_key(experiment, v)) is None for v in variants())
    if not missing and not untimed:
        return
    balanced = next(v for v in variants() if v.name == "loract balanced")
    with progress_bar() as progress:
        progress("loading the model", 0, 1)
        task = experiment.load()
        tick = Ticker(progress, len(missing) * (experiment.steps + 2) + untimed * len(variants()) * (ROUNDS + 1))
        with fast_bf16():
            budget = None
            for run in missing:
                if run.equal_memory and budget is None:
                    _, budget = bytes_of(task, balanced, experiment.rows)
                values = measure(task, experiment, run, budget if run.equal_memory else None, tick)
                journal.add(key(experiment, run), values)
                console.print(f"{run}: held-out loss {values['loss']:.4f}", highlight=False)
            if untimed:
                time_all(task, experiment, journal, tick)


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
    silence()
    warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for what has another name now
    sizes = {"steps": given.steps, "rows": given.rows, "rate": given.rate, "seeds": tuple(given.seeds)}
    experiment = replace(experiment, **sizes)
    journal = Journal(given.out / f"{experiment.name}.jsonl")
    run_missing(experiment, journal)
    every = [key(experiment, run) for run in runs(experiment)] + [time_key(experiment, v) for v in variants()]
    for title, drawn in tables([{**each, "values": journal.get(each)} for each in every]).items():
        console.print(f"{experiment.title}{title and f', at {title}'}", highlight=False)
        console.print(drawn, markup=False, highlight=False)
