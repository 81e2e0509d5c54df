"""Figures for documents: SVG without a background, in a grey that reads on light and dark pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loract.errors import MissingExtra

INK = "#808080"


def panels(count: int, *, columns: int | None = None, width: float = 4.6, height: float = 3.6) -> tuple[Any, list[Any]]:
    """A figure and so many axes (inches each), beside each other or in rows of `columns`.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise MissingExtra("no matplotlib", "matplotlib for plots", "pip install 'loract[cli]'") from missing
    columns = columns or count
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    every: list[Any] = list(figure.subplots(rows, columns, squeeze=False).flat)
    axes = every[:count]
    for plane in every[count:]:
        plane.remove()
    for plane in axes:
        plane.patch.set_alpha(0)
        plane.tick_params(colors=INK, which="both")
        plane.grid(visible=True, color=INK, alpha=0.25)
        for spine in plane.spines.values():
            spine.set_color(INK)
    return figure, axes


def label(plane: Any, x: str, y: str, title: str, *, legend: bool = True) -> None:
    """Names of the axes, a title, and a legend of what is drawn."""
    for put, text in ((plane.set_xlabel, x), (plane.set_ylabel, y), (plane.set_title, title)):
        put(text, color=INK, fontsize=10)
    if legend:
        plane.legend(fontsize=8, frameon=False, labelcolor=INK)


def save(figure: Any, path: Path) -> Path:
    """Write the SVG, the same for the same figure, and return its path."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": path.stem, "svg.fonttype": "none"}):
        figure.savefig(path, format="svg", transparent=True, metadata={"Date": None})
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")
    return path
