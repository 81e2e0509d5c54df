"""Whether a long run grows: saved and resident memory early and late in hundreds of steps of one process."""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import loract
from loract.cli.common import console, progress_bar
from loract.compare import Ticker
from loract.cpu import fast_bf16
from loract.memory import MIB, restart_peak_rss, saved_bytes
from loract.report.table import grid
from loract.workload import Work, decoder_workload


@dataclass(frozen=True, kw_only=True)
class Moment:
    """What a process holds after a step."""

    step: int
    saved_bytes: int
    """Kept for backward by this step's forward pass."""
    resident_bytes: int
    """Of the whole process after the step, what is freed given back."""
    tensors: int
    """That Python holds."""


def measure(work: Work, policy: str, moments: Sequence[int], batch: int, tick: Ticker) -> list[Moment]:
    """Train with AdamW up to the last of `moments`, and look at each of them."""
    model, found = work.model, list[Moment]()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-4)
    with loract.attach(model, policy), fast_bf16():
        for step in range(1, max(moments) + 1):
            rows, saved = work.rows(step * batch, batch), 0
            if step in moments:
                saved, loss = saved_bytes(lambda rows=rows: work.loss(model, rows), model.parameters())
            else:
                loss = work.loss(model, rows)
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            del loss
            if step in moments:
                gc.collect()
                tensors = sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())
                resident = restart_peak_rss()
                found.append(Moment(step=step, saved_bytes=saved, resident_bytes=resident, tensors=tensors))
            tick(f"step {step}")
    return found


def table(found: Sequence[Moment]) -> str:
    """A row for each moment, and one for the change from the first to the last, in Markdown."""
    lines = [["step", "saved MiB", "resident MiB", "tensors"], ["---:"] * 4]
    for moment in found:
        sizes = (f"{size / MIB:.2f}" for size in (moment.saved_bytes, moment.resident_bytes))
        lines.append([str(moment.step), *sizes, str(moment.tensors)])
    first, last = found[0], found[-1]
    pairs = (
        (first.saved_bytes, last.saved_bytes),
        (first.resident_bytes, last.resident_bytes),
        (first.tensors, last.tensors),
    )
    lines.append(["change", *(f"{100 * (after / before - 1):+.2f} %" for before, after in pairs)])
    return grid(lines)


def main(arguments: Sequence[str] | None = None, work: Work | None = None) -> None:
    """Run, print the table and write it beside the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default="llama", choices=["llama", "qwen"], help="whose shape, with random weights")
    parser.add_argument("--preset", default=loract.policy.DEFAULT, help="what is attached")
    parser.add_argument("--moments", type=int, nargs="+", default=[50, 500], help="steps to look at")
    parser.add_argument("--batch", type=int, default=1, help="sequences of a step")
    parser.add_argument("--length", type=int, default=64, help="tokens of a sequence")
    parser.add_argument("--out", type=Path, default=Path("results/long_run"), help="folder for the results")
    given = parser.parse_args(arguments)
    with progress_bar() as progress:
        tick = Ticker(progress, max(given.moments))
        work = work or decoder_workload(given.model, length=given.length, train=64, held_out=1, dtype=torch.float32)
        found = measure(work, given.preset, given.moments, given.batch, tick)
    given.out.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(asdict(moment)) + "\n" for moment in found)
    (given.out / "records.jsonl").write_text(lines, encoding="utf-8")
    (given.out / "table.md").write_text(table(found), encoding="utf-8")
    console.print(table(found), markup=False, highlight=False)


if __name__ == "__main__":
    main()
