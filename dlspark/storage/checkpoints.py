"""Checkpoints of a run: written whole or not at all, verified before they are used, the last, the one before and the best.

A checkpoint is two files in the run's folder ``checkpoints``: the arrays (``epoch-0003-step-000000.npz``: after three
epochs and no step of the fourth) and, written last, a manifest beside it (``….json``) with the arrays' size and CRC-32
(RFC 1952), the position, and the history so far. Without a manifest that fits, arrays are not a checkpoint.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dlspark.errors import DataError, DlsparkError
from dlspark.storage.checksum import crc32_of
from dlspark.storage.store import Store

logger = logging.getLogger(__name__)

FOLDER = "checkpoints"
KEPT = 2  # the newest ones; the best is kept beside them
BEST_BY = ("val_loss", "loss")


@dataclass(frozen=True, kw_only=True)
class Position:
    """What a checkpoint says beside its arrays.

    Attributes:
        epoch: epochs that are complete.
        step: steps that are complete of the epoch after those.
        history: metric → one float for each complete epoch.
        epoch_seconds: of each of them.
        stopped: a callback ended the training here.
    """

    epoch: int
    step: int = 0
    history: Mapping[str, list[float]] = field(default_factory=dict)
    epoch_seconds: Sequence[float] = ()
    stopped: bool = False

    @property
    def name(self) -> str:
        """The checkpoint's name."""
        return f"epoch-{self.epoch:04d}-step-{self.step:06d}"


class Checkpoints:
    """The checkpoints of one run.

    Args:
        run: the run's folder in the store.
    """

    def __init__(self, run: Store) -> None:
        self._store = run.child(FOLDER)

    def save(self, arrays: Mapping[str, NDArray[Any]], position: Position) -> str:
        """Write a checkpoint and remove those that are no longer kept. Returns its name.

        Raises:
            StoreError: it cannot be written (a full disk, say); names path and bytes. Older checkpoints are intact.
            DataError: a weight is NaN or infinite; what could be resumed from is kept.
        """
        for name, array in arrays.items():
            if array.dtype.kind == "f" and name.startswith("w") and not np.isfinite(array).all():
                raise DataError(f"The weights are not finite (array {name}): this is not kept as a checkpoint.")
        size = sum(array.nbytes for array in arrays.values())
        with self._store.open_writer(f"{position.name}.npz", size=size) as path:
            np.savez(path, **arrays)
            manifest = {**asdict(position), "bytes": path.stat().st_size, "crc32": crc32_of(path)}
        self._store.write_json(f"{position.name}.json", manifest)
        self._remove_old(position.name)
        return position.name

    def names(self) -> list[str]:
        """The checkpoints that have a manifest, newest first. Whether their arrays are whole is not looked at."""
        found = [name.removesuffix(".json") for name in self._store.list() if name.endswith(".json")]
        return sorted(found, key=_order, reverse=True)

    def latest(self, weights: Mapping[str, tuple[str, tuple[int, ...]]] | None = None) -> str | None:
        """The newest checkpoint that is whole and fits; None when there are none. Others are passed over, with a warning.

        Args:
            weights: paths and shapes of the model's weights, by array; see `dlspark.worker.model_state.weight_shapes`.

        Raises:
            DataError: there are checkpoints, and none of them can be used; says why of each.
        """
        reasons = []
        for name in self.names():
            try:
                path = self._verified(name)
                if weights:
                    with np.load(path, allow_pickle=False) as file:
                        wrong = differing({key: file[key] for key in file.files if key.startswith("w")}, weights)
                    if wrong:
                        raise DataError(f"it is of another model: {wrong}")
            except DlsparkError as error:
                reasons.append(f"{name}: {error}")
                logger.warning("Checkpoint %s is passed over: %s", name, error)
                continue
            return name
        if reasons:
            raise DataError(
                f"None of the checkpoints in {self._store.uri!r} can be used. {' '.join(reasons)} Give fit resume=False to "
                "begin a new run."
            )
        return None

    def position(self, name: str) -> Position:
        """What its manifest says."""
        manifest = self._store.read_json(f"{name}.json")
        try:
            return Position(**{key: manifest[key] for key in Position.__dataclass_fields__})
        except (KeyError, TypeError) as error:
            raise DataError(f"The manifest of checkpoint {name!r} is not one that dlspark writes ({error}).") from error

    def load(self, name: str) -> dict[str, NDArray[Any]]:
        """Its arrays, after their checksum has been compared.

        Raises:
            DataError: size or checksum are not those in the manifest.
            StoreError: a file is missing.
        """
        with np.load(self._verified(name), allow_pickle=False) as file:
            return dict(file)

    def _verified(self, name: str) -> Path:
        self.position(name)
        manifest = self._store.read_json(f"{name}.json")
        if not {"bytes", "crc32"} <= set(manifest):
            raise DataError(f"The manifest of checkpoint {name!r} is not one that dlspark writes.")
        path = self._store.local_file(f"{name}.npz")
        found = path.stat().st_size
        if found != manifest["bytes"]:
            raise DataError(f"{name}.npz has {found:,} bytes; its manifest says {manifest['bytes']:,}.")
        if crc32_of(path) != manifest["crc32"]:
            raise DataError(f"{name}.npz has another checksum than its manifest says.")
        return path

    def _remove_old(self, newest: str) -> None:
        names = [name for name in self.names() if _order(name) <= _order(newest)]
        keep = {*names[:KEPT], self.best()}
        for name in names:
            if name not in keep:
                self._store.delete(f"{name}.json", missing_ok=True)  # first: arrays alone are no checkpoint
        self._store.delete_unfinished()
        whole = {f"{name}.npz" for name in self.names()}
        for file in self._store.list():
            if file.endswith(".npz") and file not in whole:  # of a removed one, or of a writer that was killed
                self._store.delete(file, missing_ok=True)

    def best(self) -> str | None:
        """The checkpoint at the end of the epoch with the lowest ``val_loss``, or ``loss`` where nothing is validated."""
        scored = []
        for name in self.names():
            try:
                position = self.position(name)
            except DlsparkError:
                continue  # latest() warns of it
            metric = next((each for each in BEST_BY if each in position.history), None)
            if metric is None or position.step or not position.history[metric]:
                continue
            if math.isfinite(position.history[metric][-1]):
                scored.append((position.history[metric][-1], name))
        return min(scored)[1] if scored else None


def differing(arrays: Mapping[str, NDArray[Any]], expected: Mapping[str, tuple[str, tuple[int, ...]]]) -> str | None:
    """The first difference between a checkpoint and the model that is to take it, in words; None when it fits.

    Args:
        arrays: the checkpoint's.
        expected: by the same names, what the model has: a variable's path and its shape.
    """
    for name, (path, shape) in expected.items():
        if name not in arrays:
            return f"the model has the variable {path!r} of shape {shape}, the checkpoint nothing in its place"
        if arrays[name].shape != shape:
            return f"the variable {path!r} has the shape {shape} in the model and {arrays[name].shape} in the checkpoint"
    more = sorted(set(arrays) - set(expected))
    return (
        f"the checkpoint has {len(more)} arrays that the model has no variable for: {', '.join(more[:3])}" if more else None
    )


def _order(name: str) -> list[int]:
    """Names in the order of what they name: epoch 10000 comes after epoch 9999."""
    return [int(number) for number in re.findall("[0-9]+", name)]
