"""Counts of rows by the values of a column and by class, as a table and as a bar chart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dlspark.data import PARTS, is_missing
from dlspark.report import new_figure, shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_VALUES = 20
"""The most values of a column that are shown separately. Rarer texts are counted together, more numbers in ranges."""

_RANGES = 10


@dataclass(frozen=True)
class ColumnCounts:
    """Rows by the value, or range of values, of a column and by class.

    Attributes:
        column: the name of the column.
        values: the values or ranges as text.
        counts: integers of shape (values, classes).
    """

    column: str
    values: tuple[str, ...]
    counts: NDArray[np.int64]


def rows_of(counts: ColumnCounts) -> list[list[Any]]:
    """Rows of a table: the value, the count of each class, and the total."""
    return [[value, *row.tolist(), int(row.sum())] for value, row in zip(counts.values, counts.counts, strict=True)]


def by_value(name: str, values: NDArray[Any], labels: NDArray[Any], num_classes: int) -> ColumnCounts:
    """Count rows by the values of a column and by label."""
    if values.dtype.kind == "f" or (values.dtype.kind in "iu" and len(np.unique(values)) > MOST_VALUES):
        codes, names = _ranges(values)
    else:
        codes, names = _categories(name, values)
    counts = np.zeros((len(names), num_classes), np.int64)
    np.add.at(counts, (codes, labels), 1)
    kept = counts.sum(axis=1) > 0
    return ColumnCounts(name, tuple(n for n, keep in zip(names, kept, strict=True) if keep), counts[kept])


def _categories(name: str, values: NDArray[Any]) -> tuple[NDArray[np.int64], list[str]]:
    texts = np.array(["(empty)" if is_missing(value) else str(value) for value in values.tolist()], object)
    tally = Counter(texts.tolist())
    if name == "part":
        ordered = [part for part in PARTS if part in tally]
    else:
        ordered = [value for value, _ in sorted(tally.items(), key=lambda item: (-item[1], item[0]))]
    shown, rest = ordered[:MOST_VALUES], ordered[MOST_VALUES:]
    place = {value: i for i, value in enumerate(shown)}
    names = [*shown, f"({len(rest):,} others)"]
    return np.array([place.get(text, len(shown)) for text in texts.tolist()], np.int64), names


def _ranges(values: NDArray[Any]) -> tuple[NDArray[np.int64], list[str]]:
    known = np.isfinite(values)
    if not known.any():
        return np.zeros(len(values), np.int64), ["(unknown)"]
    edges = np.unique(np.histogram_bin_edges(values[known], _RANGES))
    codes = np.full(len(values), len(edges) - 1, np.int64)
    codes[known] = np.clip(np.searchsorted(edges, values[known], side="right") - 1, 0, len(edges) - 2)
    last = len(edges) - 2
    names = [f"{a:g} to {'' if i == last else 'below '}{b:g}" for i, (a, b) in enumerate(pairwise(edges))]
    return codes, [*names, "(unknown)"]


def bars(counts: ColumnCounts, classes: Sequence[str]) -> Figure:
    """A bar for each value, with stacked classes."""
    figure = new_figure(8, 0.9 + 0.32 * len(counts.values))
    axis = figure.subplots()
    left = np.zeros(len(counts.values))
    for label, name in enumerate(classes):
        axis.barh(range(len(counts.values)), counts.counts[:, label], left=left, label=shown(name))
        left += counts.counts[:, label]
    axis.set_yticks(range(len(counts.values)), [shown(value) for value in counts.values])
    axis.invert_yaxis()
    axis.set(xlabel="images", title=f"by {shown(counts.column)}")
    if len(classes) <= MOST_VALUES:
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure
