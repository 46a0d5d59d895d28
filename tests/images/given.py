"""Collections as people have them, and what prepare_images must make of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image


@dataclass(frozen=True)
class Given:
    """A collection, and the expected dataset or error.

    Attributes:
        name: the case.
        make: writes the collection into an empty folder.
        rows: the expected number of rows of each class.
        rejected: regular expressions of the reasons, by id or by the end of the path.
        error: a regular expression of the expected DataError or ConfigError; then there is no dataset.
        passed_over: the expected numbers of files passed over, by reason.
        parts: the expected numbers of rows of the parts, if the case is about them.
        warning: a regular expression that a logged warning must match.
        layout: the layout.
        source: what is given as the source, from the folder.
        settings: further arguments of prepare_images.
    """

    name: str
    make: Callable[[Path], None]
    rows: Mapping[str, int] = field(default_factory=dict)
    rejected: Mapping[str, str] = field(default_factory=dict)
    passed_over: Mapping[str, int] = field(default_factory=dict)
    parts: Mapping[str, int] = field(default_factory=dict)
    error: str = ""
    warning: str = ""
    layout: Any = "folders"
    source: Callable[[Path], Any] = str
    settings: Mapping[str, Any] = field(default_factory=dict)


def image(path: Path, color: tuple[int, int, int] = (200, 20, 20)) -> Path:
    """Write a small image of one color and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (48, 32), color).save(path, quality=95)
    return path
