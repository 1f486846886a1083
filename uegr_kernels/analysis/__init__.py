"""Looking at a model or a run: what was selected, and what came of it. Imported on demand, as `uk.analysis`."""

from .selection import ParameterSelection, SelectionReport, plot_selection_report, selection_report

__all__ = ["ParameterSelection", "SelectionReport", "plot_selection_report", "selection_report"]
