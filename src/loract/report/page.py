"""A run as one page of HTML that needs nothing else: no network, no script, light and dark, wide and narrow."""

from __future__ import annotations

import html
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loract.errors import LoractError, reason
from loract.memory import MIB
from loract.policy import REGIONS, Site
from loract.report import figures, sections, table
from loract.report.figures import Curve, Span
from loract.report.sections import Audit, Comparison, Line, Point, RunData, number, series
from loract.runs import Run
from loract.studies import FLOOR

REPORT = "report.html"
MOST_ROWS = 400
"""A table of more sites than that goes by layer: experts come in thousands, and the page must stay small."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page; `body` is HTML."""

    id: str
    title: str
    body: str


def write_report(folder: Path) -> Path:
    """Write `report.html` into a run's folder, anew from what is there, whole or not at all.

    Raises:
        LoractError: the folder holds neither a run nor measurements, or cannot be written to.
        MissingExtra: matplotlib is not installed.
    """
    text = page(sections.read(folder))
    try:
        Run(folder=folder).write(REPORT, text)
    except OSError as error:
        raise LoractError(f"{str(folder)!r} ({error.strerror})", "a folder to write to", "make room in it") from None
    return folder / REPORT


def try_report(folder: Path) -> str | None:
    """The same for the end of a run, which a report must never spoil: None, or the sentence that says what is wrong."""
    try:
        write_report(folder)
    except Exception as error:  # whatever a library raises: the run has succeeded
        return f"no {REPORT}: {reason(error)}"
    return None


def page(data: RunData) -> str:
    """The whole document. Equal data give equal text; what has no data is left out."""
    parts = [part for make in _SECTIONS if (part := make(data)) is not None]
    links = "".join(f'<li><a href="#{part.id}">{part.title}</a></li>' for part in parts)
    bodies = "".join(
        f'<section id="{part.id}" aria-labelledby="{part.id}-title">\n'
        f'<h2 id="{part.id}-title">{part.title}</h2>\n{part.body}</section>\n'
        for part in parts
    )
    faults = "".join(f"<li>{_safe(fault)}</li>" for fault in data.faults)
    title = _safe(data.name)
    text = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        # Should a string ever get through as markup, the browser still runs and fetches nothing.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{title} - loract</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f'<header><p class="brand">loract</p><h1>{title}</h1>\n'
        + (f'<nav aria-label="Contents"><ul>{links}</ul></nav>\n' if len(parts) > 1 else "")
        + "</header>\n<main>\n"
        + (f'<div class="note" role="note"><p>Could not be read:</p><ul>{faults}</ul></div>\n' if faults else "")
        + f"{bodies}</main>\n</body>\n</html>\n"
    )
    # JSON can hold half a character, which no file can.
    return text.encode("utf-8", "replace").decode("utf-8")


# Sections


def _summary(data: RunData) -> Section | None:
    facts = [(name, value) for name, value in _facts(data) if value]
    if not facts:
        return None
    body = "".join(f"<div><dt>{name}</dt><dd>{_safe(value)}</dd></div>" for name, value in facts)
    return Section(id="summary", title="Summary", body=f'<dl class="facts">{body}</dl>\n')


def _facts(data: RunData) -> Iterable[tuple[str, str]]:
    config, summary, metrics = data.config, data.summary, data.metrics
    if not config and not metrics:
        return
    yield "State", _state(data)
    model = config.get("model_name_or_path")
    yield "Model", str(model) if model else f"{config['model_type']}, from scratch" if config.get("model_type") else ""
    yield "Task", str(config.get("task") or "")
    yield "Data", str(config.get("dataset_name") or "")
    if "use_peft" in config:
        adapters = f"LoRA, r = {config.get('lora_r')}, alpha = {config.get('lora_alpha')}"
        yield "Trains", adapters if config["use_peft"] else "all weights"
    yield "Compression", _policy(config.get("activation_compression"))
    yield "Steps", f"{sections.last_step(metrics) or int(number(summary.get('steps')) or 0):,}"
    tokens = series(metrics, "num_tokens") or series(metrics, "num_input_tokens_seen")
    yield "Tokens", f"{tokens[-1][1]:,.0f}" if tokens else ""
    losses = [value for _, value in series(metrics, "loss")]
    yield "Training loss", " → ".join(f"{value:.4f}" for value in (losses[:1] + losses[-1:] if losses[1:] else losses))
    for name in ("loss", "accuracy"):
        found = number(_block(summary, "evaluation").get(name))
        if found is None:
            found = next((value for _, value in reversed(series(metrics, f"eval_{name}"))), None)
        yield f"Evaluation {name}", "" if found is None else f"{found:.4f}"
    last = next((line for line in reversed(metrics) if "loract/saved_mib" in line), {})
    kept, before = number(last.get("loract/saved_mib")), number(last.get("loract/before_mib"))
    of = "" if before is None else f" of {_short(before)}"
    yield "Activations kept", "" if kept is None else f"{_short(kept)}{of} MiB at the attached sites"
    peaks = [
        p for p in (number(summary.get("peak_mib")), *(y for _, y in series(metrics, "peak_mib"))) if p is not None
    ]
    yield "Peak memory", f"{_short(max(peaks))} MiB" if peaks else ""
    seconds = [value for _, value in series(metrics, "step_seconds")]
    yield "Seconds a step", f"{_short(statistics.median(seconds))}, the median" if seconds else ""
    for audit in sections.audits(metrics)[-1:]:
        numbers = f"cosine {_score(audit.cosine)}, relative error {_short(audit.error)}"
        yield "Gradient, last audit", f"{numbers}, at step {audit.step:,}"
        yield "Tightened", _times(audit.tightened)


