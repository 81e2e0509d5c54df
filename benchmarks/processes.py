"""Losses of one process, of several (DDP) and of several with sharded weights (FSDP2): the same rows in the same order.

Runs `loract train` on examples/several_processes.yaml and examples/sharded.yaml with short blocks, one run after the
other. Losses differ by what bf16 rounds, and coded tensors draw otherwise where other rows come together.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loract.cli.common import console, status
from loract.data import standard_library
from loract.report.table import grid
from loract.runs import METRICS

EXAMPLES = Path(__file__).parent.parent / "examples"
SOURCES = 20
"""Files of the standard library; more than the steps read."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to run: how many processes, and which example."""

    name: str
    processes: int
    example: str


def ways(processes: int) -> tuple[Way, ...]:
    """One process, and two ways to run several."""
    return (
        Way(name="one process", processes=1, example="several_processes.yaml"),
        Way(name=f"{processes} processes, DDP", processes=processes, example="several_processes.yaml"),
        Way(name=f"{processes} processes, FSDP2", processes=processes, example="sharded.yaml"),
    )


def run(way: Way, folder: Path, overrides: Sequence[str], rows: int) -> list[float]:
    """The losses of one run, by step. A step takes `rows` rows, however many processes there are."""
    output = folder / way.name.replace(" ", "_").replace(",", "")
    shared = ("--output_dir", str(output), "--per_device_train_batch_size", str(rows // way.processes))
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(way.processes))
    command = [sys.executable, *(launch if way.processes > 1 else ())]
    command += ["-m", "loract", "train", str(EXAMPLES / way.example), *shared, *overrides]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    lines = [json.loads(line) for line in (output / METRICS).read_text(encoding="utf-8").splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def table(losses: dict[str, list[float]]) -> str:
    """A column for each way, in Markdown."""
    steps = range(len(next(iter(losses.values()))))
    lines = [["step", *losses], ["---:"] * (1 + len(losses))]
    lines += [[str(step + 1), *(f"{found[step]:.4f}" for found in losses.values())] for step in steps]
    return grid(lines)


def main(arguments: Sequence[str] | None = None) -> dict[str, list[float]]:
    """Train in each way, print the losses side by side and return them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--length", type=int, default=64, help="tokens of a row")
    parser.add_argument("--rows", type=int, default=4, help="rows of a micro-batch, of all processes together")
    parser.add_argument("--processes", type=int, default=2)
    given, overrides = parser.parse_known_args(arguments)
    losses: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = folder / "rows.jsonl"
        sources = [text for text, _ in zip(standard_library("train"), range(SOURCES), strict=False)]
        texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in sources), encoding="utf-8")
        shared = ["--dataset_name", str(texts), "--max_length", str(given.length), "--max_steps", str(given.steps)]
        shared += ["--logging_steps", "1", "--report_to", "none", *overrides]
        for way in ways(given.processes):
            status.print(way.name, highlight=False)
            losses[way.name] = run(way, folder, shared, given.rows)
    console.print(table(losses), markup=False, highlight=False)
    return losses


if __name__ == "__main__":
    main()
