"""How near are estimates? Saved and peak bytes of real steps, loss included, beside those of steps without values.

Real weights and real text where there are any: Gemma-3-270M and MiniLM; a ViT-Ti on digits, Llama- and Qwen3-shaped
decoders on text with random weights. Each under plain LoRA, checkpointing and every preset, in two sizes or dtypes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from loract.cli.common import console, parse_dtype, progress_bar
from loract.codecs import Exact
from loract.compare import Progress, Ticker, Variant, contend, whole_step
from loract.cpu import fast_bf16
from loract.estimate import Base, Ghost, Setup
from loract.frontier import Journal, Settings
from loract.memory import MIB
from loract.policy import PRESETS, preset
from loract.report.table import grid
from loract.shapes import Inputs, Shape, described
from loract.workload import RANK, Work, job

VARIANTS = (
    Variant(name="LoRA"),
    Variant(name="LoRA + checkpointing", checkpointing=1),
    *(Variant(name=f"loract {name}", policy=preset(name)) for name in PRESETS),
    Variant(name="loract layer exact", policy=preset("layer", codec=Exact())),
)
INPUTS: dict[str, Inputs] = {"minilm": "text", "vit": "images"}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, the size of its step and its dtype."""

    model: str
    batch: int
    length: int
    dtype: str

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.model}, {self.dtype}, {self.batch} x {self.length}"

    def key(self, variant: Variant) -> dict[str, Any]:
        """What identifies a measurement."""
        settings = Settings(model=self.model, batch=self.batch, length=self.length, dtype=self.dtype)
        return settings.key(variant, "bytes")


CASES = (
    Case(model="gemma", batch=2, length=256, dtype="bf16"),
    Case(model="gemma", batch=1, length=1024, dtype="bf16"),
    Case(model="minilm", batch=8, length=128, dtype="fp32"),
    Case(model="minilm", batch=4, length=256, dtype="bf16"),
    Case(model="vit", batch=4, length=197, dtype="bf16"),
    Case(model="vit", batch=8, length=197, dtype="fp32"),
    Case(model="llama", batch=2, length=256, dtype="bf16"),
    Case(model="llama", batch=1, length=1024, dtype="fp32"),
    Case(model="qwen", batch=2, length=512, dtype="bf16"),
)


def shape_of(work: Work, name: str) -> Shape:
    """The shape of a model that is there."""
    return described(work.model.get_base_model().config.to_dict(), name, INPUTS.get(name, "tokens"))


def measured(work: Work, batch: Any, variant: Variant) -> tuple[int, int]:
    """Saved and peak bytes of a step that is run."""
    contender = contend(work.model, variant)
    try:
        return whole_step(contender.model, work, batch)
    finally:
        contender.close()


def measure_missing(load: Callable[[Case], Work], cases: Sequence[Case], journal: Journal, progress: Progress) -> None:
    """Measure what the journal lacks. No model is loaded for which nothing is lacking."""
    missing = [(case, variant) for case in cases for variant in VARIANTS if journal.get(case.key(variant)) is None]
    tick = Ticker(progress, len(missing))
    for case in cases:
        variants = [variant for other, variant in missing if other == case]
        if not variants:
            continue
        work = load(case)
        batch = work.rows(0, case.batch)
        base = cast(Base, case.dtype)
        shape = shape_of(work, case.model)
        setup = Setup(shape=shape, batch=case.batch, length=case.length, lora_rank=RANK, base=base, device="cpu")
        ghost = Ghost(setup)
        for variant in variants:
            tick(f"{case.name}: {variant.name}")
            with fast_bf16():
                saved, peak = measured(work, batch, variant)
            found = ghost.measure(variant)
            estimated = {"saved_estimate": found.saved_bytes, "peak_estimate": found.step_bytes}
            journal.add(case.key(variant), {"saved": saved, "peak": peak, **estimated})


def table(cases: Sequence[Case], journal: Journal) -> str:
    """Measured bytes by case, and how far the estimates are off, in Markdown."""
    header = ["", "LoRA saves", "`balanced` saves", "mean error", "worst, saved", "worst, peak"]
    lines = [header, ["---", *["---:"] * 5]]
    every: list[float] = []
    for case in cases:
        found = {v.name: journal.get(case.key(v)) for v in VARIANTS}
        rows = [values for values in found.values() if values is not None]
        saved = [abs(r["saved_estimate"] / r["saved"] - 1) for r in rows]
        peak = [abs(r["peak_estimate"] / r["peak"] - 1) for r in rows]
        every += [*saved, *peak]
        sizes = (found[name] for name in ("LoRA", "loract balanced"))
        mean = sum([*saved, *peak]) / (2 * len(rows))
        cells = (f"{values['saved'] / MIB:.1f} MiB" for values in sizes if values is not None)
        lines.append([case.name, *cells, *(f"{100 * e:.2f} %" for e in (mean, max(saved), max(peak)))])
    lines.append(["all", "", "", f"{100 * sum(every) / len(every):.2f} %", f"{100 * max(every):.2f} %", ""])
    return grid(lines)


def real(case: Case) -> Work:
    """The model of a case with its weights."""
    return job(case.model).load(length=case.length, train=case.batch, held_out=1, dtype=parse_dtype(case.dtype))


def main(
    arguments: Sequence[str] | None = None, load: Callable[[Case], Work] = real, cases: Sequence[Case] = CASES
) -> None:
    """Measure what is missing, print the table and write it beside the records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--models", nargs="+", default=sorted({c.model for c in cases}), help="of the cases")
    parser.add_argument("--out", type=Path, default=Path("results/estimates"), help="folder for the results")
    given = parser.parse_args(arguments)
    chosen = [case for case in cases if case.model in given.models]
    journal = Journal(given.out / "records.jsonl")
    torch.manual_seed(0)
    with progress_bar() as progress:
        measure_missing(load, chosen, journal, progress)
    found = table(chosen, journal)
    (given.out / "table.md").write_text(found, encoding="utf-8")
    console.print(found, markup=False, highlight=False)


if __name__ == "__main__":
    main()
