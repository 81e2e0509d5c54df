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

from loract.budget import candidates, first_that_fits, left
from loract.cli.common import GEMMA, Model, console, model_folder, parse_dtype, progress_bar
from loract.compare import Ticker, Variant
from loract.cpu import fast_bf16
from loract.errors import InvalidSpec
from loract.estimate import GIB, Depths, Setup
from loract.memory import MIB, parse_bytes
from loract.policy import Policy
from loract.policyfile import describe, save_policy
from loract.shapes import SHAPES, architecture, shape
from loract.studies import WARM_STEPS, warm
from loract.survey import Choice, Survey, survey
from loract.workload import workload


def plan(
    model: Model = GEMMA,
    saved_mib: Annotated[float | None, typer.Option(help="Least error within so many MiB saved for backward.")] = None,
    memory_budget: Annotated[str | None, typer.Option(help="Least error within this memory, for example 8GiB.")] = None,
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
    on all linear layers, trained for a few short steps. A memory budget is for everything: weights, adapters, AdamW's
    state, and a whole step, the loss included. For a shape or a config.json (see `loract estimate`) it is estimated.
    """
    given = {"--saved-mib": saved_mib, "--memory-budget": memory_budget, "--target-error": target_error}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        got = f"both {' and '.join(named)}" if named else f"neither {' nor '.join(given)}"
        raise InvalidSpec(got, "one of them", "try --target-error 0.05")
    for name, value in (("--saved-mib", saved_mib), ("--target-error", target_error)):
        if value is not None and not value > 0:
            raise InvalidSpec(f"{name} {value:g}", "a positive number", "try --target-error 0.05")
    total = None if memory_budget is None else parse_bytes(memory_budget)
    if model.lower() in SHAPES or model.endswith(".json"):
        if total is None:
            raise InvalidSpec(f"{named[0]} for a shape", "--memory-budget", "the others are measured: name a folder")
        _estimated(Setup(shape=shape(model), batch=batch, length=length), total, out, as_json)
        return
    work = workload(model_folder(model), length=length, train=batch, held_out=1, dtype=parse_dtype(dtype))
    with progress_bar() as progress, fast_bf16():
        warm(work, Ticker(progress, WARM_STEPS))
        upstream = work.upstream(work.model, work.train)

        def step(model: Any, ids: Tensor) -> Tensor:
            """A number with the loss's gradient, that keeps nothing of its own."""
            return torch.sum(work.hidden(model, ids) * upstream)

        loss = step if total is None else work.loss
        blocks = blocks or total is not None
        found = survey(work.model, work.train, loss=loss, blocks=blocks, progress=progress)
    saved = None if saved_mib is None else int(saved_mib * MIB)
    peak = None if total is None else left(total, work.model)
    chosen = found.choose(saved_bytes=saved, peak_bytes=peak, target_error=target_error)
    if out is not None:
        save_policy(chosen.policy, out, work.model)
    if as_json:
        values = asdict(found) | {"chosen": found.choices.index(chosen)}
        console.print_json(json.dumps(values, default=repr))
        return
    console.print(f"{batch} x {length} tokens, {dtype}; plain autograd saves {found.plain_bytes / MIB:.1f} MiB")
    console.print(_sensitivities(found))
    console.print(_choices(found, chosen))
    console.print(_rules(chosen.policy))
    if out is not None:
        console.print(f"written to {out}")


def _estimated(setup: Setup, budget: int, out: Path | None, as_json: bool) -> None:
    """The first policy whose estimated peak is within the budget."""
    policies = candidates(int(architecture(setup.shape).num_hidden_layers))
    with progress_bar() as progress:
        tick, depths = Ticker(progress, len(policies) + 1), Depths(setup)

        def peak(policy: Policy) -> int:
            tick(f"estimating {policy.name}")
            return depths.measure(Variant(name=policy.name, policy=policy)).peak_bytes

        chosen, seen = first_that_fits(policies, peak, budget)
    if out is not None:
        save_policy(chosen, out)
    if as_json:
        fits = [{"policy": fit.policy.name, "peak_bytes": fit.peak_bytes} for fit in seen]
        console.print_json(json.dumps({"budget": budget, "chosen": chosen.name, "estimates": fits}))
        return
    title = f"{setup.shape.name}, LoRA r = {setup.lora_rank}, {setup.batch} x {setup.length} tokens, estimated"
    table = Table("", "policy, by what it loses", "peak GiB", title=title, title_justify="left")
    for fit in seen:
        table.add_row("*" if fit.policy is chosen else "", fit.policy.name, f"{fit.peak_bytes / GIB:.2f}")
    console.print(table)
    console.print(_rules(chosen))
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
    header = ("", "candidate", "saved MiB", "predicted", "peak MiB", "relative error", "predicted", "cosine")
    table = Table(*header, title="candidates", title_justify="left")
    for choice in found.choices:
        table.add_row(
            "*" if choice is chosen else "",
            choice.policy.name,
            f"{choice.saved_bytes / MIB:.2f}",
            "-" if choice.predicted_bytes is None else f"{choice.predicted_bytes / MIB:.2f}",
            f"{choice.peak_bytes / MIB:.1f}",
            f"{choice.relative_error:.3g}",
            "-" if choice.predicted_error is None else f"{choice.predicted_error:.3g}",
            f"{choice.cosine:.5f}",
        )
    return table


def _rules(policy: Policy) -> Table:
    table = Table("kind", "layers", "codec", title=f"chosen: {policy.name}", title_justify="left")
    for rule in policy.rules:
        table.add_row(rule.kind, "all" if rule.layers is None else _range(rule.layers), describe(rule.codec))
    return table


def _range(layers: tuple[int, int]) -> str:
    return str(layers[0]) if layers[0] == layers[1] else f"{layers[0]}-{layers[1]}"
