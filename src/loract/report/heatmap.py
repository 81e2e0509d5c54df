"""Spectra as a figure: sites by layers, as colours."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from loract.atlas import Spectrum
from loract.report.plot import _figure, _save

ANNOTATED = 40
"""Layers up to which numbers fit into the cells."""
OUTSIDE = "-"
"""Label of the column of what lies in no layer."""
_NUMBER = re.compile(r"(?:^|\.)\d+(?:\.|$)")

Row = tuple[str, str]
"""Kind, and name with a star in place of the layer's number."""


def heatmap(spectra: Sequence[Spectrum], path: Path, title: str = "") -> Path:
    """Write a PNG: the energy captured at n / 8 and the suggested rank as a share of n, by site and layer.

    Rows are the sites of a layer in the order in which they are met, columns are layers; grey: the site saves no
    tensor of its own there.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    rows, layers = _grid(spectra)
    places = {(_row(s), s.layer): s for s in spectra}
    figure = _figure(min(30.0, 4.5 + 0.42 * len(layers)), 2 * (1.1 + 0.28 * len(rows)))
    panels: tuple[tuple[str, Callable[[Spectrum], float]], ...] = (
        ("energy captured at rank n/8", lambda s: s.energy_eighth),
        ("suggested rank / n", lambda s: s.suggested_rank / s.features),
    )
    for axes, (name, value) in zip(figure.subplots(2, 1), panels, strict=True):
        cells = [[math.nan if (s := places.get((r, c))) is None else value(s) for c in layers] for r in rows]
        _panel(figure, axes, cells, name)
        axes.set_yticks(range(len(rows)), labels=_labels(rows), fontsize=8)
        every = max(1, len(layers) // ANNOTATED)
        ticks = range(0, len(layers), every)
        axes.set_xticks(ticks, labels=[OUTSIDE if layers[i] is None else str(layers[i]) for i in ticks], fontsize=8)
        axes.set_xlabel("layer")
    figure.suptitle(title, fontsize=10)
    return _save(figure, path)


def _panel(figure: Any, axes: Any, cells: list[list[float]], name: str) -> None:
    from matplotlib import colormaps

    known = [v for line in cells for v in line if not math.isnan(v)]
    # Tenths around the data: from 0 to 1 most models would be of one colour.
    low, high = math.floor(10 * min(known)) / 10, math.ceil(10 * max(known)) / 10
    high = max(high, low + 0.1)
    colours = colormaps["viridis"].with_extremes(bad="lightgrey")
    image = axes.imshow(cells, cmap=colours, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    axes.set_title(name, loc="left", fontsize=10)
    figure.colorbar(image, ax=axes)
    if len(cells[0]) > ANNOTATED:
        return
    for y, line in enumerate(cells):
        for x, value in enumerate(line):
            if not math.isnan(value):
                colour = "black" if (value - low) / (high - low) > 0.6 else "white"
                axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=6, color=colour)


def _grid(spectra: Sequence[Spectrum]) -> tuple[list[Row], list[int | None]]:
    """Rows and columns: layers upwards, then what lies in none.

    The last layers say what a layer holds: in the first, over frozen embeddings, a norm saves nothing.
    """
    layers = sorted({s.layer for s in spectra if s.layer is not None})
    columns: list[int | None] = [*layers, *([None] if any(s.layer is None for s in spectra) else [])]
    order = [*reversed(layers), None]
    rows = dict.fromkeys(_row(s) for layer in order for s in spectra if s.layer == layer)
    return list(rows), columns


def _row(spectrum: Spectrum) -> Row:
    """The site without its layer.

    Two stacks of one model keep rows of their own.
    """
    return spectrum.kind, _NUMBER.sub(
        lambda found: found.group().replace(found.group().strip("."), "*"), spectrum.name, 1
    )


def _labels(rows: Sequence[Row]) -> list[str]:
    """What follows the layer's number, and the kind; the whole name where that is not enough.

    Example:
        >>> _labels([("norm", "model.layers.*.norm"), ("norm", "model.norm")])
        ['norm (norm)', 'model.norm (norm)']
    """
    short = [(kind, name.split("*.", 1)[-1]) for kind, name in rows]
    chosen = [row if short.count(brief) > 1 else brief for row, brief in zip(rows, short, strict=True)]
    return [f"{name} ({kind})" for kind, name in chosen]
