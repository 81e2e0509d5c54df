"""A run as one page of HTML that needs nothing else: no network, no script, light and dark, wide and narrow."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loract.errors import LoractError, reason
from loract.memory import MIB
from loract.report import figures, sections
from loract.report.figures import Curve, Span
from loract.report.markup import Section, details, document, figure, gallery, safe, short, table, times, told
from loract.report.measured import MOST_ROWS, atlas, methods, sites
from loract.report.sections import Audit, RunData, number, series
from loract.runs import Run

REPORT = "report.html"


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
    return document(data.name, [part for make in _SECTIONS if (part := make(data)) is not None], data.faults)


def _summary(data: RunData) -> Section | None:
    facts = [(name, value) for name, value in _facts(data) if value]
    if not facts:
        return None
    body = "".join(f"<div><dt>{name}</dt><dd>{safe(value)}</dd></div>" for name, value in facts)
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
    yield "Memory was short", f"went on with {summary.get('policy')}" if number(summary.get("rung")) else ""
    method = _block(config, "gradient_compression").get("method", "none")
    yield "Gradients", "" if method == "none" else str(method)
    done, planned = sections.last_step(metrics), number(config.get("max_steps")) or 0
    of = f" of {planned:,.0f}" if done < planned < math.inf else ""
    yield "Steps", f"{done:,}{of}" if metrics else ""
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
    of = "" if before is None else f" of {short(before)}"
    yield "Activations kept", "" if kept is None else f"{short(kept)}{of} MiB at the attached sites"
    peaks = [
        p for p in (number(summary.get("peak_mib")), *(y for _, y in series(metrics, "peak_mib"))) if p is not None
    ]
    yield "Peak memory", f"{short(max(peaks))} MiB" if peaks else ""
    seconds = [value for _, value in series(metrics, "step_seconds")]
    yield "Seconds a step", f"{short(statistics.median(seconds))}, the median" if seconds else ""
    for audit in sections.audits(metrics)[-1:]:
        numbers = f"cosine {_score(audit.cosine)}, relative error {short(audit.error)}"
        yield "Gradient, last audit", f"{numbers}, at step {audit.step:,}"
        yield "Tightened", times(audit.tightened)


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
    training = Curve(name="training", points=series(data.metrics, "loss"))
    evaluation = Curve(name="evaluation", points=series(data.metrics, "eval_loss"), look=1)
    lines = [line for line in (training, evaluation) if len(line.points) > 1]
    if not lines:
        return None
    label = "Loss by step. " + " ".join(told(line) for line in lines)
    legend = [(figures.key(line.look), line.name) for line in lines]
    window = min(100, len(training.points) // 20)
    if window >= 5:
        lines = [replace(training, faint=True), figures.smoothed(training, window), *lines[1:]]
        legend[0] = (figures.key(0), f"training, mean of {window} logs")
    svg = figures.curves(lines, name="loss", label=label, x="step", y="loss")
    return Section(id="loss", title="Loss", body=gallery([figure(svg, legend)]))


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
            label = f"{title.capitalize()} of the gradient by step. {told(curve)}"
            svg = figures.curves(
                [curve],
                name=f"gradient-{key}",
                label=label,
                x="step",
                y=f"{title} of the gradient",
                log=log,
                bound=limit,
            )
            legend = [(figures.key(0), title), (figures.key(0, mark="bound"), f"max_error {limit}")]
            drawn.append(figure(svg, legend if limit is not None else ()))
    text = (
        "<p>The gradient of a step under the policy, against the exact one: the cosine between both, and the norm of "
        "their difference over that of the exact one.</p>\n"
    )
    listed = details(times(len(found), "audit"), _audits(found))
    return Section(id="fidelity", title="Gradient fidelity", body=text + gallery(drawn) + listed)


def _audits(found: Sequence[Audit]) -> str:
    step = max(1, -(-len(found) // MOST_ROWS))
    shown = [*found[::-1][::step]][::-1]  # the last one is always there
    rows = [[f"{a.step:,}", _score(a.cosine), short(a.error), str(a.tightened)] for a in shown]
    tightened = any(a.tightened for a in found)
    header = ["step", "cosine", "relative error", "tightened"]
    count = 4 if tightened else 3
    return table("Audits of the gradient", header[:count], [row[:count] for row in rows])


def _timeline(data: RunData) -> Section | None:
    timed = all(number(line.get("seconds")) is not None for line in data.timeline)
    placed = sorted(
        (number(line.get("seconds")) or 0.0 if timed else float(place), bytes_, str(line.get("phase") or ""))
        for place, line in enumerate(data.timeline)
        if (bytes_ := number(line.get("bytes"))) is not None and math.isfinite(bytes_)
    )
    curve = Curve(name="alive", points=[(x, y / MIB) for x, y, _ in placed if math.isfinite(x)])
    if len(curve.points) < 2:
        return None
    spans, phases = _phases([(phase, x) for x, _, phase in placed if math.isfinite(x)])
    at, peak = max(curve.points, key=lambda p: p[1])
    unit = "seconds" if timed else "event"
    when = f"after {at:.3g} seconds" if timed else f"at event {at:g}"
    svg = figures.curves(
        [curve],
        name="timeline",
        label=f"Memory alive by {unit}. {told(curve, unit)}",
        x=unit,
        y="MiB alive",
        steps=True,
        spans=spans,
    )
    legend = [(figures.key(i, mark="span"), name) for i, name in enumerate(phases)]
    text = f"<p>The peak is {short(peak)} MiB, {when}.</p>\n"
    return Section(id="timeline", title="Memory over time", body=text + gallery([figure(svg, legend)]))


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
            label = f"{title.capitalize()} by step. {told(curve)}"
            name = key.replace("/", "-").replace("_", "-")
            drawn.append(figure(figures.curves([curve], name=name, label=label, x="step", y=title)))
    if not drawn:
        return None
    return Section(id="more", title="More curves", body=details(times(len(drawn), "figure"), gallery(drawn)))


def _configuration(data: RunData) -> Section | None:
    if not data.config_text.strip():
        return None
    label = 'tabindex="0" role="region" aria-label="Configuration as YAML"'
    body = f'<pre class="scroll" {label}><code>{safe(data.config_text)}</code></pre>\n'
    return Section(id="configuration", title="Configuration", body=body)


def _versions(data: RunData) -> Section | None:
    if not data.environment:
        return None
    rows = [[name, value] for name, value in data.environment.items()]
    return Section(id="versions", title="Versions", body=table("Versions of this run", ["name", "version"], rows))


def _block(line: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = line.get(key)
    return found if isinstance(found, Mapping) else {}  # pyright: ignore[reportUnknownVariableType]


def _score(cosine: float | None) -> str:
    return "-" if cosine is None else f"{cosine:.5f}"


_SECTIONS = (_summary, _loss, _fidelity, _timeline, methods, sites, atlas, _more, _configuration, _versions)
