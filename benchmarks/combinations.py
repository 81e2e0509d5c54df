"""Bases, ways to train and activations together: where the memory of each combination goes, in one table.

A causal language model (without --model Gemma-3-270M) whose linear layers are in bf16, int8 or NF4 (bitsandbytes), all
else in bf16; LoRA r = 16 in fp32 on every linear layer, with AdamW, or all weights with projected gradients; what
backward needs kept by autograd, checkpointed by torch layer by layer, or coded by loract. All weights train over a bf16
base alone: quantised weights are integers, for which torch has no gradients (`requires_grad_` raises). That leaves 16
rows, each in a model of its own, all with the same loss on the same blocks in the same order. Finished runs are kept:
a rerun does the rest.

Columns (`loract.footprint.Footprint`):
- weight: parameters and buffers as they are stored, adapters, scales and tables of quantised weights among them.
- activation: what the model's body has left for backward when it returns, without its output.
- gradient: the most at one time, before they are projected, with the projections that wait for the step.
- state: moments and bases, between steps.
- peak: weights and all else at the highest moment of the first three steps, with the temporaries that operators return
  (such as the logits of the 64 tokens that the loss takes at once) and without those inside one kernel.
- step: the median time of the other steps.
- held-out: the loss after the last step.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loract.attach import attach
from loract.cli.common import console, progress_bar
from loract.compare import Progress, Ticker, checkpointing
from loract.config import TrainConfig
from loract.data import standard_library, token_blocks
from loract.errors import InvalidSpec, nearest
from loract.footprint import TRACKED, Footprint, footprint
from loract.frontier import Journal
from loract.memory import MIB
from loract.models import load_model, read_architecture, read_tokenizer
from loract.optim import ProjectedAdamW
from loract.policy import preset
from loract.policyfile import describe
from loract.report.table import grid
from loract.studies import adamw, machine
from loract.weights import gemma_270m
from loract.workload import Workload

BASES = {"bf16": {}, "int8": {"load_in_8bit": True}, "NF4": {"load_in_4bit": True}}
RATES = {"LoRA": 5e-4, "all weights": 1e-4}
ACTIVATIONS = ("kept", "checkpointing", "balanced", "smallest")


@dataclass(frozen=True, kw_only=True)
class Combination:
    """A row."""

    base: str
    training: str
    activations: str

    @property
    def name(self) -> str:
        """For people."""
        return ", ".join(vars(self).values())

    def optimiser(self, model: nn.Module) -> torch.optim.Optimizer:
        """Of what trains."""
        rate = RATES[self.training]
        if self.training == "LoRA":
            return adamw(model, rate, decay=0.0)
        return ProjectedAdamW(model.parameters(), lr=rate, during_backward=True)


COMBINATIONS = [
    Combination(base=base, training=training, activations=activations)
    for base, training, activations in product(BASES, RATES, ACTIVATIONS)
    if base == "bf16" or training == "LoRA"
]


@dataclass(frozen=True, kw_only=True)
class Study:
    """The sizes."""

    model: str
    steps: int
    length: int
    held_out: int

    def key(self, row: Combination) -> dict[str, Any]:
        """What identifies a run."""
        coded = row.activations in ("balanced", "smallest")
        rules = [f"{r.kind} {describe(r.codec)}" for r in preset(row.activations).rules] if coded else None
        return {**vars(self), **vars(row), "rate": RATES[row.training], "rules": rules, **machine()}


Load = Callable[[Study, Combination], Workload]


def real(study: Study, row: Combination) -> Workload:
    """The model, and blocks of the standard library's sources."""
    folder = study.model or str(gemma_270m())
    config = TrainConfig(
        model_name_or_path=folder,
        dataset_name=folder,  # not read: the blocks are this script's
        output_dir=folder,
        dtype="bfloat16",
        use_peft=row.training == "LoRA",
        **BASES[row.base],
    )
    model, tokenizer = load_model(config, folder, read_architecture(config, folder)), read_tokenizer(config, folder)
    return Workload(
        model=model,
        head=model.get_output_embeddings().weight,
        train=token_blocks(tokenizer, standard_library("train"), study.steps, study.length),
        held_out=token_blocks(tokenizer, standard_library("held_out"), study.held_out, study.length),
    )


