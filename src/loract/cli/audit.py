"""`loract audit`: what a policy does to the gradient."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table

from loract.audit import audit as run_audit
from loract.cli.common import (
    GEMMA,
    Bits,
    ExactInputs,
    Model,
    Preset,
    Rank,
    console,
    model_folder,
    parse_dtype,
    progress_bar,
)
from loract.compare import Ticker
from loract.cpu import fast_bf16
from loract.policy import DEFAULT, parse_policy
from loract.studies import WARM_STEPS, warm
from loract.workload import workload


def audit(
    model: Model = GEMMA,
    preset: Preset = DEFAULT,
    rank: Rank = None,
    bits: Bits = None,
    exact: ExactInputs = False,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 2,
    length: Annotated[int, typer.Option(min=8, help="Tokens a sequence.")] = 256,
    dtype: Annotated[str, typer.Option(help="bf16 or fp32; bf16 adds its own noise.")] = "fp32",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare a policy's gradient with the exact one, overall and by layer, on text of the standard library.

    The model gets LoRA adapters on all linear layers, trained for a few short steps: fresh ones have B = 0 and no
    gradient in A.
    """
    policy = parse_policy(preset, rank=rank, bits=bits, exact=exact)
    work = workload(model_folder(model), length=length, train=batch, held_out=1, dtype=parse_dtype(dtype))
    with progress_bar() as progress, fast_bf16():
        tick = Ticker(progress, WARM_STEPS + 1)
        warm(work, tick)
        tick("the step without and with loract")
        fidelity = run_audit(work.model, work.train, policy, loss=work.loss)
    if as_json:
        console.print_json(json.dumps(asdict(fidelity)))
        return
    console.print(f"{policy.name} on {batch} x {length} tokens, {dtype}: loss {fidelity.loss:.4f}")
    table = Table("layer", "cosine", "relative error")
    for layer, (cosine, error) in fidelity.by_layer.items():
        table.add_row("-" if layer is None else str(layer), f"{cosine:.5f}", f"{error:.3g}")
    table.add_section()
    table.add_row("all", f"{fidelity.cosine:.5f}", f"{fidelity.relative_error:.3g}")
    console.print(table)
