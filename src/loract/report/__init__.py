"""Records as tables and plots."""

from loract.report.plot import comparison
from loract.report.table import markdown, rows

__all__ = ["comparison", "markdown", "rows"]
