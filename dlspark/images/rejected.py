"""Rejected images: counted, listed with path and reason, and limited in number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dlspark.errors import DataError
from dlspark.storage import Store

REJECTED = "rejected.parquet"
MAX_LISTED = 100_000
"""The most rejected images listed with path and reason; more are only counted."""

_NAMED = 10  # in the manifest and in messages


@dataclass(frozen=True)
class Rejected:
    """The rejected images.

    Attributes:
        listed: pairs of path and reason, at most `MAX_LISTED`.
        rows: the number of rejected images.
        of: the number of all images.
    """

    listed: tuple[tuple[str, str], ...]
    rows: int
    of: int

    def summary(self) -> dict[str, Any]:
        """Plain data for the manifest: ``rows``, ``of``, ``file`` (None if there are none) and ``first``, at most ten."""
        first = [list(entry) for entry in self.listed[:_NAMED]]
        return {"rows": self.rows, "of": self.of, "file": REJECTED if self.rows else None, "first": first}

    def write(self, store: Store) -> None:
        """Write the list, if not empty, as Parquet with the text columns ``path`` and ``reason``."""
        if not self.listed:
            return
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = {
            name: pa.array([entry[i] for entry in self.listed], pa.string()) for i, name in enumerate(("path", "reason"))
        }
        with store.open_writer(REJECTED) as path:
            pq.write_table(pa.table(columns), path)


def judge(summary: Mapping[str, Any], strict: bool, max_rejected_fraction: float) -> None:
    """Check that not too many images were rejected.

    Raises:
        DataError: more than ``max_rejected_fraction`` of all images, or any if ``strict``; the message names the first.
    """
    count, total, named = summary["rows"], summary["of"], summary["first"]
    allowed = 0 if strict else int(total * max_rejected_fraction)
    if count <= allowed:
        return
    first = "; ".join(f"{path}: {reason}" for path, reason in named)
    more = f"; and {count - len(named)} more" if count > len(named) else ""
    limit = "strict" if strict else f"max_rejected_fraction={max_rejected_fraction}"
    raise DataError(
        f"Expected at most {allowed} of {total} images to be unreadable ({limit}); got {count}. {first}{more}. "
        f"Remove {'it' if count == 1 else 'them'}, or allow more with max_rejected_fraction (--max-rejected)."
    )
