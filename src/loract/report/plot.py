"""Records as one figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loract.errors import MissingExtra
from loract.memory import MIB, Record


def comparison(records: Sequence[Record], path: Path, losses: Mapping[str, Sequence[float]] | None = None) -> Path:
    """Write a PNG: saved bytes against step time, and the loss curves where they are given.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import ScalarFormatter
    except ImportError as missing:
        raise MissingExtra("no matplotlib", "matplotlib for plots", "pip install 'loract[cli]'") from missing
    panels = 2 if losses else 1
    figure = Figure(figsize=(6 * panels, 4), layout="constrained")
    axes: list[Any] = list(figure.subplots(1, panels, squeeze=False)[0])
    plane = axes[0]
    for index, record in enumerate(records):
        x, y = record.saved_bytes / MIB, record.time_ratio
        plane.scatter([x], [y], s=60, color=f"C{index}", label=record.name)
    plane.set_xscale("log", base=2)
    plane.xaxis.set_major_formatter(ScalarFormatter())
    plane.set_xlabel("bytes saved for backward (MiB, log scale)")
    plane.set_ylabel(f"step time relative to {records[0].name}")
    plane.grid(visible=True, alpha=0.3)
    plane.legend()
    for index, (name, curve) in enumerate((losses or {}).items()):
        # Exact methods lie on top of each other: dashes let the ones below show.
        axes[1].plot(range(1, len(curve) + 1), curve, color=f"C{index}", label=name, linestyle=(index, (4, index)))
    if losses:
        axes[1].set_xlabel("step")
        axes[1].set_ylabel("training loss")
        axes[1].grid(visible=True, alpha=0.3)
        axes[1].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path
