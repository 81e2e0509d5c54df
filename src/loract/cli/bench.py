"""`loract bench`: bytes, time and gradient fidelity of every method on one step of real work."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from loract.cli.common import GEMMA, Out, console, model_folder, progress_bar, show, status, write
from loract.compare import STANDARD
from loract.decomposition import Decomposed, activations
from loract.report import comparison
from loract.studies import FLOOR, WARM_STEPS, benchmark
from loract.workload import workload


def bench(
    batch: Annotated[int, typer.Option(min=1, help="Sequences a step.")] = 4,
    length: Annotated[int, typer.Option(min=8, help="Tokens a sequence.")] = 1024,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds; each runs every method once.")] = 5,
    resident: Annotated[bool, typer.Option(help="Also measure resident peaks in fresh processes.")] = True,
    decompose: Annotated[bool, typer.Option(help="Also compare decompositions on the activations.")] = True,
    out: Out = Path("results/bench"),
) -> None:
    """Measure one step of Gemma-3-270M (bf16 base, LoRA r = 16 on all linears), decoder body, loss chunked for all.

    Prints the table and writes it with the records (JSON lines) and a plot.
    """
    load = partial(workload, model_folder(GEMMA), length=length, train=batch + WARM_STEPS, held_out=1)
    work = load()
    with progress_bar() as progress:
        records = benchmark(
            work, STANDARD, batch=batch, rounds=rounds, load=load if resident else None, progress=progress
        )
    write(records, out)
    comparison([r for r in records if r.name != FLOOR], out / "comparison.png")
    show(records, f"Gemma-3-270M, bf16, LoRA r = 16 on all linears, {batch} x {length} tokens, decoder body")
    for record in records:
        if record.extra.get("forward_bit_identical") is False:
            console.print(f"[red]{record.name}: forward values differ from LoRA's[/red]")
    if decompose:
        with status.status("decomposing every activation in several ways"):
            found = activations(lambda: work.hidden(work.model, work.train[-batch:]), work.model)
        _decompositions(found, out)
    console.print(f"{out / 'table.md'}, {out / 'records.jsonl'}, {out / 'comparison.png'}")


def _decompositions(found: Sequence[Decomposed], out: Path) -> None:
    names = list(found[0].errors)
    table = Table(
        title="relative error at n/8, mean over tensors (times the optimum), and median time", title_justify="left"
    )
    for column in ("site", "tensors", "optimum", *names):
        table.add_column(column)
    for row in found:
        cells = (
            f"{row.errors[n]:.3f} ({row.errors[n] / row.optimum:.2f}x), {1e3 * row.seconds[n]:.1f} ms" for n in names
        )
        table.add_row(row.name, str(row.tensors), f"{row.optimum:.3f}", *cells)
    console.print(table)
    lines = (json.dumps(asdict(row)) + "\n" for row in found)
    (out / "decompositions.jsonl").write_text("".join(lines), encoding="utf-8")
