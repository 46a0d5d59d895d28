"""ImageDataset: a folder of shards and the manifest that describes them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dlspark.data import PARTS, ShardedRows
from dlspark.errors import DataError
from dlspark.storage import Store

MANIFEST = "manifest.json"
FORMAT = 2


@dataclass(frozen=True)
class ImageDataset:
    """A prepared dataset: images of one size with labels, ids and further columns. Plain, picklable data.

    Attributes:
        uri: the folder.
        classes: names of the classes, sorted; a label is the index into them.
        image_size: (height, width) in pixels.
        train: the rows for `Trainer.fit`: ``x`` is uint8 of shape (rows, height, width, 3), RGB; ``y`` is int32 of shape
            (rows,). None if the part is empty.
        validation: as ``train``.
        test: as ``train``.
        manifest: the manifest.
    """

    uri: str
    classes: tuple[str, ...]
    image_size: tuple[int, int]
    train: ShardedRows | None
    validation: ShardedRows | None
    test: ShardedRows | None
    manifest: Mapping[str, Any] = field(repr=False)

    @classmethod
    def open(cls, uri: str | os.PathLike[str]) -> ImageDataset:
        """The dataset that `prepare_images` finished at ``uri``.

        Raises:
            DataError: there is no finished dataset, or it has another format version.
        """
        store = Store(uri)
        if not store.exists(MANIFEST):
            raise DataError(
                f"Expected a prepared dataset at {store.uri!r}; got no {MANIFEST} there. Prepare it with `dlspark prepare` "
                "or prepare_images."
            )
        manifest = store.read_json(MANIFEST)
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise DataError(
                f"Expected a manifest of format {FORMAT} at {store.uri!r}; got one of another version of dlspark. Prepare "
                "the dataset again."
            )
        classes = tuple(manifest["classes"])
        parts = {part: _rows(store.uri, classes, manifest["parts"].get(part)) for part in PARTS}
        height, width = manifest["image_size"]
        return cls(uri=store.uri, classes=classes, image_size=(height, width), manifest=manifest, **parts)

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.classes)

    def class_weight(self) -> dict[int, float]:
        """Weights for `Trainer.fit` that give all classes the same total weight in the loss.

        The weight of class c is n / (k · n_c), for n training rows, n_c of them of class c, and k classes with training
        rows: scikit-learn's "balanced". A class without training rows has no weight.
        """
        by_class = self.manifest["parts"]["train"]["by_class"]
        counts = {label: by_class[name] for label, name in enumerate(self.classes) if by_class.get(name)}
        return {label: sum(counts.values()) / (len(counts) * count) for label, count in counts.items()}

    def summary(self) -> dict[str, Any]:
        """A summary as plain data: sizes, rows by part and class; what was rejected, passed over, missing and trimmed."""
        parts = self.manifest["parts"]
        return {
            "uri": self.uri,
            "image_size": list(self.image_size),
            "classes": list(self.classes),
            "parts": {part: {"rows": parts[part]["rows"], "by_class": parts[part]["by_class"]} for part in parts},
            "size_bytes": sum(file["size_bytes"] for part in parts.values() for file in part["files"]),
            "rejected": self.manifest["rejected"]["rows"],
            "passed_over": self.manifest.get("passed_over", {}),
            "missing": self.manifest.get("missing", {}),
            "trimmed": self.manifest.get("trimmed", {}),
            "split": self.manifest["split"],
        }


def _rows(uri: str, classes: tuple[str, ...], part: Mapping[str, Any] | None) -> ShardedRows | None:
    if not part or not part["rows"]:
        return None
    return ShardedRows(
        uri=uri,
        files=tuple(file["file"] for file in part["files"]),
        rows_per_file=tuple(file["rows"] for file in part["files"]),
        x="image",
        y="label",
        num_classes=len(classes),
        classes=classes,
        crc32=tuple(file["crc32"] for file in part["files"]),
    )
