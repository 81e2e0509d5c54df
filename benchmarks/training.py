"""Does an approximate gradient cost anything in training? Held-out losses of several methods, on two data sets.

All methods of one data set and seed start from the same adapters and see the same blocks in the same order. The
held-out blocks are the same for every run of a data set and come from other files. Finished runs are kept: a rerun does
the rest. Seconds are those of one run after the other on whatever else the machine did: `loract bench` compares times.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loract.cli.common import console, parse_dtype, progress_bar
from loract.compare import Progress, Ticker, Variant, contend
from loract.cpu import fast_bf16
from loract.data import Split, all_blocks, prose, spread, standard_library
from loract.errors import InvalidSpec, nearest
from loract.frontier import Journal, Settings, methods
from loract.report.table import grid
from loract.studies import evaluate, optimiser_of, reset_adapters, train_step
from loract.weights import gemma_270m, quiet
from loract.workload import Workload, workload

METHODS = ("LoRA", "loract balanced", "loract smallest", "loract sublayer 1/8")

Load = Callable[[torch.dtype], tuple[Workload, Any]]
"""Makes a model of that dtype with adapters, whose blocks are not looked at, and its tokenizer."""


DATASETS: dict[str, Callable[[Split], Iterator[str]]] = {"code": standard_library, "prose": prose}


def gemma(dtype: torch.dtype) -> tuple[Workload, Any]:
    """Gemma-3-270M with LoRA on every linear layer, and its tokenizer."""
    from transformers import AutoTokenizer

    folder = str(gemma_270m())
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(folder)
    return workload(folder, length=8, train=1, held_out=1, dtype=dtype), tokenizer


@dataclass(frozen=True, kw_only=True)
class Study:
    """Which runs there are."""

    datasets: tuple[str, ...] = tuple(DATASETS)
    seeds: tuple[int, ...] = (0, 1)
    variants: tuple[Variant, ...]
    """The first is plain LoRA."""
    steps: int = 60
    length: int = 512
    """Tokens of a block; a step takes one block."""
    held_out: int = 32
    """Blocks."""
    dtype: str = "bf16"

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            InvalidSpec: a size that is too small, an unknown data set, or a method that runs compiled.
        """
        for name, least in (("steps", 1), ("length", 2), ("held_out", 1)):
            if (value := getattr(self, name)) < least:
                raise InvalidSpec(f"{name}={value}", f"at least {least}", f"raise --{name.replace('_', '-')}")
        for name in self.datasets:
            if name not in DATASETS:
                raise InvalidSpec(f"data set {name!r}", f"one of {', '.join(DATASETS)}", nearest(name, DATASETS))
        for variant in self.variants:
            if variant.compiled:
                raise InvalidSpec(f"method {variant.name!r}", "one that runs uncompiled", "leave it out")

    @property
    def runs(self) -> list[Run]:
        """Every run, in order."""
        return [Run(dataset=d, seed=s, variant=v) for d in self.datasets for s in self.seeds for v in self.variants]

    def key(self, run: Run) -> dict[str, Any]:
        """What identifies a run: all that its losses depend on, the policy's content and the machine."""
        settings = Settings(model="gemma", batch=1, length=self.length, dtype=self.dtype, steps=self.steps)
        own = {"dataset": run.dataset, "seed": run.seed, "held_out": self.held_out}
        return {**settings.key(run.variant, "training"), **own, "python": platform.python_version()}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run."""

    dataset: str
    seed: int
    variant: Variant

    def __str__(self) -> str:
        return f"{self.dataset}, seed {self.seed}, {self.variant.name}"


@dataclass(frozen=True, kw_only=True)
class Text:
    """Blocks (blocks, length) of one data set, and the loss on the held-out ones before training."""

    train: Tensor
    held_out: Tensor
    before: float


class Session:
    """The loaded model and texts that the missing runs share."""

    def __init__(self, load: Load, study: Study) -> None:
        """Load the model."""
        self.study = study
        dtype = parse_dtype(study.dtype)
        self.work, self.tokenizer = load(dtype)
        self.products = fast_bf16 if dtype == torch.bfloat16 else nullcontext
        self._texts: dict[str, Text] = {}

    def measure(self, run: Run, tick: Ticker) -> dict[str, Any]:
        """Train, and evaluate before and after."""
        reset_adapters(self.work.model, run.seed)
        tick(f"{run}: data and held-out loss before")
        text = self._text(run.dataset)
        order = torch.randperm(len(text.train), generator=torch.Generator().manual_seed(run.seed))
        work = replace(self.work, train=text.train[order], held_out=text.held_out)
        losses, seconds = list[float](), list[float]()
        contender = contend(work.model, run.variant)
        try:
            model, optimiser = contender.model, optimiser_of(contender)
            with self.products():
                for index in range(self.study.steps):
                    tick(f"{run}: step {index + 1} of {self.study.steps}")
                    start = time.perf_counter()
                    losses.append(train_step(work, model, optimiser, work.rows(index, 1)))
                    seconds.append(time.perf_counter() - start)
                tick(f"{run}: held-out loss after")
                after = evaluate(work, model)
        finally:
            contender.close()
        return {
            "losses": losses,
            "held_out_before": text.before,
            "held_out_after": after,
            "step_seconds": statistics.median(seconds),
        }

    def _text(self, name: str) -> Text:
        """Read once. B = 0 before training, so that the loss before is one for all seeds and methods."""
        if name not in self._texts:
            train = all_blocks(self.tokenizer, DATASETS[name]("train"), self.study.length)
            held_out = all_blocks(self.tokenizer, DATASETS[name]("held_out"), self.study.length)
            held_out = spread(held_out, self.study.held_out)
            with self.products():
                before = evaluate(replace(self.work, held_out=held_out), self.work.model)
            self._texts[name] = Text(train=train, held_out=held_out, before=before)
        return self._texts[name]


def run_missing(load: Load, study: Study, journal: Journal, progress: Progress) -> None:
    """Run what the journal lacks. Nothing is loaded where nothing is lacking."""
    missing = [run for run in study.runs if journal.get(study.key(run)) is None]
    if not missing:
        return
    progress("loading the model", 0, 1)
    session = Session(load, study)
    tick = Ticker(progress, len(missing) * (study.steps + 2))
    for run in missing:
        values = session.measure(run, tick)
        journal.add(study.key(run), values)
        console.print(f"{run}: held-out loss {values['held_out_before']:.4f} -> {values['held_out_after']:.4f}")


def table(study: Study, journal: Journal) -> str:
    """Held-out losses by data set and method, in Markdown; below, what a seed alone changes."""
    seeds = [f"seed {seed}" for seed in study.seeds]
    lines = [["data", "method", *seeds, "mean", "against LoRA", "step s"], ["---"] * 2 + ["---:"] * (len(seeds) + 3)]
    notes: list[str] = []
    for dataset in study.datasets:
        found = {v.name: _values(study, journal, dataset, v) for v in study.variants}
        losses = {name: [each["held_out_after"] for each in values] for name, values in found.items()}
        plain = losses[study.variants[0].name]
        reference = statistics.fmean(plain)
        for name, values in found.items():
            mean = statistics.fmean(losses[name])
            change = "-" if losses[name] is plain else f"{100 * (mean / reference - 1):+.2f} %"
            seconds = statistics.median(each["step_seconds"] for each in values)
            cells = [f"{loss:.4f}" for loss in (*losses[name], mean)]
            lines.append([dataset, name, *cells, change, f"{seconds:.2f}"])
        before = found[study.variants[0].name][0]["held_out_before"]
        width = max(plain) - min(plain)
        apart = f"LoRA's seeds differ by {width:.4f}, {100 * width / reference:.2f} %"
        notes.append(f"{dataset}: {before:.4f} before training; {apart}")
    return grid(lines) + "\n" + "".join(f"- {note}\n" for note in notes)


def _values(study: Study, journal: Journal, dataset: str, variant: Variant) -> list[dict[str, Any]]:
    """What was found, for each seed."""
    keys = (study.key(Run(dataset=dataset, seed=seed, variant=variant)) for seed in study.seeds)
    return [values for key in keys if (values := journal.get(key)) is not None]


def main(arguments: Sequence[str] | None = None, load: Load = gemma) -> None:
    """Run what is missing, print the table and write it beside the records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="training steps, a block each")
    parser.add_argument("--length", type=int, default=512, help="tokens of a block")
    parser.add_argument("--held-out", type=int, default=32, help="held-out blocks")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of adapters and of the blocks' order")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="beside LoRA, by their names in bench")
    parser.add_argument("--datasets", nargs="+", default=list(DATASETS), help="code, prose")
    parser.add_argument("--dtype", default="bf16", help="of the base model: bf16 or fp32")
    parser.add_argument("--out", type=Path, default=Path("results/training"), help="folder for the results")
    given = parser.parse_args(arguments)
    study = Study(
        datasets=tuple(given.datasets),
        seeds=tuple(given.seeds),
        variants=methods(given.methods),
        steps=given.steps,
        length=given.length,
        held_out=given.held_out,
        dtype=given.dtype,
    )
    journal = Journal(given.out / "records.jsonl")
    with progress_bar() as progress:
        run_missing(load, study, journal, progress)
    found = table(study, journal)
    (given.out / "table.md").write_text(found, encoding="utf-8")
    console.print(found, markup=False, highlight=False)


if __name__ == "__main__":
    main()
