"""Figures as SVG elements to stand inside a page: no background, the page's fonts, and its colours through CSS.

matplotlib draws in stand-in colours, which become `currentColor` and the custom properties `--line` and `--c0` to
`--c7`, so that one drawing is legible on a light page and on a dark one. The same data give the same text.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from xml.etree import ElementTree

from loract.errors import MissingExtra
from loract.report.plot import LEAST_ERROR, _figure, _groups

Point = tuple[float, float]

WIDTH, HEIGHT = 6.0, 3.4
"""Inches of 72 units: narrow enough that the letters can be read on a phone."""
FONT_SIZE = 11
COLOURS = 8
INK, FAINT = "#010101", "#020202"
SERIES = tuple(f"#03030{i}" for i in range(COLOURS))
_CSS = {INK: "currentColor", FAINT: "var(--line)", **{colour: f"var(--c{i})" for i, colour in enumerate(SERIES)}}
DASHES = ((), (6, 2), (2, 2), (6, 2, 2, 2))
"""Lines differ in more than their colour."""
MARKERS = "os^Dv"
MOST_POINTS = 600
"""A curve of more is thinned: the page has fewer pixels, and must stay small."""
FEW_POINTS = 40
"""Up to so many points are marked on the line."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A line through points (x, y) in ascending order of x."""

    name: str
    points: Sequence[Point]
    look: int = 0
    """Number of its colour, dash and marker."""
    faint: bool = False
    """Behind another one that says more."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """A stretch of the x axis, in the colour of `group`."""

    start: float
    end: float
    group: int


def curves(
    lines: Sequence[Curve],
    *,
    name: str,
    label: str,
    x: str,
    y: str,
    log: bool = False,
    bound: float | None = None,
    steps: bool = False,
    spans: Sequence[Span] = (),
) -> str:
    """Curves over a common axis, with a bound as a dashed line.

    `name` makes identifiers unique in the page, `label` is what a screen reader says. `log` takes a logarithmic axis
    where values differ by a factor of ten; `steps` holds each value until the next one.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    with _style(name):
        figure = _figure(WIDTH, HEIGHT)
        axes: Any = figure.subplots()
        for span in spans:
            axes.axvspan(span.start, span.end, color=SERIES[span.group % COLOURS], alpha=0.14, linewidth=0)
        for curve in lines:
            points = thinned([p for p in curve.points if p[1] > 0 or not log])
            axes.plot(
                [p[0] for p in points],
                [p[1] for p in points],
                color=SERIES[curve.look % COLOURS],
                alpha=0.35 if curve.faint else None,
                linestyle=_dash(curve.look),
                linewidth=0.8 if curve.faint else 1.6,
                marker=MARKERS[curve.look % len(MARKERS)] if len(points) <= FEW_POINTS else None,
                markersize=4,
                drawstyle="steps-post" if steps else "default",
            )
        if bound is not None and (bound > 0 or not log):
            axes.axhline(bound, color=INK, linestyle="dashed", linewidth=1)
        low, high = axes.yaxis.get_data_interval()
        if log and high >= 10 * low > 0:
            _log(axes, "y")
        else:
            axes.yaxis.set_major_formatter(_plain)
        _whole(axes, [p[0] for curve in lines for p in curve.points])
        return _drawn(figure, axes, name, label, x, y)


