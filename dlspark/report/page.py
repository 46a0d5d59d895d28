"""Page: one self-contained HTML file, for screen and print."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from dlspark._require import require
from dlspark.report.figure import INSTALL
from dlspark.storage import Store

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOTS_PER_INCH = 110


class Page:
    """Headings, paragraphs, tables and pictures, in the order in which they are added. All text is escaped."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._blocks: list[dict[str, Any]] = []

    def heading(self, text: str) -> None:
        """Add a heading."""
        self._blocks.append({"kind": "heading", "text": text})

    def text(self, text: str) -> None:
        """Add a paragraph."""
        self._blocks.append({"kind": "text", "text": text})

    def warning(self, text: str) -> None:
        """Add a highlighted paragraph."""
        self._blocks.append({"kind": "warning", "text": text})

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Add a table; columns of numbers are right-aligned, with thousands separators."""
        numbers = [
            i for i in range(len(columns)) if all(isinstance(row[i], int | float | None) for row in rows) and len(rows) > 0
        ]
        cells = [[_text(cell) for cell in row] for row in rows]
        self._blocks.append({"kind": "table", "columns": list(columns), "rows": cells, "numbers": numbers})

    def picture(self, data: bytes, text: str) -> None:
        """Add the bytes of a PNG file; ``text`` is the alternative text."""
        self._blocks.append({"kind": "picture", "text": text, "data": base64.b64encode(data).decode()})

    def render(self) -> str:
        """The HTML.

        Raises:
            MissingDependencyError: Jinja2 is not installed.
        """
        jinja2 = require("jinja2", install=INSTALL, purpose="Writing a report")
        environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
        template = environment.from_string(files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
        return str(template.render(title=self._title, blocks=self._blocks))


def png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.draw_without_rendering()  # the first pass of Matplotlib's layout does not know all sizes yet
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH)
    return buffer.getvalue()


def write_page(store: Store, name: str, page: Page, pictures: Mapping[str, bytes]) -> None:
    """Write each picture as the file `picture_file`, and then the page, whose file has the given name."""
    for caption, data in pictures.items():
        store.write_bytes(picture_file(caption), data)
    store.write_bytes(name, page.render().encode("utf-8", "backslashreplace"))  # a file name may be no Unicode


def picture_file(caption: str) -> str:
    """The name of the file of a picture; a slash, as in the name of a column, is written as ``%2F``."""
    return f"{caption.replace('/', '%2F')}.png"


def _text(cell: Any) -> str:
    if isinstance(cell, int) and not isinstance(cell, bool):
        return f"{cell:,}"
    if isinstance(cell, float):
        return f"{cell:,.4g}"
    return "" if cell is None else str(cell)
