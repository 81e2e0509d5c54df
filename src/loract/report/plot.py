"""Records as figures."""

from __future__ import annotations

import math
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
    panels = 2 if losses else 1
    figure = _figure(6 * panels, 4)
    axes: list[Any] = list(figure.subplots(1, panels, squeeze=False)[0])
    plane = axes[0]
    for index, record in enumerate(records):
        x, y = record.saved_bytes / MIB, record.time_ratio
        plane.scatter([x], [y], s=60, color=f"C{index}", label=record.name)
    plane.set_xscale("log", base=2)
    plane.xaxis.set_major_formatter(_plain_numbers())
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
    return _save(figure, path)


LEAST_ERROR = 1e-8
"""Where a gradient without any error is drawn: a logarithm has no zero."""


def frontier(records: Sequence[Record], path: Path, title: str, floor: float | None = None) -> Path:
    """Write a PNG: saved bytes (share of the first record's) against the gradient's relative error; colour is time.

    `floor` is the error that the model's own dtype makes, drawn as a line.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    figure = _figure(11, 6)
    plane: Any = figure.subplots()
    share = [100 * r.saved_bytes / records[0].saved_bytes for r in records]
    error = [max(LEAST_ERROR, r.relative_error or 0.0) for r in records]
    time = [r.time_ratio for r in records]
    dots: Any = None
    low, high = min(0.9, *time), max(1.5, *time)  # two runs with like times get like colours
    for mark, (name, ours) in {"o": ("other methods", False), "D": ("loract", True)}.items():
        chosen = [i for i, r in enumerate(records) if r.name.startswith("loract") is ours]
        dots = plane.scatter(
            [share[i] for i in chosen],
            [error[i] for i in chosen],
            c=[time[i] for i in chosen],
            marker=mark,
            s=80,
            cmap="viridis_r",
            vmin=low,
            vmax=high,
            edgecolors="black",
            linewidths=0.5,
            label=name,
            zorder=3,
        )
    for group in _groups([*zip(share, error, strict=True)]):
        top = max(group, key=lambda i: error[i])
        plane.annotate(
            " ".join(str(i + 1) for i in group),
            (share[top], error[top]),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            zorder=4,
        )
    plane.set_xscale("log")
    plane.set_yscale("log")
    plane.xaxis.set_major_formatter(_plain_numbers())
    plane.set_ylim(LEAST_ERROR / 3, max(2.0, 2 * max(error)))
    plane.set_xlabel(f"bytes saved for backward (% of {records[0].name}'s, log scale)")
    plane.set_ylabel(f"relative error of the gradient (log scale; none is drawn at {LEAST_ERROR:.0e})")
    plane.set_title(title, loc="left")
    plane.grid(visible=True, alpha=0.3)
    if floor:
        plane.axhline(floor, color="black", linestyle="dashed", linewidth=1, label="LoRA in the model's own dtype")
    plane.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3, fontsize=8, frameon=False)
    figure.colorbar(dots, ax=plane, label=f"step time relative to {records[0].name}")
    names = "\n".join(f"{i + 1}  {r.name}" for i, r in enumerate(records))
    figure.text(1.01, 0.5, names, va="center", ha="left", fontsize=9)
    return _save(figure, path)


def _groups(points: Sequence[tuple[float, float]]) -> list[list[int]]:
    """Points that lie so close that they share a label, each group from left to right.

    Example:
        >>> _groups([(100.0, 1e-8), (6.1, 0.1), (6.0, 0.1)])
        [[2, 1], [0]]
    """
    found: list[list[int]] = []
    for index in sorted(range(len(points)), key=lambda i: points[i]):
        x, y = points[index]
        for group in found:
            u, v = points[group[-1]]
            if abs(math.log(x / u)) < 0.08 and abs(math.log(y / v)) < 0.8:
                group.append(index)
                break
        else:
            found.append([index])
    return found


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise MissingExtra("no matplotlib", "matplotlib for plots", "pip install 'loract[cli]'") from missing
    return Figure(figsize=(width, height), layout="constrained")


def _plain_numbers() -> Any:
    from matplotlib.ticker import ScalarFormatter

    return ScalarFormatter()


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    return path
