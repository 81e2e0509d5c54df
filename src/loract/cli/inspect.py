"""`loract inspect`: the rank atlas of a model on text."""

from __future__ import annotations

import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from loract.atlas import TARGET, Spectrum, atlas, check_target
from loract.cli.common import GEMMA, Model, Out, console, model_folder, parse_dtype, progress_bar
from loract.cpu import fast_bf16
from loract.report.heatmap import heatmap
from loract.workload import workload


def inspect(
    model: Model = GEMMA,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 2,
    length: Annotated[int, typer.Option(min=8, help="Tokens a sequence.")] = 256,
    dtype: Annotated[str, typer.Option(help="bf16 or fp32.")] = "bf16",
    target: Annotated[float, typer.Option(help="Relative error that rank, bits and codecs are to hold.")] = TARGET,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    out: Out = Path("results/inspect"),
) -> None:
    """Measure the spectrum of every tensor that the sites save, on text of the standard library.

    Prints stable ranks, captured energies, and the rank, the bits and the codec that hold the target, by kind and by
    layer. Writes each tensor's figures (atlas.jsonl, one JSON object a line) and a picture (heatmap.png).
    """
    check_target(target)
    work = workload(model_folder(model), length=length, train=batch, held_out=1, dtype=parse_dtype(dtype))
    with progress_bar() as progress, fast_bf16():
        found = atlas(work.model, lambda: work.hidden(work.model, work.train), target=target, progress=progress)
    title = f"{model}, {batch} x {length} tokens, {dtype}, relative error {target:g}"
    out.mkdir(parents=True, exist_ok=True)
    lines, picture = out / "atlas.jsonl", out / "heatmap.png"
    lines.write_text("".join(json.dumps(asdict(s)) + "\n" for s in found), encoding="utf-8")
    heatmap(found, picture, title)
    if as_json:
        console.print_json(json.dumps([asdict(s) for s in found]))
        return
    console.print(f"{title}: {len(found)} tensors")
    console.print(_grouped(found, "kind of site", lambda s: s.kind))
    console.print(_grouped(sorted(found, key=_by_layer), "layer", lambda s: s.layer))
    console.print(f"{lines}, {picture}", highlight=False)


def _by_layer(spectrum: Spectrum) -> tuple[bool, int]:
    return spectrum.layer is None, spectrum.layer or 0


def _grouped(spectra: Sequence[Spectrum], title: str, key: Callable[[Spectrum], Hashable]) -> Table:
    groups: dict[Hashable, list[Spectrum]] = defaultdict(list)
    for spectrum in spectra:
        groups[key(spectrum)].append(spectrum)
    table = Table(title)
    for name in ("tensors", "stable\nrank", "energy\nat n/8", "error\nat n/8", "rank\n/ n", "bits"):
        table.add_column(name, justify="right")
    table.add_column("cheapest")
    for name in ("outlier\nchannels", "outlier\ntokens"):
        table.add_column(name, justify="right")
    for name, members in groups.items():
        table.add_row(
            "-" if name is None else str(name),
            str(len(members)),
            f"{statistics.fmean(s.stable_rank for s in members):.1f}",
            f"{statistics.fmean(s.energy_eighth for s in members):.3f}",
            f"{statistics.fmean(s.error_eighth for s in members):.3f}",
            f"{statistics.fmean(s.suggested_rank / s.features for s in members):.3f}",
            _bits(members),
            ", ".join(
                f"{codec} {count}" for codec, count in Counter(s.cheapest or "none" for s in members).most_common()
            ),
            str(sum(s.outlier_channels for s in members)),
            str(sum(s.outlier_tokens for s in members)),
        )
    return table


def _bits(spectra: Sequence[Spectrum]) -> str:
    """The range of the suggested bits."""
    known = [s.suggested_bits for s in spectra if s.suggested_bits is not None]
    least = str(min(known)) if known else ">8"
    most = str(max(known)) if len(known) == len(spectra) else ">8"
    return least if least == most else f"{least} to {most}"
