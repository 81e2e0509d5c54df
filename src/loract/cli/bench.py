"""`loract bench`: bytes, time and gradient fidelity of every method on one step of real work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loract.cli.common import GEMMA, Out, console, model_folder, progress_bar, show, write
from loract.compare import STANDARD
from loract.report import comparison
from loract.studies import FLOOR, benchmark
from loract.workload import workload


def bench(
    batch: Annotated[int, typer.Option(min=1, help="Sequences a step.")] = 4,
    length: Annotated[int, typer.Option(min=8, help="Tokens a sequence.")] = 1024,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds; each runs every method once.")] = 5,
    out: Out = Path("results/bench"),
) -> None:
    """Measure one step of Gemma-3-270M (bf16 base, LoRA r = 16 on all linears), decoder body, loss chunked for all.

    Prints the table and writes it with the records (JSON lines) and a plot.
    """
    work = workload(model_folder(GEMMA), length=length, train=batch + 8, held_out=1)
    with progress_bar() as progress:
        records = benchmark(work, STANDARD, batch=batch, rounds=rounds, progress=progress)
    write(records, out)
    comparison([r for r in records if r.name != FLOOR], out / "comparison.png")
    show(records, f"Gemma-3-270M, bf16, LoRA r = 16 on all linears, {batch} x {length} tokens, decoder body")
    for record in records:
        if record.extra.get("forward_bit_identical") is False:
            console.print(f"[red]{record.name}: forward values differ from LoRA's[/red]")
    console.print(f"{out / 'table.md'}, {out / 'records.jsonl'}, {out / 'comparison.png'}")
