"""`loract plan`: from a budget to a policy."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from torch import Tensor

from loract.cli.common import GEMMA, Model, console, model_folder, parse_dtype, progress_bar
from loract.compare import Ticker
from loract.cpu import fast_bf16
from loract.errors import InvalidSpec
from loract.memory import MIB
from loract.plan import Choice, Survey, survey
from loract.policyfile import describe, save_policy
from loract.studies import WARM_STEPS, warm
from loract.workload import workload


def plan(
    model: Model = GEMMA,
    saved_mib: Annotated[float | None, typer.Option(help="Least error within so many MiB saved for backward.")] = None,
    target_error: Annotated[float | None, typer.Option(help="Fewest bytes within this error of the gradient.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 2,
    length: Annotated[int, typer.Option(min=8, help="Tokens a sequence.")] = 256,
    dtype: Annotated[str, typer.Option(help="bf16 or fp32; the bytes are those of this dtype.")] = "fp32",
    blocks: Annotated[bool, typer.Option("--blocks", help="Also consider running whole blocks again.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the policy here, as YAML.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure what coding costs, kind by kind and layer by layer, and choose the policy for a budget.

    The step is the decoder body on text of the standard library, as in `loract profile`; the model gets LoRA adapters
    on all linear layers, trained for a few short steps.
    """
    if (saved_mib is None) == (target_error is None):
        got = "neither --saved-mib nor --target-error" if saved_mib is None else "both --saved-mib and --target-error"
        raise InvalidSpec(got, "one of them", "try --target-error 0.05")
    for name, value in (("--saved-mib", saved_mib), ("--target-error", target_error)):
        if value is not None and not value > 0:
            raise InvalidSpec(f"{name} {value:g}", "a positive number", "try --target-error 0.05")
    work = workload(model_folder(model), length=length, train=batch, held_out=1, dtype=parse_dtype(dtype))
    with progress_bar() as progress, fast_bf16():
        warm(work, Ticker(progress, WARM_STEPS))
        upstream = work.upstream(work.model, work.train)

        def step(model: Any, ids: Tensor) -> Tensor:
            """A number with the loss's gradient, that keeps nothing of its own."""
            return torch.sum(work.hidden(model, ids) * upstream)

        found = survey(work.model, work.train, loss=step, blocks=blocks, progress=progress)
    budget = None if saved_mib is None else int(saved_mib * MIB)
    chosen = found.choose(saved_bytes=budget, target_error=target_error)
    if out is not None:
        save_policy(chosen.policy, out, work.model)
    if as_json:
        values = asdict(found) | {"chosen": found.choices.index(chosen)}
        console.print_json(json.dumps(values, default=repr))
        return
    console.print(f"{batch} x {length} tokens, {dtype}; plain autograd saves {found.plain_bytes / MIB:.1f} MiB")
    console.print(_sensitivities(found))
    console.print(_choices(found, chosen))
    rules = Table("kind", "layers", "codec", title=f"chosen: {chosen.policy.name}", title_justify="left")
    for rule in chosen.policy.rules:
        rules.add_row(rule.kind, "all" if rule.layers is None else _range(rule.layers), describe(rule.codec))
    console.print(rules)
    if out is not None:
        console.print(f"written to {out}")


def _sensitivities(found: Survey) -> Table:
    title = "one kind coded in some layers, the rest exact"
    table = Table("kind", "layers", "codec", "MiB less", "relative error", title=title, title_justify="left")
    for item in found.sensitivities:
        layers = "all" if item.layers is None else _range(item.layers)
        less, error = f"{item.bytes_less / MIB:.2f}", f"{item.relative_error:.3g}"
        table.add_row(item.kind, layers, describe(item.codec), less, error)
    return table


def _choices(found: Survey, chosen: Choice) -> Table:
    header = ("", "candidate", "saved MiB", "predicted", "relative error", "predicted", "cosine")
    table = Table(*header, title="candidates", title_justify="left")
    for choice in found.choices:
        table.add_row(
            "*" if choice is chosen else "",
            choice.policy.name,
            f"{choice.saved_bytes / MIB:.2f}",
            "-" if choice.predicted_bytes is None else f"{choice.predicted_bytes / MIB:.2f}",
            f"{choice.relative_error:.3g}",
            "-" if choice.predicted_error is None else f"{choice.predicted_error:.3g}",
            f"{choice.cosine:.5f}",
        )
    return table


def _range(layers: tuple[int, int]) -> str:
    return str(layers[0]) if layers[0] == layers[1] else f"{layers[0]}-{layers[1]}"
