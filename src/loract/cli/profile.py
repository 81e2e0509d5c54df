"""`loract profile`: where a step's activation bytes are, without and with a policy."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table

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
    status,
)
from loract.compare import Contender, Variant, body_step, contend
from loract.cpu import fast_bf16
from loract.memory import MIB
from loract.policy import DEFAULT, Site, parse_policy
from loract.saved import SiteStats
from loract.workload import workload


def profile(
    model: Model = GEMMA,
    preset: Preset = DEFAULT,
    rank: Rank = None,
    bits: Bits = None,
    exact: ExactInputs = False,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 2,
    length: Annotated[int, typer.Option(min=8, help="Tokens a sequence.")] = 256,
    dtype: Annotated[str, typer.Option(help="bf16 or fp32.")] = "bf16",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run one step of the decoder body without and with a policy: bytes measured, and bytes by site and layer."""
    policy = parse_policy(preset, rank=rank, bits=bits, exact=exact)
    work = workload(model_folder(model), length=length, train=batch, held_out=1, dtype=parse_dtype(dtype))
    measured: dict[str, dict[str, float]] = {}
    sites: list[SiteStats] = []
    left: list[tuple[str, str, str]] = []
    with fast_bf16():
        upstream = work.upstream(work.model, work.train)
        for variant in (Variant(name="plain"), Variant(name=policy.name, policy=policy)):
            with status.status(f"measuring {variant.name}"):
                contender = contend(work.model, variant)
                body = body_step(contender, work, work.train, upstream)
                seconds = _seconds(contender, lambda c: work.hidden(c.model, work.train).backward(upstream))
            measured[variant.name] = {
                "saved_bytes": body.saved_bytes,
                "peak_bytes": body.peak_bytes,
                "step_seconds": seconds,
            }
            if contender.handle is not None:
                sites, left = contender.handle.stats(), contender.handle.left
            contender.close()
    if as_json:
        console.print_json(json.dumps({"measured": measured, "sites": [asdict(s) for s in sites], "left_exact": left}))
        return
    table = Table("step", "saved MiB", "peak MiB", "seconds", title="measured", title_justify="left")
    for name, values in measured.items():
        saved, peak, seconds = (values[key] for key in ("saved_bytes", "peak_bytes", "step_seconds"))
        table.add_row(name, f"{saved / MIB:.1f}", f"{peak / MIB:.1f}", f"{seconds:.2f}")
    console.print(table)
    console.print(_grouped(sites, "kind of site", lambda s: s.kind))
    console.print(_grouped(sites, "layer", lambda s: Site(kind="norm", name=s.name).layer))
    if left:
        console.print(f"left exact: {len(left)}")
        for name, kind, reason in left:
            console.print(f"  {name} ({kind}): {reason}")


def _seconds(contender: Contender, step: Callable[[Contender], None]) -> float:
    start = time.perf_counter()
    step(contender)
    return time.perf_counter() - start


def _grouped(sites: Sequence[SiteStats], title: str, key: Callable[[SiteStats], Hashable]) -> Table:
    groups: dict[Hashable, list[SiteStats]] = defaultdict(list)
    for site in sites:
        groups[key(site)].append(site)
    table = Table(title, "sites", "coded", "before MiB", "after MiB", "mean error")
    for name, members in groups.items():
        errors = [s.error for s in members if s.error is not None]
        table.add_row(
            "-" if name is None else str(name),
            str(len(members)),
            str(sum(s.coded for s in members)),
            f"{sum(s.bytes_before for s in members) / MIB:.1f}",
            f"{sum(s.bytes_after for s in members) / MIB:.1f}",
            f"{sum(errors) / len(errors):.3f}" if errors else "-",
        )
    return table
