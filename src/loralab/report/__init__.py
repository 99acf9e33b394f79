"""Reports: a run directory becomes one HTML page."""

from loralab.report.page import build_report

__all__ = ["build_report"]
