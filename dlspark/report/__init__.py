"""One self-contained HTML page."""

from __future__ import annotations

from dlspark.report.page import Page, new_figure, png, write_page

__all__ = [
    "Page",
    "new_figure",
    "png",
    "write_page",
]
