"""What a run's folder holds, read for a report. Every file may be missing, and the last line of one half written.

Beside what `loract train` writes (docs/training.md) these are read where they are:

`sites.jsonl`: a `SiteStats` a line. `environment.json`: names and versions. `records.jsonl`: a `Record` a line, or the
journal of `loract bench frontier`. `atlas.jsonl`: a `Spectrum` a line. `timeline.jsonl`: an event a line, with `bytes`,
those alive then, and perhaps `seconds`, `event` and `phase`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Any

from loract.errors import LoractError, MissingExtra
from loract.memory import Record

try:
    import yaml

    from loract.runs import CONFIG, METRICS, SUMMARY
except ImportError as missing:
    raise MissingExtra(f"no {missing.name}", "PyYAML and safetensors", "pip install 'loract[all]'") from missing

SITES, ENVIRONMENT = "sites.jsonl", "environment.json"
RECORDS, ATLAS, TIMELINE = "records.jsonl", "atlas.jsonl", "timeline.jsonl"
PACKAGES = ("loract", "torch", "transformers", "peft", "trl", "accelerate", "datasets", "safetensors", "bitsandbytes")

Line = dict[str, Any]
Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Methods measured on one workload, the reference first."""

    title: str
    records: list[Record]
    floor: float | None = None
    """Error of the gradient that the model's own dtype makes, where a journal says so."""
    failures: dict[str, str] = field(default_factory=lambda: dict[str, str]())


@dataclass(frozen=True, kw_only=True)
class RunData:
    """The contents of one folder; what is not there is empty."""

    name: str
    config_text: str = ""
    config: Line = field(default_factory=lambda: Line())
    summary: Line = field(default_factory=lambda: Line())
    """Empty too where it is older than the last metrics: a resumed run that has not ended."""
    metrics: list[Line] = field(default_factory=lambda: list[Line]())
    sites: list[Line] = field(default_factory=lambda: list[Line]())
    comparisons: list[Comparison] = field(default_factory=lambda: list[Comparison]())
    atlas: list[Line] = field(default_factory=lambda: list[Line]())
    timeline: list[Line] = field(default_factory=lambda: list[Line]())
    environment: dict[str, str] = field(default_factory=lambda: dict[str, str]())
    faults: list[str] = field(default_factory=lambda: list[str]())
    """What could not be read."""


@dataclass(frozen=True, kw_only=True)
class Audit:
    """One audit of a run; None where the log has no number."""

    step: int
    cosine: float | None
    error: float | None
    tightened: int


def read(folder: Path) -> RunData:
    """Read all that a report shows.

    Raises:
        LoractError: no such folder, one that holds neither a run nor measurements, or a file that cannot be opened.
    """
    known = (CONFIG, RECORDS, ATLAS, TIMELINE)
    if not any((folder / name).is_file() for name in known):
        what = "which is no run" if folder.is_dir() else "which is no folder"
        raise LoractError(f"{str(folder)!r}, {what}", f"a folder with {CONFIG}", "name the output_dir of a run")
    faults: list[str] = []
    try:
        text = _text(folder / CONFIG)
        metrics = [line for line in _lines(folder / METRICS, faults) if number(line.get("step")) is not None]
        summary = _mapping(folder / SUMMARY, faults)
        records, records_faulty = _lines(folder / RECORDS, faults), len(faults)
        comparisons = compare(records)
        if records and not comparisons and len(faults) == records_faulty:
            faults.append(f"{RECORDS}: no measurements")
        return RunData(
            name=folder.resolve().name,
            config_text=text,
            config=_parsed(text, faults),
            summary=summary if (number(summary.get("steps")) or 0) >= last_step(metrics) else {},
            metrics=metrics,
            sites=[line for line in _lines(folder / SITES, faults) if {"kind", "name"} <= line.keys()],
            comparisons=comparisons,
            atlas=[line for line in _lines(folder / ATLAS, faults) if {"kind", "name"} <= line.keys()],
            timeline=[line for line in _lines(folder / TIMELINE, faults) if number(line.get("bytes")) is not None],
            environment={name: str(value) for name, value in _mapping(folder / ENVIRONMENT, faults).items()},
            faults=faults,
        )
    except OSError as error:
        name = str(error.filename or folder)
        raise LoractError(f"{name!r} ({error.strerror})", "files to read", "check their permissions") from None


