"""One self-contained HTML page."""

from __future__ import annotations

from dlspark.report.page import Page, new_figure, png

__all__ = [
    "Page",
    "new_figure",
    "png",
]