def _state(data: RunData) -> str:
    if not data.summary:
        return "has not ended, or was killed"
    return "finished" if data.summary.get("finished") is True else "stopped; --resume goes on"


def _policy(block: object) -> str:
    """The block `activation_compression` without what is not set."""
    if not isinstance(block, Mapping):
        return ""
    chosen: Mapping[str, Any] = block  # pyright: ignore[reportUnknownVariableType]
    options = [f"{key} {chosen[key]}" for key in ("rank", "bits") if chosen.get(key) is not None]
    return ", ".join([str(chosen.get("preset", "")), *options, *(["exact"] if chosen.get("exact") else [])])


def _loss(data: RunData) -> Section | None:
    lines = [
        Curve(name=name, points=points)
        for name, key in (("training", "loss"), ("evaluation", "eval_loss"))
        if len(points := series(data.metrics, key)) > 1
    ]
    if not lines:
        return None
    label = "Loss by step. " + " ".join(_told(line) for line in lines)
    svg = figures.curves(lines, name="loss", label=label, x="step", y="loss")
    return Section(id="loss", title="Loss", body=_figures([_figure(svg, [line.name for line in lines])]))


def _fidelity(data: RunData) -> Section | None:
    found = sections.audits(data.metrics)
    if not found:
        return None
    bound = number(_block(data.config, "activation_compression").get("max_error"))
    drawn: list[str] = []
    for key, title, log, limit in (
        ("error", "relative error", True, bound),
        ("cosine", "cosine", False, None),
    ):
        values = [(float(a.step), v) for a in found if (v := getattr(a, key)) is not None and math.isfinite(v)]
        curve = Curve(name=title, points=[(x, y) for x, y in values if y > 0 or not log])
        if len(curve.points) > 1:
            label = f"{title.capitalize()} of the gradient by step. {_told(curve)}"
            svg = figures.curves(
                [curve],
                name=f"gradient-{key}",
                label=label,
                x="step",
                y=f"{title} of the gradient",
                log=log,
                bound=limit,
            )
            legend = [(figures.key(0), title), (figures.key(0, mark="bound"), f"max_error {_short(limit)}")]
            drawn.append(_figure(svg, legend if limit is not None else []))
    text = (
        "<p>The gradient of a step under the policy, against the exact one: the cosine between both, and the norm of "
        "their difference over that of the exact one.</p>\n"
    )
    listed = _details(f"{_times(len(found), 'audit')}", _audits(found))
    return Section(id="fidelity", title="Gradient fidelity", body=text + _figures(drawn) + listed)


