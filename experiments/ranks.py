"""Are activations of low rank, and do they stay so while a model trains? Spectra at several steps of training."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import docstrings, language
from experiments.study import RECORDS, Experiment
from loract.atlas import Spectrum, atlas
from loract.cli import silence
from loract.cli.common import console, progress_bar
from loract.cpu import fast_bf16
from loract.frontier import Journal
from loract.report.table import grid
from loract.studies import adamw, reset_adapters, train_step

NAME = "ranks"
EXPERIMENTS = (language.EXPERIMENT, docstrings.EXPERIMENT)
STEPS = (0, 8, 32)
FIGURES = ("stable_rank", "energy_sixteenth", "energy_eighth", "energy_quarter", "error_eighth")


def key(experiment: Experiment, step: int) -> dict[str, Any]:
    """What identifies a measurement."""
    return {"experiment": experiment.name, "rows": experiment.rows, "rate": experiment.rate, "step": step}


def figures(spectra: Sequence[Spectrum]) -> dict[str, Any]:
    """Medians over the tensors of a kind."""
    found: dict[str, Any] = {}
    for kind in dict.fromkeys(s.kind for s in spectra):
        same = [s for s in spectra if s.kind == kind]
        found[kind] = {name: statistics.median(getattr(s, name) for s in same) for name in FIGURES}
        found[kind] |= {"tensors": len(same), "tokens": same[0].tokens}
    return found


def measure(experiment: Experiment, journal: Journal, steps: Sequence[int] = STEPS) -> None:
    """Train with plain LoRA, and look at the same rows after so many steps."""
    if all(journal.get(key(experiment, step)) is not None for step in steps):
        return
    task = experiment.load()
    reset_adapters(task.model, 0)
    optimiser, seen = adamw(task.model, experiment.rate), task.batch(0, 0, experiment.rows)
    with fast_bf16(), progress_bar() as progress:
        for index in range(max(steps) + 1):
            if index in steps and journal.get(key(experiment, index)) is None:
                spectra = atlas(
                    task.model,
                    lambda: task.loss(task.model, seen),
                    progress=lambda text, done, total, index=index: progress(
                        f"{experiment.name}, step {index}: {text}", done, total
                    ),
                )
                journal.add(key(experiment, index), figures(spectra))
            progress(f"{experiment.name}: step {index + 1}", index, max(steps) + 1)
            train_step(task, task.model, optimiser, task.batch(0, index, experiment.rows))


def table(found: Sequence[dict[str, Any]]) -> str:
    """One line a kind, with a figure for each step, in Markdown."""
    steps = sorted({line["step"] for line in found})
    when = f"after {', '.join(map(str, steps))} steps"
    lines = [["task", "site", "tensors", f"stable rank {when}", "energy in n / 8", "best error at n / 8"]]
    lines.append(["---", "---", *["---:"] * 4])
    for name in dict.fromkeys(line["experiment"] for line in found):
        mine = {line["step"]: line["values"] for line in found if line["experiment"] == name}
        for kind, first in mine[steps[0]].items():
            each = [mine[step][kind] for step in steps]
            ranks = ", ".join(f"{v['stable_rank']:.1f}" for v in each)
            energies = ", ".join(f"{100 * v['energy_eighth']:.1f}" for v in each)
            errors = ", ".join(f"{v['error_eighth']:.2f}" for v in each)
            lines.append([name, kind, str(first["tensors"]), ranks, f"{energies} %", errors])
    return grid(lines)


def main(arguments: Sequence[str] | None = None, experiments: Sequence[Experiment] = EXPERIMENTS) -> None:
    """Measure what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RECORDS, help="folder of the records")
    silence()
    journal = Journal(parser.parse_args(arguments).out / f"{NAME}.jsonl")
    for experiment in experiments:
        measure(experiment, journal)
    found = [{**key(e, step), "values": journal.get(key(e, step))} for e in experiments for step in STEPS]
    console.print(table(found), markup=False, highlight=False)


if __name__ == "__main__":
    main()
