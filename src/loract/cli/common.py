"""What the verbs share: the terminal, progress, parsing of ranks, choice of model and policy."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from loract.compare import Progress as Callback
from loract.errors import InvalidSpec
from loract.memory import Record
from loract.report import markdown, rows
from loract.weights import gemma_270m

console = Console()
if not console.is_terminal:  # tables in a pipe or a log are not squeezed into 80 columns
    console.width = 140
status = Console(stderr=True)
"""Progress goes to stderr, so that what a verb prints can be piped."""

GEMMA = "gemma-3-270m"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

Model = Annotated[str, typer.Argument(help=f"Folder of a causal language model, or {GEMMA!r} (packaged weights).")]
Preset = Annotated[str, typer.Option("--preset", help="balanced, fast, smallest, exact, tensor, sublayer or layer.")]
Rank = Annotated[str | None, typer.Option("--rank", help="Columns (16) or share of the features (0.125, 1/8, 1.0).")]
Bits = Annotated[int | None, typer.Option("--bits", help="Quantise to so many bits (1 to 8) instead of low rank.")]
ExactInputs = Annotated[bool, typer.Option("--exact", help="Keep the inputs of sublayers or layers as they are.")]
Out = Annotated[Path, typer.Option("--out", help="Folder for the results.")]


def parse_dtype(name: str) -> torch.dtype:
    """A dtype by its short name.

    Raises:
        InvalidSpec: an unknown one.
    """
    if name not in DTYPES:
        raise InvalidSpec(f"dtype {name!r}", " or ".join(DTYPES), "use --dtype bf16")
    return DTYPES[name]


def model_folder(name: str) -> str:
    """Where the model lies; the packaged one is converted at its first use."""
    if name != GEMMA:
        return name
    with status.status("loading Gemma-3-270M (the first time it is converted, about a minute)"):
        return str(gemma_270m())


@contextmanager
def progress_bar() -> Generator[Callback]:
    """A bar that a study's callback moves."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=status, transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def update(text: str, done: int, total: int) -> None:
            bar.update(task, description=text, completed=done, total=total)

        yield update


def show(records: Sequence[Record], title: str) -> None:
    """Print the table of records."""
    header, body = rows(records)
    table = Table(title=title, title_justify="left")
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index else "left", no_wrap=True)
    for line in body:
        table.add_row(*line)
    console.print(table)


def write(records: Sequence[Record], folder: Path) -> None:
    """Write records.jsonl and table.md, replacing those of an earlier run."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = folder / "records.jsonl"
    lines.unlink(missing_ok=True)
    for record in records:
        record.append(lines)
    (folder / "table.md").write_text(markdown(records), encoding="utf-8")
