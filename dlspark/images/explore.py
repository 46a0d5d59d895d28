"""explore: count the rows of a prepared dataset, show samples and find equal images.

It reads the shards on the driver, without Spark: pixels in small batches, other columns as a whole. Images are equal if
their pixels are equal after decoding and scaling.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dlspark._require import known
from dlspark.data import PARTS, ShardedRows, leak_warning
from dlspark.images.counts import MOST_VALUES, ColumnCounts, bars, by_value, rows_of
from dlspark.images.dataset import ImageDataset
from dlspark.images.write import SOURCE_SIZE
from dlspark.report import Page, new_figure, shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_IDENTIFIERS = frozenset({"id", "group"})
_BATCH = 256


@dataclass(frozen=True)
class Exploration:
    """The result of `explore`.

    Attributes:
        dataset: the dataset.
        counts: counts by part, then by each requested column.
        sizes: the number of images by original (height, width), most frequent first.
        duplicates: for each set of equal images, its rows as (part, class, id); sets in several parts are first.
    """

    dataset: ImageDataset
    counts: tuple[ColumnCounts, ...]
    sizes: tuple[tuple[tuple[int, int], int], ...]
    duplicates: tuple[tuple[tuple[str, str, str], ...], ...]
    _samples: dict[str, NDArray[np.uint8]] = field(repr=False)

    @property
    def leaking(self) -> int:
        """The number of sets of equal images in more than one part."""
        return sum(len({part for part, _, _ in rows}) > 1 for rows in self.duplicates)

    def warnings(self) -> list[str]:
        """Warnings about groups and equal images in more than one part."""
        torn = leak_warning(self.dataset.manifest["split"])
        found = [torn] if torn else []
        if self.leaking:
            found.append(
                f"{_sets(self.leaking)} in more than one part, so results on test will be better than on new images. "
                "Remove the copies, or give them one group and split by it."
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """Everything but the pictures, as plain data."""
        classes = self.dataset.classes
        return {
            "dataset": self.dataset.summary(),
            "counts": {
                each.column: {
                    value: dict(zip(classes, row.tolist(), strict=True))
                    for value, row in zip(each.values, each.counts, strict=True)
                }
                for each in self.counts
            },
            "sizes": [{"height": size[0], "width": size[1], "rows": rows} for size, rows in self.sizes],
            "duplicates": {
                "sets": len(self.duplicates),
                "sets_on_several_parts": self.leaking,
                "rows": [[list(row) for row in rows] for rows in self.duplicates],
            },
            "warnings": self.warnings(),
        }

    def figures(self) -> dict[str, Figure]:
        """Figures by name: ``samples``, then one for each of ``counts``.

        Raises:
            MissingDependencyError: Matplotlib is not installed.
        """
        found = {"samples": _sheet(self._samples)}
        found.update({f"by-{each.column}": bars(each, self.dataset.classes) for each in self.counts})
        return found

    def page(self, pictures: Mapping[str, bytes]) -> Page:
        """Everything on one page, with the figures of `figures` as PNG files."""
        page = Page(f"Dataset {self.dataset.uri.rpartition('/')[2]}")
        for warning in self.warnings():
            page.warning(warning)
        height, width = self.dataset.image_size
        rejected = self.dataset.manifest["rejected"]
        page.text(
            f"{self.dataset.uri}: images scaled to {height} x {width} pixels; {rejected['rows']:,} of {rejected['of']:,} "
            "could not be used."
        )
        page.heading("Samples of each class")
        page.picture(pictures["samples"], "sample images, a row for each class")
        for each in self.counts:
            page.heading(f"By {each.column}")
            page.table([each.column, *self.dataset.classes, "all"], rows_of(each))
            page.picture(pictures[f"by-{each.column}"], f"images of each class by {each.column}")
        page.heading("Image sizes as found")
        page.table(["height", "width", "images"], [[*size, rows] for size, rows in self.sizes[:MOST_VALUES]])
        page.heading("Equal images")
        page.text(f"{_sets(len(self.duplicates))} in the dataset, {self.leaking:,} of them in more than one part.")
        if self.duplicates:
            listed = [[i + 1, *row] for i, rows in enumerate(self.duplicates[:MOST_VALUES]) for row in rows]
            page.table(["set", "part", "class", "id"], listed)
        return page


def _sets(count: int) -> str:
    return "1 set of equal images is" if count == 1 else f"{count:,} sets of equal images are"


def explore(dataset: ImageDataset, *, columns: Sequence[str] | None = None, samples: int = 8, seed: int = 0) -> Exploration:
    """Explore a prepared dataset.

    Args:
        dataset: the dataset.
        columns: the columns to count by; None for all columns but ids, groups and copies of the group.
        samples: the number of images of each class to show.
        seed: determines the choice of samples.

    Raises:
        ConfigError: a column is missing.
    """
    there = [name for name in dataset.manifest["columns"] if name not in {"image", "label"}]
    offered = [name for name in there if name not in SOURCE_SIZE]
    for name in columns or ():
        known("a column of the dataset to count by", name, offered)
    chosen = [name for name in offered if name not in _IDENTIFIERS] if columns is None else list(columns)
    parts = {part: rows for part in PARTS if (rows := getattr(dataset, part)) is not None}
    groups = ["group"] if "group" in there else []
    table = _columns(parts, list(dict.fromkeys(["label", "id", *groups, *SOURCE_SIZE, *chosen])))
    if columns is None and groups:  # a layout may keep its group column
        chosen = [name for name in chosen if not np.array_equal(table[name], table["group"])]
    labels = table["label"]
    counts = [by_value("part", table["part"], labels, dataset.num_classes)]
    counts += [by_value(name, table[name], labels, dataset.num_classes) for name in chosen]
    found = Counter(zip(*(table[name].tolist() for name in SOURCE_SIZE), strict=True))
    return Exploration(
        dataset=dataset,
        counts=tuple(counts),
        sizes=tuple(found.most_common()),
        duplicates=_duplicates(parts, table, dataset.classes),
        _samples=_samples(parts, table, dataset.classes, samples, seed),
    )


def _columns(parts: dict[str, ShardedRows], names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Columns of all parts in order, with ``part`` and ``row``, the number of a row in its part."""
    gathered: dict[str, list[NDArray[Any]]] = {}
    for part, rows in parts.items():
        with rows.open() as reader:
            for name, values in reader.take(np.arange(rows.rows), names).items():
                gathered.setdefault(name, []).append(values)
        gathered.setdefault("part", []).append(np.full(rows.rows, part, object))
        gathered.setdefault("row", []).append(np.arange(rows.rows))
    return {name: np.concatenate(arrays) for name, arrays in gathered.items()}


