"""Sections of a page for what is measured beside a run: methods compared, sites, the rank atlas."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence

from loract.memory import MIB
from loract.policy import REGIONS, Site
from loract.report import figures
from loract.report.figures import Curve
from loract.report.markup import Section, details, figure, gallery, printable, safe, short, table, times, told
from loract.report.sections import Comparison, Line, Point, RunData, number
from loract.report.table import rows as record_rows
from loract.studies import FLOOR

MOST_ROWS = 400
"""A table of more sites than that goes by layer: experts come in thousands, and the page must stay small."""


def methods(data: RunData) -> Section | None:
    """Bytes, time and error of other methods beside loract's."""
    if not data.comparisons:
        return None
    body = "".join(_compared(found, f"methods-{i}") for i, found in enumerate(data.comparisons))
    return Section(id="methods", title="Methods compared", body=body)


def _compared(found: Comparison, name: str) -> str:
    records = [r for r in found.records if r.name != FLOOR]
    floor = next((r.relative_error for r in found.records if r.name == FLOOR), found.floor)
    header, rows = record_rows(found.records)
    rows = [
        [row[0], "" if r.name == FLOOR else str(records.index(r) + 1), *row[1:]] for r, row in zip(found.records, rows)
    ]
    text = f"<h3>{safe(found.title)}</h3>\n" if found.title else ""
    errors = [r.relative_error if i else r.relative_error or 0.0 for i, r in enumerate(records)]
    chosen = [i for i, r in enumerate(records) if errors[i] is not None and r.saved_bytes > 0]
    if len(chosen) > 1 and any(errors):
        ours = [records[i].name.startswith("loract") for i in chosen]
        svg = figures.plane(
            [(100 * records[i].saved_bytes / records[0].saved_bytes, errors[i] or 0.0) for i in chosen],
            [str(i + 1) for i in chosen],
            ours,
            name=name,
            label=f"Bytes saved for backward against the relative error of the gradient, {len(chosen)} methods. "
            "The table below has the numbers.",
            x=f"% of the bytes that {printable(records[0].name)} saves for backward",
            y="relative error of the gradient (none is drawn at 1e-08)",
            floor=floor,
        )
        legend = [(figures.key(0, mark="dot"), "loract")] if any(ours) else []
        legend += [(figures.key(1, mark="dot"), "other methods")] if not all(ours) else []
        legend += [(figures.key(0, mark="bound"), "what the model's own dtype does")] if floor else []
        text += gallery([figure(svg, legend)])
    text += table("Methods compared", ["method", "no.", *header[1:]], rows)
    failed = "".join(f"<li>{safe(method)}: {safe(why)}</li>" for method, why in found.failures.items())
    return text + (f"<p>Failed:</p>\n<ul>{failed}</ul>\n" if failed else "")


def sites(data: RunData) -> Section | None:
    """Bytes and error by kind, by layer, and by site."""
    if not data.sites:
        return None
    kinds: dict[str, list[Line]] = defaultdict(list)
    layers: dict[int | None, list[Line]] = defaultdict(list)
    for site in data.sites:
        kinds[str(site["kind"])].append(site)
        layers[_layer(site)].append(site)
    note = ""
    if any(kind in REGIONS for kind in kinds):
        note = "<p>What modules that run again would have kept inside is not in the bytes before.</p>\n"
    header = ["sites", "coded", "MiB before", "MiB after", "mean error"]
    text = "<p>What plain autograd and loract keep at each site, in the last forward pass with gradients.</p>\n" + note
    text += table("Sites by kind", ["kind", *header], [[kind, *_totals(members)] for kind, members in kinds.items()])
    ordered = sorted(layers, key=lambda layer: (layer is None, layer or 0))
    if ordered != [None]:
        rows = [[_number(layer), *_totals(layers[layer])] for layer in ordered]
        text += details(f"By layer ({len(ordered)})", table("Sites by layer", ["layer", *header], rows))
    for kind, members in kinds.items():
        text += details(f"{kind} ({times(len(members), 'site')})", _listed(kind, members, header))
    return Section(id="sites", title="Sites", body=text)


def _listed(kind: str, members: Sequence[Line], header: Sequence[str]) -> str:
    """The sites of one kind, layer by layer."""
    if len(members) > MOST_ROWS:
        layers: dict[int | None, list[Line]] = defaultdict(list)
        for site in members:
            layers[_layer(site)].append(site)
        rows = [[_number(k), *_totals(layers[k])] for k in sorted(layers, key=lambda k: (k is None, k or 0))]
        return table(f"Sites of kind {kind}, by layer", ["layer", *header], rows)
    rows = [
        [
            str(site["name"]),
            _number(_layer(site)),
            str(site.get("codec") or "-") if site.get("coded") else "exact or shared",
            *(_mib(number(site.get(key))) for key in ("bytes_before", "bytes_after")),
            short(number(site.get("error"))),
        ]
        for site in sorted(members, key=lambda s: (_layer(s) is None, _layer(s) or 0, str(s["name"])))
    ]
    return table(f"Sites of kind {kind}", ["site", "layer", "kept", "MiB before", "MiB after", "error"], rows)


