"""Tables and figures of docs/results.md, from records: `python -m experiments.report` after the experiments.

Records that the document shows are kept in docs/results; `--take FOLDER` copies newer ones there first.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import activation_share, digits, docstrings, instructions, language, photographs, ranks
from experiments.study import Experiment
from experiments.tables import by_method
from experiments.tables import tables as tables_of
from loract.memory import MIB
from loract.report.panels import INK, label, panels, save

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "results.md"
FOLDER = ROOT / "docs" / "results"
TASKS = tuple(module.EXPERIMENT for module in (language, instructions, docstrings, digits, photographs))
NAMES = (*(task.name for task in TASKS), activation_share.NAME, ranks.NAME)
GROUPS = (
    ("LoRA, with checkpointing, VeLoRA, LoRA-FA", "#d1772c", "o", ("LoRA", "VeLoRA")),
    ("exact, balanced, smallest", "#3a86c8", "s", ("loract exact", "loract balanced", "loract smallest")),
    ("layer, sublayer, tensor", "#4fa05a", "^", ("loract",)),
)
"""Name, colour, mark, and how methods' names begin; the first that fits."""

NAMED = {"LoRA": (0, 6), "LoRA + checkpointing": (10, 6), "loract balanced": (0, -12)}
"""Methods whose names are written, and where, in points from their marks."""


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    """The records of one experiment."""
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def runs(folder: Path, task: Experiment) -> list[dict[str, Any]]:
    """The records of a task in its own sizes, from the machine that wrote the last of them."""
    sizes = {"batch": task.rows, "steps": task.steps, "rate": task.rate}
    own = [r for r in lines(folder, task.name) if all(r.get(name, size) == size for name, size in sizes.items())]
    return [r for r in own if all(r[name] == own[-1][name] for name in ("device", "threads", "torch"))]


def tables(folder: Path) -> dict[str, str]:
    """Every table, by the name that the document calls it by."""
    found: dict[str, str] = {}
    for task in TASKS:
        for title, drawn in tables_of(runs(folder, task)).items():
            found[f"{task.name}{title and f' at {title}'}"] = drawn
    found[activation_share.NAME] = activation_share.table(lines(folder, activation_share.NAME))
    found[ranks.NAME] = ranks.table(lines(folder, ranks.NAME))
    return found


def written(text: str, found: dict[str, str]) -> str:
    """The document with each table between its marks."""
    for name, drawn in found.items():
        start, end = f"<!-- table: {name} -->\n", "<!-- end -->"
        if start not in text:
            raise SystemExit(f"{DOCUMENT} has no place for the table {name!r}: {start.strip()}")
        head, rest = text.split(start, 1)
        text = head + start + drawn + end + rest.split(end, 1)[1]
    return text


def figure(folder: Path, out: Path) -> Path:
    """Score against saved memory, a panel for each task."""
    drawn, axes = panels(len(TASKS), columns=3, width=3.6, height=3.2)
    for plane, task in zip(axes, TASKS, strict=True):
        by_name = by_method([line for line in runs(folder, task) if not line.get("equal_memory", True)])
        seen = set[str]()
        for method, each in by_name.items():
            name, colour, mark, _ = next(g for g in GROUPS if method.startswith(g[3]))
            scores = [100 * v["accuracy"] if "accuracy" in v else v["loss"] for v in each]
            x, y = statistics.fmean(v["saved_bytes"] for v in each) / MIB, statistics.fmean(scores)
            spread = [[y - min(scores)], [max(scores) - y]]
            shown = {"label": name} if name not in seen else {}
            seen.add(name)
            plane.errorbar([x], [y], yerr=spread, fmt=mark, color=colour, markersize=5, elinewidth=0.8, **shown)
            if method in NAMED:
                put = {"xytext": NAMED[method], "textcoords": "offset points", "ha": "center"}
                plane.annotate(
                    method.removeprefix("loract ").removeprefix("LoRA + "), (x, y), fontsize=8, color=INK, **put
                )
        plane.set_xscale("log")
        score = "accuracy, %" if "accuracy" in next(iter(by_name.values()))[0] else "held-out loss"
        label(plane, "saved for backward, MiB", score, task.name, legend=False)
    drawn.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, labelcolor=INK
    )
    return save(drawn, out / "scores.svg")


def main(arguments: Sequence[str] | None = None) -> None:
    """Take records, draw, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--take", type=Path, metavar="FOLDER", help="copy these records first")
    given = parser.parse_args(arguments)
    if given.take is not None:
        FOLDER.mkdir(exist_ok=True)
        for name in NAMES:
            shutil.copyfile(given.take / f"{name}.jsonl", FOLDER / f"{name}.jsonl")
    print(figure(FOLDER, FOLDER))
    DOCUMENT.write_text(written(DOCUMENT.read_text(encoding="utf-8"), tables(FOLDER)), encoding="utf-8")
    print(DOCUMENT)


if __name__ == "__main__":
    main()
