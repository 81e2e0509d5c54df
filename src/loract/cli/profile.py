"""`loract profile`: where a training step's memory goes, without and with a policy."""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

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
from loract.compare import Variant, contend
from loract.cpu import fast_bf16
from loract.errors import LoractError
from loract.memory import MIB
from loract.policy import DEFAULT, Site, parse_policy
from loract.report import timeline
from loract.saved import SiteStats
from loract.timeline import Profile, profile_step
from loract.workload import workload

PLAIN = "plain"
COUNTS = ("seconds", "sites", "coded", "mean error", "count")


def profile(
    model: Model = GEMMA,
    preset: Preset = DEFAULT,
    rank: Rank = None,
    bits: Bits = None,
    exact: ExactInputs = False,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 2,
    length: Annotated[int, typer.Option(min=8, help="Tokens a sequence.")] = 256,
    dtype: Annotated[str, typer.Option(help="bf16 or fp32.")] = "bf16",
    modules: Annotated[int, typer.Option(min=1, help="How many modules to list.")] = 15,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for profile.jsonl and the timeline.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run one training step without and with a policy: bytes by phase, at the peak, and kept for backward.

    The step is forward, chunked loss, backward and AdamW, with LoRA adapters on all linear layers, on text of the
    standard library. With --out, `loract report` draws the step's memory over time.
    """
    policy = parse_policy(preset, rank=rank, bits=bits, exact=exact)
    if out is not None:
        _make(out)
    work = workload(model_folder(model), length=length, train=batch, held_out=1, dtype=parse_dtype(dtype))
    found: dict[str, Profile] = {}
    seconds: dict[str, float] = {}
    sites: list[SiteStats] = []
    left: list[tuple[str, str, str]] = []
    with fast_bf16():
        for variant in (Variant(name=PLAIN), Variant(name=policy.name, policy=policy)):
            contender = contend(work.model, variant)
            twin: Any = contender.model
            try:
                with status.status(f"measuring {variant.name}"):
                    found[variant.name] = profile_step(
                        twin,
                        lambda twin=twin: work.hidden(twin, work.train),
                        lambda hidden: work.head_loss(hidden, work.train),
                        inputs=[work.train],
                    )
                    seconds[variant.name] = _seconds(lambda twin=twin: work.loss(twin, work.train).backward())
                if contender.handle is not None:
                    sites, left = contender.handle.stats(), contender.handle.left
            finally:
                contender.close()
    measured = {name: {"step_seconds": seconds[name], **asdict(step)} for name, step in found.items()}
    if out is not None:
        _write(out, found, measured)
    if as_json:
        console.print_json(json.dumps({"measured": measured, "sites": [asdict(s) for s in sites], "left_exact": left}))
        return
    console.print(_steps(found, seconds))
    console.print(_phases(found))
    console.print(_components(found))
    for name, step in found.items():
        console.print(_contributors(name, step))
    console.print(_sites(sites))
    saved = {name: step.saved_by_module for name, step in found.items()}
    console.print(_layers(saved))
    console.print(_modules(saved, modules))
    if left:
        console.print(f"left exact: {len(left)}")
        for name, kind, reason in left:
            console.print(f"  {name} ({kind}): {reason}")
    if out is not None:
        console.print(f"written to {out}", highlight=False, markup=False, soft_wrap=True)


def _seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _make(folder: Path) -> None:
    """Before the step rather than after it: it takes minutes."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LoractError(f"--out {str(folder)!r} ({error.strerror})", "a folder to write to", "name another") from None


def _write(folder: Path, found: Mapping[str, Profile], measured: Mapping[str, dict[str, Any]]) -> None:
    """A step a line; the timeline of the step with the policy, as the report's page reads it; both as a figure."""
    lines = [{"name": name, **values} for name, values in measured.items()]
    moments = [asdict(moment) for moment in list(found.values())[-1].timeline]
    for name, rows in (("profile.jsonl", lines), ("timeline.jsonl", moments)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    timeline(found, folder / "timeline.png")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, justify="right" if name.endswith("MiB") or name in COUNTS else "left")
    return table


def _mib(size: float | None) -> str:
    return "-" if size is None else f"{size / MIB:.1f}"


def _steps(found: Mapping[str, Profile], seconds: Mapping[str, float]) -> Table:
    table = _table("measured", "step", "saved MiB", "peak MiB", "peak in", "seconds")
    for name, step in found.items():
        table.add_row(name, _mib(step.saved_bytes), _mib(step.peak_bytes), step.peak_phase, f"{seconds[name]:.2f}")
    return table


def _phases(found: Mapping[str, Profile]) -> Table:
    cuda = any(p.allocator_peak_bytes is not None for step in found.values() for p in step.phases)
    columns = ("step", "phase", "start MiB", "end MiB", "peak MiB", *(["allocator's peak MiB"] if cuda else []))
    table = _table("bytes alive by phase (* the peak of the step)", *columns)
    for name, step in found.items():
        for index, phase in enumerate(step.phases):
            mark = " *" if phase.name == step.peak_phase else ""
            sizes = map(_mib, (phase.start_bytes, phase.end_bytes))
            row = [name if index == 0 else "", phase.name, *sizes, _mib(phase.peak_bytes) + mark]
            table.add_row(*row, *([_mib(phase.allocator_peak_bytes)] if cuda else []))
        table.add_section()
    return table


def _components(found: Mapping[str, Profile]) -> Table:
    table = _table("alive at the peak", "component", *(f"{name} MiB" for name in found))
    for component in next(iter(found.values())).components:
        table.add_row(component, *(_mib(step.components[component]) for step in found.values()))
    table.add_section()
    table.add_row("all", *(_mib(step.peak_bytes) for step in found.values()))
    return table


def _contributors(name: str, step: Profile) -> Table:
    table = _table(f"{name}: largest at the peak", "MiB", "what", "module", "operator", "shape", "count")
    for found in step.contributors:
        shape = f"{' x '.join(map(str, found.shape)) or 'scalar'}, {found.dtype}"
        row = (found.component, found.module, found.operator, shape, str(found.count))
        table.add_row(_mib(found.bytes), *row)
    return table


def _sites(sites: Sequence[SiteStats]) -> Table:
    groups: dict[str, list[SiteStats]] = defaultdict(list)
    for site in sites:
        groups[site.kind].append(site)
    columns = ("kind of site", "sites", "coded", "before MiB", "after MiB", "mean error")
    table = _table("kept at loract's sites", *columns)
    for kind, members in groups.items():
        errors = [s.error for s in members if s.error is not None]
        table.add_row(
            kind,
            str(len(members)),
            str(sum(s.coded for s in members)),
            _mib(sum(s.bytes_before for s in members)),
            _mib(sum(s.bytes_after for s in members)),
            f"{sum(errors) / len(errors):.3f}" if errors else "-",
        )
    return table


def _layers(saved: Mapping[str, Mapping[str, int]]) -> Table:
    sums = {name: Counter[int | None]() for name in saved}
    for name, by_module in saved.items():
        for module, size in by_module.items():
            sums[name][Site(kind="other", name=module).layer] += size
    layers = sorted({layer for found in sums.values() for layer in found}, key=lambda n: (n is None, n or 0))
    return _compared("saved by layer", "layer", layers, sums)


def _modules(saved: Mapping[str, Mapping[str, int]], most: int) -> Table:
    largest = Counter[str]()
    for by_module in saved.values():
        for module, size in by_module.items():
            largest[module] = max(largest[module], size)
    chosen = [module for module, _ in largest.most_common(most)]
    rest = {name: sum(size for m, size in found.items() if m not in chosen) for name, found in saved.items()}
    others = f"{len(largest) - len(chosen)} others"
    shown = {name: {**found, others: rest[name]} for name, found in saved.items()}
    names = [*chosen, *([others] if len(largest) > len(chosen) else [])]
    return _compared("saved by module", "module that made it", names, shown)


def _compared(title: str, what: str, names: Sequence[Hashable], saved: Mapping[str, Mapping[Any, int]]) -> Table:
    table = _table(title, what, *(f"{name} MiB" for name in saved))
    for row in names:
        table.add_row("-" if row is None else str(row), *(_mib(found.get(row, 0)) for found in saved.values()))
    return table
