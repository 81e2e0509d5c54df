"""`loract bench`: bytes, time and gradient fidelity of methods on one step of real work; `frontier`: of many more."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from loract.cli.common import (
    GEMMA,
    Out,
    console,
    model_folder,
    parse_dtype,
    progress_bar,
    show,
    status,
    write,
)
from loract.compare import STANDARD
from loract.decomposition import Decomposed, activations
from loract.errors import InvalidSpec
from loract.frontier import Journal, Settings, methods
from loract.frontier import frontier as measure
from loract.report import comparison, markdown
from loract.report import frontier as plot
from loract.studies import FLOOR, WARM_STEPS, benchmark
from loract.workload import job, workload

HELD_OUT_ROWS = 8

app = typer.Typer(invoke_without_command=True)


@app.callback()
def bench(
    context: typer.Context,
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
    if context.invoked_subcommand is not None:
        return
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


@app.command()
def frontier(
    model: Annotated[str, typer.Option(help="gemma, minilm, vit, llama or qwen.")] = "gemma",
    batch: Annotated[int | None, typer.Option(min=1, help="Sequences or images a step; by model if not given.")] = None,
    length: Annotated[int | None, typer.Option(min=8, help="Tokens a sequence; by model if not given.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the base model: bf16 or fp32.")] = "bf16",
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds; each runs every method once.")] = 5,
    steps: Annotated[int, typer.Option(min=0, help="Also train each method for so many steps and compare losses.")] = 0,
    only: Annotated[list[str] | None, typer.Option(help="Only this method beside LoRA; may be repeated.")] = None,
    compile_seconds: Annotated[int, typer.Option(min=1, help="Limit for the first compiled step.")] = 600,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget all that was measured in this folder.")] = False,
    out: Out = Path("results/frontier"),
) -> None:
    """Measure plain LoRA, its rivals and loract's presets: bytes, gradient fidelity and time of one step.

    Every finished measurement is a line in records.jsonl; a rerun measures only what is not there. The table and the
    plot go to a folder of the model's name.
    """
    chosen = job(model)
    if chosen.fixed_length and length not in (None, chosen.length):
        raise InvalidSpec(f"length={length} for {model!r}", f"{chosen.length}, its images' size", "leave --length out")
    settings = Settings(
        model=model,
        batch=batch or chosen.batch,
        length=length or chosen.length,
        dtype=dtype,
        rounds=rounds,
        steps=steps,
        compile_seconds=compile_seconds,
    )
    load = partial(
        chosen.load,
        length=settings.length,
        train=settings.train_rows,
        held_out=HELD_OUT_ROWS,
        dtype=parse_dtype(dtype),
    )
    variants = methods(only or ())
    journal = Journal(out / "records.jsonl", fresh=fresh)
    with progress_bar() as progress:
        found = measure(load, variants, settings, journal, progress)
    rows = [*found.records, *([found.floor] if found.floor else [])]
    title = f"{chosen.title}, {dtype}, LoRA r = 16 on all linears, {settings.batch} x {settings.length} tokens"
    failed = [f"{name}: failed: {reason}" for name, reason in found.failures.items()]
    folder = out / model
    folder.mkdir(parents=True, exist_ok=True)
    notes = [f"{r.name}: {r.extra['note']}" for r in found.records if "note" in r.extra]
    lines = [f"- {text}\n" for text in (*failed, *notes)]
    (folder / "table.md").write_text("".join([f"{title}\n\n", markdown(rows), "\n", *lines]), encoding="utf-8")
    plot(found.records, folder / "frontier.png", title, found.floor.relative_error if found.floor else None)
    show(rows, title)
    for text in failed:
        console.print(text, markup=False, highlight=False)
    for text in notes:
        console.print(text, markup=False, highlight=False, style="dim")
    console.print(f"{folder / 'table.md'}, {out / 'records.jsonl'}, {folder / 'frontier.png'}")


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
