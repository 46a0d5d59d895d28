"""A third-party layout with an option."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Slides:
    """Files named ``<label>_<number>``, of one type."""

    extension: str = ".png"

    def __call__(self, source: str, spark: Any) -> Any:
        found = sorted(Path(source).glob(f"*{self.extension}"))
        rows = [(str(path), path.stem, path.stem.partition("_")[0]) for path in found]
        return spark.createDataFrame(rows, "path string, id string, label string")
