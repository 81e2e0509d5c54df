"""Records as one table: in the terminal, in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from loract.memory import MIB, Record

Cell = Callable[[Record, Record], str]

_COLUMNS: tuple[tuple[str, Cell], ...] = (
    ("", lambda r, _: r.name),
    ("saved MiB", lambda r, _: f"{r.saved_bytes / MIB:.0f}"),
    ("of LoRA's", lambda r, first: f"{100 * r.saved_bytes / first.saved_bytes:.1f} %"),
    ("peak MiB", lambda r, _: f"{r.peak_bytes / MIB:.0f}"),
    ("resident MiB", lambda r, _: _ABSENT if r.resident_bytes is None else f"{r.resident_bytes / MIB:.0f}"),
    ("time", lambda r, _: f"{r.time_ratio:.2f}x"),
    ("cosine", lambda r, _: _number(r.cosine, ".5f")),
    ("relative error", lambda r, _: _number(r.relative_error, ".2g")),
    ("train loss", lambda r, _: _number(r.train_loss, ".3f")),
    ("held-out loss", lambda r, _: _number(r.held_out_loss, ".3f")),
)


def rows(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Header and cells; bytes and time are set against the first record's. Columns that nobody measured are left out.

    Example:
        >>> plain = Record(name="LoRA", saved_bytes=4 * MIB, peak_bytes=5 * MIB, step_seconds=1.0, time_ratio=1.0)
        >>> rows([plain])
        (['', 'saved MiB', "of LoRA's", 'peak MiB', 'time'], [['LoRA', '4', '100.0 %', '5', '1.00x']])
    """
    cells = [[cell(record, records[0]) for record in records] for _, cell in _COLUMNS]
    kept = [i for i, column in enumerate(cells) if any(text != _ABSENT for text in column)]
    return [_COLUMNS[i][0] for i in kept], [[cells[i][j] for i in kept] for j in range(len(records))]


def markdown(records: Sequence[Record]) -> str:
    """The table in Markdown."""
    header, body = rows(records)
    return grid([header, ["---"] + ["---:"] * (len(header) - 1), *body])


def grid(lines: Sequence[Sequence[str]]) -> str:
    """Cells as a table in Markdown; the second line says how columns are aligned.

    Example:
        >>> print(grid([["a", "b"], ["---", "---:"], ["x", "1"]]), end="")
        | a | b |
        | --- | ---: |
        | x | 1 |
    """
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


_ABSENT = "-"


def _number(value: float | None, form: str) -> str:
    return _ABSENT if value is None else format(value, form)
