"""What share of fine-tuning's memory is activations? By batch and by length, with LoRA and with `balanced`.

Weights as they are stored; adapters with gradients and two moments in fp32; activations that the model's body has saved
at the end of its forward pass. The loss is left out: it costs every method the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from experiments.study import RECORDS
from loract.cli import silence
from loract.cli.common import console, progress_bar
from loract.compare import Ticker, Variant, contend
from loract.cpu import fast_bf16
from loract.footprint import stored_bytes
from loract.frontier import Journal, methods
from loract.memory import MIB, step_bytes
from loract.report.table import grid
from loract.workload import Work, job

NAME = "activation_share"
PER_TRAINED = 12
"""Bytes of a trained weight's gradient and two moments in fp32."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """Rows and tokens of a step of one model."""

    model: str
    batch: int
    length: int


SIZES = (
    *(Size(model="gemma", batch=1, length=length) for length in (128, 512, 2048)),
    *(Size(model="gemma", batch=batch, length=512) for batch in (2, 4, 8)),
    *(Size(model="minilm", batch=batch, length=128) for batch in (1, 8, 64)),
)


def variants() -> tuple[Variant, ...]:
    """LoRA and `balanced`."""
    return methods(["loract balanced"])


def key(size: Size, variant: Variant) -> dict[str, Any]:
    """What identifies a measurement. Bytes are the same on every machine of a kind."""
    return {**vars(size), "method": variant.name}


def measure(work: Work, size: Size, variant: Variant) -> dict[str, Any]:
    """Bytes of the parts."""
    contender = contend(work.model, variant)
    try:
        model, batch = contender.model, work.rows(0, size.batch)
        tensors = [*model.parameters(), *model.buffers(), *tree_leaves(batch)]
        saved, _ = step_bytes(lambda: work.hidden(model, batch), lambda _: None, tensors)
        weights = stored_bytes(model.parameters())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    finally:
        contender.close()
    return {"weight_bytes": weights, "trained_bytes": PER_TRAINED * trained, "saved_bytes": saved}


def table(found: Sequence[dict[str, Any]]) -> str:
    """One line a size, in Markdown."""
    heads = ["model", "rows x tokens", "weights MiB", "gradients, moments", "activations, LoRA", "share"]
    lines = [[*heads, "`balanced`", "share"], ["---", "---", *["---:"] * 6]]
    sizes: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in found:
        name = job(line["model"]).title, f"{line['batch']} x {line['length']}"
        sizes.setdefault(name, []).append(line["values"])
    for name, each in sizes.items():  # LoRA, `balanced`
        parts = [each[0][part] for part in ("weight_bytes", "trained_bytes")]
        cells = [f"{part / MIB:.0f}" for part in parts]
        for saved in (values["saved_bytes"] for values in each):
            cells += [f"{saved / MIB:.0f}", f"{100 * saved / (saved + sum(parts)):.0f} %"]
        lines.append([*name, *cells])
    return grid(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RECORDS, help="folder of the records")
    silence()
    journal = Journal(parser.parse_args(arguments).out / f"{NAME}.jsonl")
    missing = [size for size in SIZES if any(journal.get(key(size, v)) is None for v in variants())]
    with progress_bar() as progress:
        tick = Ticker(progress, len(missing) * 2)
        for size in missing:
            dtype = torch.bfloat16 if size.model == "gemma" else torch.float32
            work: Work = job(size.model).load(length=size.length, train=size.batch, held_out=1, dtype=dtype)
            for variant in variants():
                tick(f"{size.model}, {size.batch} x {size.length}, {variant.name}")
                with fast_bf16():
                    journal.add(key(size, variant), measure(work, size, variant))
    found = [{**key(size, v), "values": journal.get(key(size, v))} for size in SIZES for v in variants()]
    console.print(table(found), markup=False, highlight=False)


if __name__ == "__main__":
    main()