def plane(
    points: Sequence[Point],
    numbers: Sequence[str],
    ours: Sequence[bool],
    *,
    name: str,
    label: str,
    x: str,
    y: str,
    floor: float | None,
) -> str:
    """Numbered points, on two logarithmic axes; y = 0 is drawn at 1e-8. `floor` is a dashed line.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    with _style(name):
        figure = _figure(WIDTH, HEIGHT)
        axes: Any = figure.subplots()
        placed = [(a, max(LEAST_ERROR, b)) for a, b in points]
        for index, mine in enumerate((True, False)):
            chosen = [p for p, own in zip(placed, ours, strict=True) if own is mine]
            if chosen:
                xs, ys = zip(*chosen, strict=True)
                axes.scatter(xs, ys, s=36, color=SERIES[index], marker=MARKERS[index], zorder=3)
        for group in _groups(placed):
            top = max(group, key=lambda i: placed[i][1])
            text = " ".join(numbers[i] for i in group)
            axes.annotate(text, placed[top], xytext=(0, 6), textcoords="offset points", ha="center", color=INK)
        if floor is not None and floor > 0:
            axes.axhline(floor, color=INK, linestyle="dashed", linewidth=1)
        _log(axes, "x")
        _log(axes, "y")
        axes.margins(y=0.12)
        return _drawn(figure, axes, name, label, x, y)


def key(index: int, *, mark: str = "line") -> str:
    """The sign of a series for a legend in HTML: a `line`, a `dot`, a `span`, or the `bound`.

    Example:
        >>> key(1, mark="dot")
        '<svg class="key" viewBox="0 0 24 10" aria-hidden="true"><path d="M8 1h8v8h-8z" style="fill:var(--c1)"/></svg>'
    """
    colour = f"var(--c{index % COLOURS})"
    dash = ",".join(str(d) for d in DASHES[index % len(DASHES)])
    shapes = {
        "line": f'<path d="M0 5h24" style="stroke:{colour};stroke-width:2.5'
        + (f";stroke-dasharray:{dash}" * bool(dash)),
        "bound": '<path d="M0 5h24" style="stroke:currentColor;stroke-width:1.5;stroke-dasharray:5,3',
        "span": f'<path d="M2 0h20v10h-20z" style="fill:{colour};fill-opacity:.3',
        "dot": f'<path d="{_DOTS[index % len(_DOTS)]}" style="fill:{colour}',
    }
    return f'<svg class="key" viewBox="0 0 24 10" aria-hidden="true">{shapes[mark]}"/></svg>'


_DOTS = (
    "M12 1a4 4 0 1 1 0 8a4 4 0 1 1 0-8z",
    "M8 1h8v8h-8z",
    "M12 0.5l4.5 9h-9z",
    "M12 0l5 5l-5 5l-5-5z",
    "M12 9.5l4.5-9h-9z",
)
"""`MARKERS` as paths."""


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most `most` points: of each stretch the lowest and the highest, so that no peak is lost.

    Example:
        >>> thinned([(i, i % 10) for i in range(100)], 4)
        [(0, 0), (9, 9), (50, 0), (59, 9)]
    """
    if len(points) <= most:
        return list(points)
    stretches = max(1, most // 2)
    kept: list[Point] = []
    for part in range(stretches):
        chunk = points[part * len(points) // stretches : (part + 1) * len(points) // stretches]
        ends = {min(chunk, key=lambda p: p[1]), max(chunk, key=lambda p: p[1])}
        kept += sorted(ends)
    return kept


def smoothed(curve: Curve, window: int) -> Curve:
    """The mean of each point and its neighbours, as many on either side; of `window` points, and of fewer at the ends.

    Example:
        >>> smoothed(Curve(name="loss", points=[(1, 4.0), (2, 2.0), (3, 6.0)]), 3).points
        [(1, 4.0), (2, 4.0), (3, 6.0)]
    """
    values = [y for _, y in curve.points]
    sides = [min(window // 2, i, len(values) - 1 - i) for i in range(len(values))]
    means = [math.fsum(values[i - side : i + side + 1]) / (2 * side + 1) for i, side in enumerate(sides)]
    return replace(curve, points=[(x, mean) for (x, _), mean in zip(curve.points, means)])


def _dash(index: int) -> Any:
    dash = DASHES[index % len(DASHES)]
    return (0, dash) if dash else "solid"


def _plain(value: float, _: object) -> str:
    return f"{value:g}"


def _log(axes: Any, which: str) -> None:
    """A logarithmic axis with few and plain numbers: the usual ones are in mathematical notation."""
    from matplotlib.ticker import LogLocator, NullLocator

    getattr(axes, f"set_{which}scale")("log")
    axis: Any = getattr(axes, f"{which}axis")
    low, high = axis.get_data_interval()
    decades = math.log10(high / low) if 0 < low < high else 0.0
    if decades < 0.3:  # not even a 1, 2 or 5 may lie in between
        getattr(axes, f"set_{which}lim")(low / 1.5, high * 1.5)
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,), numticks=9))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(_plain)


def _whole(axes: Any, values: Sequence[float]) -> None:
    """Whole numbers along x where all values are whole."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=all(v.is_integer() for v in map(float, values))))
    axes.xaxis.set_major_formatter(_plain)


@contextmanager
def _style(name: str) -> Generator[None]:
    """The library's own defaults, whatever the user's are, and what makes a drawing fit into a page."""
    try:
        import matplotlib
    except ImportError as missing:
        raise MissingExtra("no matplotlib", "matplotlib for figures", "pip install 'loract[cli]'") from missing
    with warnings.catch_warnings(), matplotlib.rc_context():
        warnings.simplefilter("ignore")  # a letter that its font lacks: the page has fonts of its own
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "svg.fonttype": "none",
                "svg.hashsalt": name,
                "text.parse_math": False,
                "font.size": FONT_SIZE,
                "figure.facecolor": "none",
                "axes.facecolor": "none",
                "axes.edgecolor": INK,
                "axes.labelcolor": INK,
                "axes.linewidth": 0.6,
                "text.color": INK,
                "xtick.color": INK,
                "ytick.color": INK,
                "grid.color": FAINT,
                "grid.linewidth": 0.6,
                "axes.spines.top": False,
                "axes.spines.right": False,
            }
        )
        yield


def _drawn(figure: Any, axes: Any, name: str, label: str, x: str, y: str) -> str:
    axes.set_xlabel(x)
    axes.set_title(y, loc="left", fontsize=FONT_SIZE)  # an upright label takes width, and is read with the head tilted
    axes.grid(visible=True)
    axes.set_axisbelow(True)
    target = io.StringIO()
    figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None})
    return _inline(target.getvalue(), name, label)


_NUMBER = re.compile(r"-?\d+\.\d+")
_REFERENCE = re.compile(r"(?<=#)[\w.-]+")


def _inline(text: str, name: str, label: str) -> str:
    """A drawing as an element of a page: identifiers of its own, no style sheet, no fonts, colours by CSS."""
    root = ElementTree.fromstring(text)
    used = {
        reference
        for element in root.iter()
        for attribute, value in element.attrib.items()
        if attribute.endswith(("href", "clip-path"))
        for reference in _REFERENCE.findall(value)
    }
    kept = _copied(root, name, used)
    box = kept.attrib["viewBox"]
    kept.attrib.clear()
    kept.attrib.update({"viewBox": box, "role": "img", "aria-label": label})
    return ElementTree.tostring(kept, encoding="unicode")


def _copied(element: ElementTree.Element, name: str, used: set[str]) -> ElementTree.Element:
    copy = ElementTree.Element(_bare(element.tag))
    for attribute, value in element.attrib.items():
        attribute = _bare(attribute)
        if attribute == "id":
            if value in used:
                copy.set("id", f"{name}-{value}")
        elif attribute in ("href", "clip-path"):
            copy.set(attribute, value.replace("#", f"#{name}-"))
        elif attribute == "style":
            copy.set("style", _styled(value))
        else:
            copy.set(attribute, " ".join(_NUMBER.sub(_rounded, value).split()))
    copy.text = (element.text or "").strip() or None
    for child in element:
        if _bare(child.tag) not in ("metadata", "style"):  # a style sheet in a page holds for all of it
            copy.append(_copied(child, name, used))
    return copy


def _bare(tag: str) -> str:
    """A name without its namespace: HTML knows the element by its name."""
    return tag.rpartition("}")[2]


def _rounded(found: re.Match[str]) -> str:
    return f"{float(found[0]):.2f}".rstrip("0").rstrip(".")


def _styled(style: str) -> str:
    parts = (part.strip() for part in style.split(";"))
    kept = [part.replace(": ", ":") for part in parts if part and not part.startswith(("font", "stroke-linejoin"))]
    text = ";".join(kept)
    for colour, css in _CSS.items():
        text = text.replace(colour, css)
    return text
