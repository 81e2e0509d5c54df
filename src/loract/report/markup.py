"""HTML of a page that needs nothing else: its frame and style, tables, figures with legends, numbers in words."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from loract.report.figures import Curve


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page; `body` is HTML."""

    id: str
    title: str
    body: str


def document(title: str, parts: Sequence[Section], faults: Sequence[str] = ()) -> str:
    """The whole text: a header with links to the parts, what could not be read, the parts."""
    links = "".join(f'<li><a href="#{part.id}">{part.title}</a></li>' for part in parts)
    bodies = "".join(
        f'<section id="{part.id}" aria-labelledby="{part.id}-title">\n'
        f'<h2 id="{part.id}-title">{part.title}</h2>\n{part.body}</section>\n'
        for part in parts
    )
    unread = "".join(f"<li>{safe(fault)}</li>" for fault in faults)
    text = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        # Should a string ever get through as markup, the browser still runs and fetches nothing.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{safe(title)} - loract</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f'<header><p class="brand">loract</p><h1>{safe(title)}</h1>\n'
        + (f'<nav aria-label="Contents"><ul>{links}</ul></nav>\n' if len(parts) > 1 else "")
        + "</header>\n<main>\n"
        + (f'<div class="note" role="note"><p>Could not be read:</p><ul>{unread}</ul></div>\n' if unread else "")
        + f"{bodies}</main>\n</body>\n</html>\n"
    )
    # JSON can hold half a character, which no file can.
    return text.encode("utf-8", "replace").decode("utf-8")


def safe(value: object) -> str:
    """Any value as text that is no markup."""
    return html.escape(str(value), quote=True)


def printable(text: str) -> str:
    """A name as it may stand in a drawing: XML has no place for control characters."""
    kept = "".join(letter for letter in text if letter.isprintable())
    return kept if len(kept) <= 30 else f"{kept[:29]}…"


