"""One self-contained HTML page."""

from __future__ import annotations

from dlspark.report.figure import new_figure, shown
from dlspark.report.page import Page, picture_file, png, write_page

__all__ = [
    "Page",
    "new_figure",
    "picture_file",
    "png",
    "shown",
    "write_page",
]