def versions() -> dict[str, str]:
    """Python's version and those of the installed packages that training depends on: the content of `environment.json`.

    Example:
        >>> sorted({"python", "loract"} & versions().keys())
        ['loract', 'python']
    """
    found = {"python": python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def number(value: object) -> float | None:
    """The value if it is a number, infinities and NaN included; None for anything else.

    Example:
        >>> number(3), number("3"), number(True), number(None)
        (3.0, None, None, None)
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def series(lines: Iterable[Mapping[str, Any]], key: str, x: str = "step") -> list[Point]:
    """(x, value) of every line that has both as finite numbers, by x.

    Example:
        >>> series([{"step": 2, "loss": 1.5}, {"step": 1, "loss": 2}, {"step": 3, "loss": float("nan")}], "loss")
        [(1.0, 2.0), (2.0, 1.5)]
    """
    pairs = ((number(line.get(x)), number(line.get(key))) for line in lines)
    return sorted((a, b) for a, b in pairs if a is not None and b is not None and math.isfinite(a) and math.isfinite(b))


def last_step(metrics: Sequence[Mapping[str, Any]]) -> int:
    """The latest step that was logged; 0 if none was."""
    steps = [step for line in metrics if (step := number(line.get("step"))) is not None and math.isfinite(step)]
    return int(max(steps, default=0))


def audits(metrics: Sequence[Mapping[str, Any]]) -> list[Audit]:
    """Each audit once, by step: every log carries the latest one."""
    found: dict[int, Audit] = {}
    for line in metrics:
        step = number(line.get("loract/audited_step"))
        if step is None or not math.isfinite(step) or int(step) in found:
            continue
        tightened = number(line.get("loract/tightened"))
        found[int(step)] = Audit(
            step=int(step),
            cosine=number(line.get("loract/cosine")),
            error=number(line.get("loract/gradient_error")),
            tightened=int(tightened) if tightened is not None and math.isfinite(tightened) else 0,
        )
    return [found[step] for step in sorted(found)]


def compare(lines: Sequence[Line]) -> list[Comparison]:
    """Records as the demo and the benchmark write them, or a journal's measurements put together by workload."""
    found: list[Comparison] = []
    plain = [record for line in lines if "values" not in line and (record := _record(line)) is not None]
    if plain and plain[0].saved_bytes > 0:
        found.append(Comparison(title="", records=plain))
    works: dict[str, dict[str, Line]] = {}
    for line in lines:
        values = line.get("values")
        if not isinstance(values, dict):
            continue
        work = f"{line.get('model')}, {line.get('dtype')}, {line.get('batch')} x {line.get('length')} tokens"
        methods = works.setdefault(work, {})
        name, policy = str(line.get("method")), line.get("policy")
        method = methods.get(name)
        if method is None or method["policy"] != policy:  # a preset that has come to mean something else
            method = methods[name] = {"policy": policy}
        method.update(values)  # pyright: ignore[reportUnknownArgumentType]
    for work, methods in works.items():
        records = [r for name, values in methods.items() if (r := _record({**values, "name": name})) is not None]
        if not records or records[0].saved_bytes <= 0:
            continue
        failures = {name: str(values["reason"]) for name, values in methods.items() if "reason" in values}
        floor = number(methods[records[0].name].get("own_dtype_relative_error"))
        found.append(Comparison(title=work, records=records, floor=floor, failures=failures))
    return found


def _record(line: Line) -> Record | None:
    """The record of a line; None where a measurement is missing or is no number."""
    values = {f.name: number(line.get(f.name)) for f in fields(Record) if f.name not in ("name", "extra")}
    values = {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
    if not {"saved_bytes", "peak_bytes", "step_seconds", "time_ratio"} <= values.keys():
        return None
    measured: dict[str, Any] = {k: int(v) if k.endswith("_bytes") else v for k, v in values.items()}
    return Record(name=str(line.get("name")), **measured)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _lines(path: Path, faults: list[str]) -> list[Line]:
    """The objects of a JSON-lines file. A last line without its end is what a kill left, and no fault."""
    found: list[Line] = []
    text = _text(path)
    lines = text.split("\n")
    bad = 0
    for place, line in enumerate(lines, 1):
        value = _json(line) if line.strip() else {}
        if isinstance(value, dict):
            found += [value] if value else []  # pyright: ignore[reportUnknownArgumentType]
        elif place < len(lines):
            bad += 1
    if bad:
        faults.append(f"{path.name}: {bad} {'line' if bad == 1 else 'lines'} that cannot be read")
    return found


def _mapping(path: Path, faults: list[str]) -> Line:
    """The object of a JSON file."""
    text = _text(path)
    value: Any = _json(text) if text.strip() else {}
    if isinstance(value, dict):
        return value  # pyright: ignore[reportUnknownVariableType]
    faults.append(f"{path.name}: cannot be read")
    return {}


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _parsed(text: str, faults: list[str]) -> Line:
    try:
        value: Any = yaml.safe_load(text) if text else {}
    except (yaml.YAMLError, ValueError, RecursionError):
        value = None
    if isinstance(value, dict):
        return value  # pyright: ignore[reportUnknownVariableType]
    faults.append(f"{CONFIG}: no YAML with keys")
    return {}