def _audits(found: Sequence[Audit]) -> str:
    step = max(1, -(-len(found) // MOST_ROWS))
    shown = [*found[::-1][::step]][::-1]  # the last one is always there
    rows = [[f"{a.step:,}", _score(a.cosine), _short(a.error), str(a.tightened)] for a in shown]
    tightened = any(a.tightened for a in found)
    header = ["step", "cosine", "relative error", "tightened"]
    count = 4 if tightened else 3
    return _table("Audits of the gradient", header[:count], [row[:count] for row in rows])


def _timeline(data: RunData) -> Section | None:
    lines = data.timeline
    timed = all(number(line.get("seconds")) is not None for line in lines)
    points = series([{"place": i, **line} for i, line in enumerate(lines)], "bytes", "seconds" if timed else "place")
    if len(points) < 2:
        return None
    curve = Curve(name="alive", points=[(x, y / MIB) for x, y in points])
    spans, phases = _phases([(str(line.get("phase") or ""), x) for line, (x, _) in zip(lines, points)])
    at, peak = max(curve.points, key=lambda p: p[1])
    unit = "seconds" if timed else "event"
    svg = figures.curves(
        [curve],
        name="timeline",
        label=f"Memory alive by {unit}. {_told(curve, unit)}",
        x=unit,
        y="MiB alive",
        steps=True,
        spans=spans,
    )
    legend = [(figures.key(i, mark="span"), name) for i, name in enumerate(phases)]
    peak_text = f"<p>The peak is {_short(peak)} MiB, at {unit} {at:g}.</p>\n"
    return Section(
        id="timeline", title="Memory over time", body=peak_text + _figures([_figure(svg, legend)], wide=True)
    )


def _phases(places: Sequence[tuple[str, float]]) -> tuple[list[Span], list[str]]:
    """Stretches of one phase, and the names of the phases in the order in which they come."""
    names = list(dict.fromkeys(name for name, _ in places if name))
    spans: list[Span] = []
    start = 0
    for i in range(1, len(places) + 1):
        if i < len(places) and places[i][0] == places[start][0]:
            continue
        name, begin = places[start]
        end = places[min(i, len(places) - 1)][1]
        if name and end > begin and len(spans) < MOST_ROWS:
            spans.append(Span(start=begin, end=end, group=names.index(name)))
        start = i
    return spans, names


def _methods(data: RunData) -> Section | None:
    if not data.comparisons:
        return None
    body = "".join(_compared(found, f"methods-{i}") for i, found in enumerate(data.comparisons))
    return Section(id="methods", title="Methods compared", body=body)


def _compared(found: Comparison, name: str) -> str:
    records = [r for r in found.records if r.name != FLOOR]
    floor = next((r.relative_error for r in found.records if r.name == FLOOR), found.floor)
    header, rows = table.rows(found.records)
    rows = [
        [row[0], "" if r.name == FLOOR else str(records.index(r) + 1), *row[1:]] for r, row in zip(found.records, rows)
    ]
    text = f"<h3>{_safe(found.title)}</h3>\n" if found.title else ""
    points = [
        (100 * r.saved_bytes / records[0].saved_bytes, r.relative_error or 0.0, i)
        for i, r in enumerate(records)
        if r.saved_bytes > 0
    ]
    if len(points) > 1 and len(points) == len(records) and any(r.relative_error for r in records):
        ours = [r.name.startswith("loract") for r in records]
        svg = figures.plane(
            [(x, y) for x, y, _ in points],
            ours,
            name=name,
            label=f"Bytes saved for backward against the relative error of the gradient, {len(points)} methods. "
            "The table below has the numbers.",
            x=f"% of the bytes that {_plain(records[0].name)} saves for backward",
            y="relative error of the gradient (none is drawn at 1e-08)",
            floor=floor,
        )
        legend = [(figures.key(0, mark="dot"), "loract")] if any(ours) else []
        legend += [(figures.key(1, mark="dot"), "other methods")] if not all(ours) else []
        legend += [(figures.key(0, mark="bound"), "plain, in the model's own dtype")] if floor else []
        text += _figures([_figure(svg, legend)], wide=True)
    text += _table("Methods compared", ["method", "no.", *header[1:]], rows)
    failed = "".join(f"<li>{_safe(method)}: {_safe(why)}</li>" for method, why in found.failures.items())
    return text + (f"<p>Failed:</p>\n<ul>{failed}</ul>\n" if failed else "")


def _sites(data: RunData) -> Section | None:
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
    text += _table("Sites by kind", ["kind", *header], [[kind, *_totals(members)] for kind, members in kinds.items()])
    ordered = sorted(layers, key=lambda layer: (layer is None, layer or 0))
    if ordered != [None]:
        rows = [[_number(layer), *_totals(layers[layer])] for layer in ordered]
        text += _details(f"By layer ({len(ordered)})", _table("Sites by layer", ["layer", *header], rows))
    for kind, members in kinds.items():
        text += _details(f"{kind} ({_times(len(members), 'site')})", _listed(kind, members, header))
    return Section(id="sites", title="Sites", body=text)


def _listed(kind: str, members: Sequence[Line], header: Sequence[str]) -> str:
    """The sites of one kind, layer by layer."""
    if len(members) > MOST_ROWS:
        layers: dict[int | None, list[Line]] = defaultdict(list)
        for site in members:
            layers[_layer(site)].append(site)
        rows = [[_number(k), *_totals(layers[k])] for k in sorted(layers, key=lambda k: (k is None, k or 0))]
        return _table(f"Sites of kind {kind}, by layer", ["layer", *header], rows)
    rows = [
        [
            str(site["name"]),
            _number(_layer(site)),
            str(site.get("codec") or "-") if site.get("coded") else "exact or shared",
            *(_mib(number(site.get(key))) for key in ("bytes_before", "bytes_after")),
            _short(number(site.get("error"))),
        ]
        for site in sorted(members, key=lambda s: (_layer(s) is None, _layer(s) or 0, str(s["name"])))
    ]
    return _table(f"Sites of kind {kind}", ["site", "layer", "kept", "MiB before", "MiB after", "error"], rows)


def _totals(members: Sequence[Line]) -> list[str]:
    errors = [e for site in members if (e := number(site.get("error"))) is not None]
    sums = (sum(number(site.get(key)) or 0 for site in members) for key in ("bytes_before", "bytes_after"))
    coded = sum(bool(site.get("coded")) for site in members)
    return [
        f"{len(members):,}",
        f"{coded:,}",
        *(_mib(s) for s in sums),
        _short(sum(errors) / len(errors) if errors else None),
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


def _atlas(data: RunData) -> Section | None:
    if not data.atlas:
        return None
    kinds: dict[str, list[Line]] = defaultdict(list)
    for line in data.atlas:
        kinds[str(line["kind"])].append(line)
    drawn: list[str] = []
    for key, title, log in (("stable_rank", "stable rank", True), ("error_eighth", "error at rank n/8", False)):
        lines = [Curve(name=kind, points=_by_layer(members, key)) for kind, members in kinds.items()]
        lines = [line for line in lines if len(line.points) > 1][: figures.COLOURS]
        if lines:
            label = f"{title.capitalize()} by layer. " + " ".join(_told(line, "layer") for line in lines)
            svg = figures.curves(
                lines, name=f"atlas-{key}", label=label, x="layer", y=f"{title}, mean of a layer", log=log
            )
            drawn.append(_figure(svg, [line.name for line in lines]))
    text = "<p>Spectra of the saved tensors, tokens by features (n). A low stable rank means that few directions hold "
    text += "most of the energy.</p>\n" + _figures(drawn)
    for kind, members in kinds.items():
        columns = [column for column in _ATLAS if any(line.get(column[0]) is not None for line in members)]
        step = max(1, -(-len(members) // MOST_ROWS))
        shown = sorted(members, key=lambda s: (_layer(s) is None, _layer(s) or 0, str(s["name"])))[::step]
        rows = [
            [str(line["name"]), _number(_layer(line)), *(_cell(line.get(k), form) for k, _, form in columns)]
            for line in shown
        ]
        header = ["tensor", "layer", *(title for _, title, _ in columns)]
        every = f", every {step}th" if step > 1 else ""
        text += _details(
            f"{kind} ({_times(len(members), 'tensor')}{every})", _table(f"Tensors of kind {kind}", header, rows)
        )
    return Section(id="atlas", title="Rank atlas", body=text)


def _by_layer(members: Sequence[Line], key: str) -> list[Point]:
    found: dict[int, list[float]] = defaultdict(list)
    for line in members:
        layer, value = _layer(line), number(line.get(key))
        if layer is not None and value is not None and math.isfinite(value):
            found[layer].append(value)
    return [(float(layer), statistics.fmean(found[layer])) for layer in sorted(found)]


_MORE = (
    ("learning_rate", "learning rate"),
    ("grad_norm", "norm of the gradient"),
    ("loract/error", "mean error of coded tensors"),
    ("loract/saved_mib", "activations kept (MiB)"),
    ("peak_mib", "peak memory (MiB)"),
    ("step_seconds", "seconds a step"),
    ("mean_token_accuracy", "token accuracy"),
)
"""Keys of the log that are drawn where they vary."""


def _more(data: RunData) -> Section | None:
    drawn: list[str] = []
    for key, title in _MORE:
        curve = Curve(name=title, points=series(data.metrics, key))
        if len({y for _, y in curve.points}) > 1:
            label = f"{title.capitalize()} by step. {_told(curve)}"
            name = key.replace("/", "-").replace("_", "-")
            drawn.append(_figure(figures.curves([curve], name=name, label=label, x="step", y=title), []))
    if not drawn:
        return None
    return Section(id="more", title="More curves", body=_details(_times(len(drawn), "figure"), _figures(drawn)))


def _configuration(data: RunData) -> Section | None:
    if not data.config_text.strip():
        return None
    label = 'tabindex="0" role="region" aria-label="Configuration as YAML"'
    body = f'<pre class="scroll" {label}><code>{_safe(data.config_text)}</code></pre>\n'
    return Section(id="configuration", title="Configuration", body=body)


def _versions(data: RunData) -> Section | None:
    if not data.environment:
        return None
    rows = [[name, value] for name, value in data.environment.items()]
    return Section(id="versions", title="Versions", body=_table("Versions of this run", ["name", "version"], rows))


_SECTIONS = (*(_summary, _loss, _fidelity, _timeline, _methods, _sites, _atlas, _more, _configuration, _versions),)


# Pieces


def _safe(value: object) -> str:
    """Any value as text that is no markup."""
    return html.escape(str(value), quote=True)


def _plain(text: str) -> str:
    """A name as it may stand in a drawing: XML has no place for control characters."""
    kept = "".join(letter for letter in text if letter.isprintable())
    return kept if len(kept) <= 30 else f"{kept[:29]}…"


def _table(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in a box in which it scrolls. The first cell of a row is its heading."""
    head = "".join(f'<th scope="col">{_safe(text)}</th>' for text in header)
    body = "".join(
        f'<tr><th scope="row">{_safe(row[0])}</th>{"".join(f"<td>{_safe(cell)}</td>" for cell in row[1:])}</tr>\n'
        for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{_safe(caption)}"><table>'
        f"<caption>{_safe(caption)}</caption><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>\n"
    )


def _details(summary: str, body: str) -> str:
    return f"<details><summary>{_safe(summary)}</summary>\n{body}</details>\n"


def _figures(drawn: Sequence[str], *, wide: bool = False) -> str:
    if not drawn:
        return ""
    return f'<div class="figures{" wide" if wide else ""}">\n{"".join(drawn)}</div>\n'


def _figure(svg: str, legend: Sequence[str] | Sequence[tuple[str, str]]) -> str:
    """A drawing with its legend: names in the order of the series, or signs with names; a single name goes without."""
    signed = [(figures.key(i), item) if isinstance(item, str) else item for i, item in enumerate(legend)]
    keys = "".join(f"<span>{sign}{_safe(name)}</span>" for sign, name in signed)
    return f"<figure>{svg}{f'<figcaption>{keys}</figcaption>' if len(signed) > 1 else ''}</figure>\n"


def _told(curve: Curve, x: str = "step") -> str:
    """A curve in words, for those who do not see it."""
    first, last = curve.points[0], curve.points[-1]
    low, high = min(y for _, y in curve.points), max(y for _, y in curve.points)
    return (
        f"{_plain(curve.name)}: {_short(first[1])} at {x} {first[0]:g}, {_short(last[1])} at {x} {last[0]:g}, "
        f"between {_short(low)} and {_short(high)}."
    )


def _block(line: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = line.get(key)
    return found if isinstance(found, Mapping) else {}  # pyright: ignore[reportUnknownVariableType]


def _layer(line: Line) -> int | None:
    layer = number(line.get("layer"))
    if layer is not None and math.isfinite(layer):
        return int(layer)
    return Site(kind="other", name=str(line["name"])).layer


def _short(value: float | None) -> str:
    """Three digits or so, without powers of ten where they can be helped.

    Example:
        >>> [_short(v) for v in (None, 0.0, 0.00012345, 0.012345, 1.2345, 98.76, 1234.5)]
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


def _score(cosine: float | None) -> str:
    return "-" if cosine is None else f"{cosine:.5f}"


def _mib(found: float | None) -> str:
    return "-" if found is None else _short(found / MIB)


def _number(value: int | None) -> str:
    return "-" if value is None else str(value)


def _cell(value: object, form: str) -> str:
    if form == "{}":
        return "-" if value is None else str(value)
    found = number(value)
    return "-" if found is None else form.format(found)


def _times(count: int, what: str = "time") -> str:
    """A count with its noun; nothing for none.

    Example:
        >>> _times(1), _times(3, "site"), _times(0)
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
.figures.wide,.figures:has(figure:only-child){max-width:44rem}
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
@media (max-width:30rem){body{padding:.8rem}.facts{grid-template-columns:1fr 1fr}.facts dd{font-size:.95rem}}
@media print{details::details-content{content-visibility:visible}pre{max-height:none}}
"""
