"""An experiment's records as tables."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from loract.memory import MIB
from loract.report.table import grid


def tables(records: Sequence[dict[str, Any]]) -> dict[str, str]:
    """In Markdown, by title: "" for training on all rows, "equal memory" where that was measured."""
    times = {line["method"]: line["values"]["time_ratio"] for line in records if "rounds" in line}
    trained = [line for line in records if "rounds" not in line]
    found = {"": _table([line for line in trained if not line["equal_memory"]], times)}
    if equal := [line for line in trained if line["equal_memory"]]:
        found["equal memory"] = _table(equal, {})
    return found


def by_method(records: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The values of each method's runs."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in records:
        found.setdefault(line["method"], []).append(line["values"])
    return found


def _table(records: Sequence[dict[str, Any]], times: dict[str, float]) -> str:
    """Means over the seeds, with what the seeds differ by."""
    by_name = by_method(records)
    plain = next(iter(by_name.values()))
    several, scored = len(plain) > 1, "accuracy" in plain[0]
    rows = {values["rows"] for each in by_name.values() for values in each}
    heads = ["method", *(["rows a step"] if len(rows) > 1 else []), *(["accuracy"] if scored else []), "held-out loss"]
    heads += ["saved MiB", "of LoRA's", "peak MiB", *(["time"] if times else [])]
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for name, each in by_name.items():
        cells = {
            "method": name,
            "rows a step": f"{statistics.median(values['rows'] for values in each):.0f}",
            "accuracy": _spread([100 * values["accuracy"] for values in each], 1, several) + " %" if scored else "",
            "held-out loss": _spread([values["loss"] for values in each], 3, several),
            "saved MiB": f"{_mean(each, 'saved_bytes') / MIB:.1f}",
            "of LoRA's": f"{100 * _mean(each, 'saved_bytes') / _mean(plain, 'saved_bytes'):.1f} %",
            "peak MiB": f"{_mean(each, 'peak_bytes') / MIB:.1f}",
            "time": f"{times.get(name, 0):.2f}x",
        }
        lines.append([cells[head] for head in heads])
    return grid(lines)


def _mean(each: Sequence[dict[str, Any]], name: str) -> float:
    return statistics.fmean(values[name] for values in each)


def _spread(values: Sequence[float], digits: int, several: bool) -> str:
    """Mean, and half of what lies between the least and the greatest."""
    half = (max(values) - min(values)) / 2
    return f"{statistics.fmean(values):.{digits}f}" + (f" ± {half:.{digits}f}" if several else "")
