"""Records as tables and plots."""

from loract.report.heatmap import heatmap
from loract.report.plot import comparison, frontier
from loract.report.table import markdown, rows
from loract.report.timeline import timeline

__all__ = ["comparison", "frontier", "heatmap", "markdown", "rows", "timeline"]