def run(work: Workload, row: Combination, steps: int, tick: Callable[[str], None]) -> Footprint:
    """Train and evaluate."""
    if row.activations == "checkpointing":
        checkpointing(work.model, 1)
    plain = row.activations in ("kept", "checkpointing")
    with nullcontext() if plain else attach(work.model, row.activations):
        return footprint(work, row.optimiser, steps, tick)


def run_missing(load: Load, study: Study, chosen: Sequence[Combination], journal: Journal, progress: Progress) -> None:
    """Every combination that has no record."""
    missing = [row for row in chosen if journal.get(study.key(row)) is None]
    tick = Ticker(progress, len(missing) * (study.steps + 2))
    for row in missing:
        tick(f"{row.name}: loading")
        values = run(load(study, row), row, study.steps, lambda text, row=row: tick(f"{row.name}: {text}"))
        journal.add(study.key(row), asdict(values))


def table(study: Study, journal: Journal) -> str:
    """Whatever has a record, in Markdown."""
    sizes = ("weight_bytes", "activation_bytes", "gradient_bytes", "state_bytes", "peak_bytes")
    lines = [["base", "trained", "activations", *(f"{s.split('_')[0]} MiB" for s in sizes), "step s", "held-out"]]
    lines.append([*["---"] * 3, *["---:"] * 7])
    for row in COMBINATIONS:
        if (found := journal.get(study.key(row))) is not None:
            cells = [f"{found[size] / MIB:.0f}" for size in sizes]
            lines.append([*vars(row).values(), *cells, f"{found['step_seconds']:.1f}", f"{found['held_out']:.3f}"])
    return grid(lines)


def select(words: Sequence[str]) -> list[Combination]:
    """The combinations that `words` leave: of each column those that are named, or all where none is.

    Raises:
        InvalidSpec: a word that no column has, or nothing left.
    """
    columns = (tuple(BASES), tuple(RATES), ACTIVATIONS)
    known = [word for column in columns for word in column]
    for word in words:
        if word not in known:
            raise InvalidSpec(f"--only {word!r}", f"of {', '.join(known)}", nearest(word, known))
    named = [set(column) & set(words) or set(column) for column in columns]
    found = [row for row in COMBINATIONS if all(v in names for v, names in zip(vars(row).values(), named))]
    if not found:
        expected = "a bf16 base: quantised weights have no gradients"
        raise InvalidSpec(f"all weights over {' and '.join(words)}", expected, "leave out the base")
    return found


def main(arguments: Sequence[str] | None = None, load: Load = real) -> None:
    """Run what is missing, print the table and write it beside the records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default="", help="folder of a causal language model; without it Gemma-3-270M")
    parser.add_argument("--steps", type=int, default=8, help="of one block each")
    parser.add_argument("--length", type=int, default=512, help="tokens of a block")
    parser.add_argument("--held-out", type=int, default=8, help="blocks")
    parser.add_argument("--only", nargs="+", default=[], help="words of the table's first columns: NF4 LoRA balanced")
    parser.add_argument("--out", type=Path, default=Path("results/combinations"), help="folder for the results")
    given = parser.parse_args(arguments)
    if given.steps <= TRACKED:
        raise InvalidSpec(f"--steps {given.steps}", f"more than {TRACKED}", "raise it")
    chosen = select(given.only)
    study = Study(model=given.model, steps=given.steps, length=given.length, held_out=given.held_out)
    journal = Journal(given.out / "records.jsonl")
    with progress_bar() as progress:
        run_missing(load, study, chosen, journal, progress)
    found = table(study, journal)
    (given.out / "table.md").write_text(found, encoding="utf-8")
    console.print(found, markup=False, highlight=False)


if __name__ == "__main__":
    main()