def _totals(members: Sequence[Line]) -> list[str]:
    errors = [e for site in members if (e := number(site.get("error"))) is not None]
    sums = (sum(number(site.get(key)) or 0 for site in members) for key in ("bytes_before", "bytes_after"))
    coded = sum(bool(site.get("coded")) for site in members)
    return [
        f"{len(members):,}",
        f"{coded:,}",
        *(_mib(s) for s in sums),
        short(sum(errors) / len(errors) if errors else None),
    ]


_ATLAS = (
    ("stable_rank", "stable rank", "{:.1f}"),
    ("features", "features", "{:,.0f}"),
    ("tokens", "tokens", "{:,.0f}"),
    ("energy_sixteenth", "energy in n/16", "{:.3f}"),
    ("energy_eighth", "energy in n/8", "{:.3f}"),
    ("energy_quarter", "energy in n/4", "{:.3f}"),
    ("error_eighth", "error at n/8", "{:.3f}"),
    ("suggested_rank", "rank for target", "{:,.0f}"),
    ("suggested_bits", "bits for target", "{:.0f}"),
    ("outlier_channels", "outlier channels", "{:,.0f}"),
    ("outlier_tokens", "outlier tokens", "{:,.0f}"),
    ("cheapest", "cheapest codec", "{}"),
)
"""Columns of the atlas: key, heading, form."""


def atlas(data: RunData) -> Section | None:
    """Spectra by layer, and every tensor's figures."""
    if not data.atlas:
        return None
    kinds: dict[str, list[Line]] = defaultdict(list)
    for line in data.atlas:
        kinds[str(line["kind"])].append(line)
    drawn: list[str] = []
    for key, title, log in (("stable_rank", "stable rank", True), ("error_eighth", "error at rank n/8", False)):
        every = (
            Curve(name=kind, points=_by_layer(members, key), look=i) for i, (kind, members) in enumerate(kinds.items())
        )
        lines = [line for line in every if len(line.points) > 1][: figures.COLOURS]
        if lines:
            label = f"{title.capitalize()} by layer. " + " ".join(told(line, "layer") for line in lines)
            svg = figures.curves(
                lines, name=f"atlas-{key}", label=label, x="layer", y=f"{title}, mean of a layer", log=log
            )
            drawn.append(figure(svg, [(figures.key(line.look), line.name) for line in lines]))
    text = "<p>Spectra of the saved tensors, tokens by features (n). A low stable rank means that few directions hold "
    text += "most of the energy.</p>\n" + gallery(drawn)
    for kind, members in kinds.items():
        columns = [column for column in _ATLAS if any(line.get(column[0]) is not None for line in members)]
        step = max(1, -(-len(members) // MOST_ROWS))
        shown = sorted(members, key=lambda s: (_layer(s) is None, _layer(s) or 0, str(s["name"])))[::step]
        rows = [
            [str(line["name"]), _number(_layer(line)), *(_cell(line.get(k), form) for k, _, form in columns)]
            for line in shown
        ]
        header = ["tensor", "layer", *(title for _, title, _ in columns)]
        some = f", one in {step} listed" if step > 1 else ""
        text += details(
            f"{kind} ({times(len(members), 'tensor')}{some})", table(f"Tensors of kind {kind}", header, rows)
        )
    return Section(id="atlas", title="Rank atlas", body=text)


def _by_layer(members: Sequence[Line], key: str) -> list[Point]:
    found: dict[int, list[float]] = defaultdict(list)
    for line in members:
        layer, value = _layer(line), number(line.get(key))
        if layer is not None and value is not None and math.isfinite(value):
            found[layer].append(value)
    return [(float(layer), statistics.fmean(found[layer])) for layer in sorted(found)]


def _layer(line: Line) -> int | None:
    layer = number(line.get("layer"))
    if layer is not None and math.isfinite(layer):
        return int(layer)
    return Site(kind="other", name=str(line["name"])).layer


def _mib(found: float | None) -> str:
    return "-" if found is None else short(found / MIB)


def _number(value: int | None) -> str:
    return "-" if value is None else str(value)


def _cell(value: object, form: str) -> str:
    if form == "{}":
        return "-" if value is None else str(value)
    found = number(value)
    return "-" if found is None else form.format(found)
