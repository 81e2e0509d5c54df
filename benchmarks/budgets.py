"""Does a plan keep its budget, and does it use it? Ten budgets between `smallest` and plain LoRA, each step measured.

One survey of the model answers all ten. Each policy that it names is then attached to a fresh copy of the model, and
the peak of a whole step, loss and gradients included, is measured once more. A budget is well used where that peak is
above 85 % of it, or where the policy loses nothing already.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from loract.cli.common import console, parse_dtype, progress_bar
from loract.compare import Progress, Ticker, Variant, contend, whole_step
from loract.cpu import fast_bf16
from loract.memory import MIB
from loract.policy import Policy, preset
from loract.report.table import grid
from loract.studies import WARM_STEPS, warm
from loract.survey import Choice, survey
from loract.workload import Work, job

USED = 0.85
"""Least share of a budget that a policy with a loss is to take."""

Load = Callable[[argparse.Namespace], Work]


def step_peak(work: Work, batch: Any, policy: Policy | None) -> int:
    """Peak bytes of a whole step of a copy of the model, under plain LoRA without a policy."""
    contender = contend(work.model, Variant(name="LoRA" if policy is None else policy.name, policy=policy))
    try:
        return whole_step(contender.model, work, batch)[1]
    finally:
        contender.close()


def between(least: int, most: int, count: int) -> list[int]:
    """`count` sizes in equal ratios, the first `least` and the last `most`."""
    ratio = (most / least) ** (1 / (count - 1))
    return [least, *(round(least * ratio**i) for i in range(1, count - 1)), most]


def measure(work: Work, size: int, count: int, progress: Progress) -> list[dict[str, Any]]:
    """A row for each budget."""
    warm(work, Ticker(progress, WARM_STEPS))
    batch = work.rows(0, size)
    found = survey(work.model, batch, loss=work.loss, blocks=True, progress=progress)
    tick = Ticker(progress, count + 2)
    tick("peaks of LoRA and of smallest")
    plain, least = (step_peak(work, batch, policy) for policy in (None, preset("smallest")))
    rows: list[dict[str, Any]] = []
    for budget in between(least, plain, count):
        choice = found.choose(peak_bytes=budget)
        tick(f"{budget / MIB:.0f} MiB: {choice.policy.name}")
        rows.append(_row(budget, choice, step_peak(work, batch, choice.policy)))
    return rows


def _row(budget: int, choice: Choice, peak: int) -> dict[str, Any]:
    lossless = choice.policy.lossless
    return {
        "budget": budget,
        "policy": choice.policy.name,
        "lossless": lossless,
        "planned_peak": choice.peak_bytes,
        "peak": peak,
        "relative_error": choice.relative_error,
        "kept": peak <= budget,
        "used": lossless or peak >= USED * budget,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """In Markdown."""
    lines = [["budget MiB", "policy", "peak MiB", "of the budget", "relative error", "kept", "used"]]
    lines.append(["---:", "---", "---:", "---:", "---:", "---", "---"])
    for row in rows:
        error = "0" if row["lossless"] else f"{row['relative_error']:.3g}"
        sizes = [f"{row['budget'] / MIB:.1f}", row["policy"], f"{row['peak'] / MIB:.1f}"]
        said = ["yes" if row[name] else "NO" for name in ("kept", "used")]
        lines.append([*sizes, f"{100 * row['peak'] / row['budget']:.0f} %", error, *said])
    return grid(lines)


def real(given: argparse.Namespace) -> Work:
    """A model with its weights."""
    return job(given.model).load(length=given.length, train=given.batch, held_out=1, dtype=parse_dtype(given.dtype))


def main(arguments: Sequence[str] | None = None, load: Load = real) -> None:
    """Measure, print the table and write it beside the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default="gemma", help="one of the models of `loract bench frontier`")
    parser.add_argument("--batch", type=int, default=1, help="rows of a step")
    parser.add_argument("--length", type=int, default=512, help="tokens a row")
    parser.add_argument("--dtype", default="fp32", help="of the base model: bf16 or fp32")
    parser.add_argument("--budgets", type=int, default=10, help="how many, in equal ratios")
    parser.add_argument("--out", type=Path, default=Path("results/budgets"), help="folder for the results")
    given = parser.parse_args(arguments)
    torch.manual_seed(0)
    with progress_bar() as progress, fast_bf16():
        rows = measure(load(given), given.batch, given.budgets, progress)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = table(rows)
    (given.out / "table.md").write_text(found, encoding="utf-8")
    console.print(found, markup=False, highlight=False)


if __name__ == "__main__":
    main()