def _batches(rows: ShardedRows) -> Iterator[NDArray[np.uint8]]:
    with rows.open() as reader:
        for start in range(0, rows.rows, _BATCH):
            yield reader.take(np.arange(start, min(start + _BATCH, rows.rows)), ["image"])["image"]


def _duplicates(
    parts: dict[str, ShardedRows], table: dict[str, NDArray[Any]], classes: Sequence[str]
) -> tuple[tuple[tuple[str, str, str], ...], ...]:
    equal: dict[bytes, list[int]] = {}
    number = 0
    for rows in parts.values():
        for images in _batches(rows):
            for image in images:
                equal.setdefault(hashlib.blake2b(image.tobytes(), digest_size=16).digest(), []).append(number)
                number += 1
    told = [
        tuple((table["part"][i], classes[table["label"][i]], str(table["id"][i])) for i in rows)
        for rows in equal.values()
        if len(rows) > 1
    ]
    return tuple(sorted(told, key=lambda rows: (len({part for part, _, _ in rows}) == 1, rows)))


def _samples(
    parts: dict[str, ShardedRows], table: dict[str, NDArray[Any]], classes: Sequence[str], count: int, seed: int
) -> dict[str, NDArray[np.uint8]]:
    """Images of each class, of shape (at most count, height, width, 3), from the first part with rows."""
    part, rows = next(iter(parts.items()))
    draw = np.random.default_rng(seed)
    found = {}
    with rows.open() as reader:
        for label, name in enumerate(classes):
            there = table["row"][(table["part"] == part) & (table["label"] == label)]
            chosen = np.sort(draw.permutation(there)[:count])
            found[name] = reader.take(chosen, ["image"])["image"]
    return found


def _sheet(samples: dict[str, NDArray[np.uint8]]) -> Figure:
    across = max(1, *(len(images) for images in samples.values()))
    figure = new_figure(1.1 * across + 1, 1.15 * len(samples))
    axes = figure.subplots(len(samples), across, squeeze=False)
    for row, (name, images) in zip(axes, samples.items(), strict=True):
        for axis in row:
            axis.set(xticks=[], yticks=[])
            axis.set_frame_on(False)
        row[0].set_ylabel(shown(name), rotation=0, ha="right", va="center")
        for axis, image in zip(row, images, strict=False):
            axis.imshow(image)
    return figure
