"""`loract report`: a run's page, built again from its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loract.cli.common import console, status


def report(
    run: Annotated[Path, typer.Argument(help="A run's folder, or one with a benchmark's records.jsonl.")],
) -> None:
    """Write RUN/report.html: what the run did, as one page that opens anywhere, without network."""
    from loract.report.page import write_report

    with status.status("drawing"):
        path = write_report(run)
    console.print(f"{path}: {path.stat().st_size / 1024:,.0f} KiB", highlight=False, markup=False, soft_wrap=True)