def table(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in a box in which it scrolls. The first cell of a row is its heading."""
    head = "".join(f'<th scope="col">{safe(text)}</th>' for text in header)
    body = "".join(
        f'<tr><th scope="row">{safe(row[0])}</th>{"".join(f"<td>{safe(cell)}</td>" for cell in row[1:])}</tr>\n'
        for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{safe(caption)}"><table>'
        f"<caption>{safe(caption)}</caption><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>\n"
    )


def details(summary: str, body: str) -> str:
    """What opens at a click."""
    return f"<details><summary>{safe(summary)}</summary>\n{body}</details>\n"


def gallery(drawn: Sequence[str]) -> str:
    """Figures beside each other where there is room."""
    if not drawn:
        return ""
    return f'<div class="figures">\n{"".join(drawn)}</div>\n'


def figure(svg: str, legend: Sequence[tuple[str, str]] = ()) -> str:
    """A drawing with its legend of signs and names."""
    keys = "".join(f"<span>{sign}{safe(name)}</span>" for sign, name in legend)
    return f"<figure>{svg}{f'<figcaption>{keys}</figcaption>' if keys else ''}</figure>\n"


def told(curve: Curve, x: str = "step") -> str:
    """A curve in words, for those who do not see it."""
    first, last = curve.points[0], curve.points[-1]
    low, high = min(y for _, y in curve.points), max(y for _, y in curve.points)
    return (
        f"{printable(curve.name)}: {short(first[1])} at {x} {first[0]:g}, {short(last[1])} at {x} {last[0]:g}, "
        f"between {short(low)} and {short(high)}."
    )


def short(value: float | None) -> str:
    """Three digits or so, without powers of ten where they can be helped.

    Example:
        >>> [short(v) for v in (None, 0.0, 0.00012345, 0.012345, 1.2345, 98.76, 1234.5)]
        ['-', '0', '1.2e-04', '0.0123', '1.23', '98.8', '1,234']
    """
    if value is None:
        return "-"
    size = abs(value)
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if size < 1e-3:
        return f"{value:.1e}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(size)))}f}"


def times(count: int, what: str = "time") -> str:
    """A count with its noun; nothing for none.

    Example:
        >>> times(1), times(3, "site"), times(0)
        ('1 time', '3 sites', '')
    """
    return f"{count:,} {what}{'s' * (count != 1)}" if count else ""


_STYLE = """
:root{--back:#fff;--text:#1b1f24;--soft:#59636e;--line:#d5dae0;--panel:#f5f7f9;--link:#0b5cad;
--c0:#0b62c4;--c1:#c2410c;--c2:#0f7b4f;--c3:#8b3fb5;--c4:#8a6100;--c5:#00747f;--c6:#b01e5b;--c7:#5c5c5c}
@media (prefers-color-scheme:dark){:root{--back:#14171b;--text:#e6e9ed;--soft:#a0a9b4;--line:#3a414a;--panel:#1d2127;
--link:#7ab8ff;--c0:#6cb0ff;--c1:#ff9a62;--c2:#5fd39b;--c3:#d19cf5;--c4:#e8c04a;--c5:#53d0dc;--c6:#ff85b3;--c7:#b5b5b5}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0 auto;max-width:70rem;padding:1rem;background:var(--back);color:var(--text);
font:1rem/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif}
h1{margin:0;font-size:1.7rem;line-height:1.2;overflow-wrap:anywhere}
h2{margin:2.2rem 0 .7rem;padding-bottom:.3rem;border-bottom:1px solid var(--line);font-size:1.25rem}
h3{margin:1.4rem 0 .5rem;font-size:1.05rem;overflow-wrap:anywhere}
p{margin:.5rem 0;max-width:44rem}
a{color:var(--link)}
.brand{margin:0;color:var(--soft);font-size:.85rem}
nav ul{display:flex;flex-wrap:wrap;gap:.3rem 1rem;margin:.7rem 0 0;padding:0;list-style:none}
nav a{display:inline-block;padding:.15rem 0}
.note{margin:1rem 0 0;padding:.4rem .9rem;border-left:4px solid var(--c1);background:var(--panel)}
.note ul{margin:.3rem 0;padding-left:1.2rem;overflow-wrap:anywhere}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,15rem),1fr));gap:.6rem;margin:0}
.facts div{padding:.5rem .8rem;background:var(--panel);border-radius:.4rem}
dt{color:var(--soft);font-size:.85rem}
dd{margin:0;overflow-wrap:anywhere}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,25rem),1fr));gap:1rem;margin:.6rem 0}
.figures:has(figure:only-child){max-width:38rem}
figure{margin:0;min-width:0}
figure>svg{display:block;width:100%;height:auto;overflow:visible;stroke-linejoin:round}
figure text{font-family:inherit;font-size:11px}
figcaption{display:flex;flex-wrap:wrap;gap:.2rem 1rem;padding-top:.3rem;font-size:.85rem}
figcaption span{display:inline-flex;align-items:center;gap:.4rem;overflow-wrap:anywhere}
.key{flex:none;width:24px;height:10px}
.scroll{overflow-x:auto;margin:.6rem 0}
.scroll:focus-visible,summary:focus-visible,a:focus-visible{outline:2px solid var(--link);outline-offset:2px}
table{border-collapse:collapse;font-size:.88rem;font-variant-numeric:tabular-nums}
caption{padding-bottom:.3rem;color:var(--soft);text-align:left}
th,td{padding:.3rem .7rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child{padding-left:0;text-align:left}
thead th{color:var(--soft);font-weight:600}
tbody th{font-weight:400}
details{margin:.5rem 0}
summary{padding:.3rem 0;cursor:pointer;overflow-wrap:anywhere}
pre{max-height:32rem;margin:0;padding:.8rem;overflow:auto;background:var(--panel);border-radius:.4rem;
font:.85rem/1.45 ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace}
@media (max-width:30rem){body{padding:.8rem}figure text{font-size:12.5px}
.facts{grid-template-columns:1fr 1fr}.facts dd{font-size:.95rem}}
@media print{details::details-content{content-visibility:visible}pre{max-height:none}}
"""
