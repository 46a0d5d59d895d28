"""Checkpoints of a run: written atomically and verified before use. The last two and the best are kept.

A checkpoint is two files in the folder ``checkpoints`` of the run: the arrays (``epoch-0003-step-000000.npz``: after three
epochs and no step of the fourth), and a manifest (``….json``) with the size and CRC-32 (RFC 1952) of the arrays, the
position and the history. The manifest is written last; without a matching manifest, arrays are not a checkpoint.
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
KEPT = 2  # the newest; the best is kept too
BEST_BY = ("val_loss", "loss")


@dataclass(frozen=True, kw_only=True)
class Position:
    """The position of a checkpoint in the training.

    Attributes:
        epoch: the number of complete epochs.
        step: the number of complete steps in the next epoch.
        history: metric → one float for each complete epoch.
        epoch_seconds: the duration of each complete epoch.
        stopped: whether a callback stopped the training here.
    """

    epoch: int
    step: int = 0
    history: Mapping[str, list[float]] = field(default_factory=dict)
    epoch_seconds: Sequence[float] = ()
    stopped: bool = False

    @property
    def name(self) -> str:
        """The name of the checkpoint."""
        return f"epoch-{self.epoch:04d}-step-{self.step:06d}"


class Checkpoints:
    """The checkpoints of one run.

    Args:
        run: the run's folder in the store.
    """

    def __init__(self, run: Store) -> None:
        self._store = run.child(FOLDER)

    def save(self, arrays: Mapping[str, NDArray[Any]], position: Position) -> str:
        """Write a checkpoint and remove outdated ones; returns its name.

        Raises:
            StoreError: it cannot be written, for instance to a full disk. Older checkpoints stay intact.
            DataError: a weight is NaN or infinite. Older checkpoints stay intact.
        """
        for name, array in arrays.items():
            if array.dtype.kind == "f" and name.startswith("w") and not np.isfinite(array).all():
                raise DataError(f"Expected finite weights; got NaN or infinity in the array {name}. No checkpoint is saved.")
        size = sum(array.nbytes for array in arrays.values())
        with self._store.open_writer(f"{position.name}.npz", size=size) as path:
            np.savez(path, **arrays)
            manifest = {**asdict(position), "bytes": path.stat().st_size, "crc32": crc32_of(path)}
        self._store.write_json(f"{position.name}.json", manifest)
        self._remove_old(position.name)
        return position.name

    def names(self) -> list[str]:
        """The checkpoints that have a manifest, newest first. Their arrays are not verified."""
        found = [name.removesuffix(".json") for name in self._store.list() if name.endswith(".json")]
        return sorted(found, key=_order, reverse=True)

    def latest(self, weights: Mapping[str, tuple[str, tuple[int, ...]]] | None = None) -> str | None:
        """The newest checkpoint that is intact and fits the model; None if there is none. Others are skipped with a warning.

        Args:
            weights: paths and shapes of the model's weights, by array; see `dlspark.worker.model_state.weight_shapes`.

        Raises:
            DataError: there are checkpoints, but none can be used; the message has the reasons.
        """
        reasons = []
        for name in self.names():
            try:
                path = self._verified(name)
                if weights:
                    with np.load(path, allow_pickle=False) as file:
                        wrong = differing({key: file[key] for key in file.files if key.startswith("w")}, weights)
                    if wrong:
                        raise DataError(f"it belongs to another model: {wrong}")
            except DlsparkError as error:
                reasons.append(f"{name}: {error}")
                logger.warning("Skipping checkpoint %s: %s", name, error)
                continue
            return name
        if reasons:
            raise DataError(
                f"Expected a usable checkpoint in {self._store.uri!r}; got none. {' '.join(reasons)} Give fit "
                "resume=False to start a new run."
            )
        return None

    def position(self, name: str) -> Position:
        """The position in the manifest of checkpoint ``name``."""
        manifest = self._store.read_json(f"{name}.json")
        try:
            return Position(**{key: manifest[key] for key in Position.__dataclass_fields__})
        except (KeyError, TypeError) as error:
            raise DataError(
                f"Expected a manifest of dlspark for checkpoint {name!r}; got another file ({error})."
            ) from error

    def load(self, name: str) -> dict[str, NDArray[Any]]:
        """The arrays of checkpoint ``name``, verified.

        Raises:
            DataError: size or checksum differ from the manifest.
            StoreError: a file is missing.
        """
        with np.load(self._verified(name), allow_pickle=False) as file:
            return dict(file)

    def _verified(self, name: str) -> Path:
        self.position(name)
        manifest = self._store.read_json(f"{name}.json")
        if not {"bytes", "crc32"} <= set(manifest):
            raise DataError(f"Expected a manifest of dlspark for checkpoint {name!r}; got one without size or checksum.")
        path = self._store.local_file(f"{name}.npz")
        found = path.stat().st_size
        if found != manifest["bytes"]:
            raise DataError(f"Expected {manifest['bytes']:,} bytes in {name}.npz; got {found:,}.")
        if crc32_of(path) != manifest["crc32"]:
            raise DataError(f"Expected the checksum of the manifest for {name}.npz; got another checksum.")
        return path

    def _remove_old(self, newest: str) -> None:
        names = [name for name in self.names() if _order(name) <= _order(newest)]
        keep = {*names[:KEPT], self.best()}
        for name in names:
            if name not in keep:
                self._store.delete(f"{name}.json", missing_ok=True)  # first: arrays alone are not a checkpoint
        self._store.delete_unfinished()
        whole = {f"{name}.npz" for name in self.names()}
        for file in self._store.list():
            if file.endswith(".npz") and file not in whole:  # of a removed checkpoint, or of a killed writer
                self._store.delete(file, missing_ok=True)

    def best(self) -> str | None:
        """The checkpoint at the end of the epoch with the lowest ``val_loss``, or ``loss`` without validation."""
        scored = []
        for name in self.names():
            try:
                position = self.position(name)
            except DlsparkError:
                continue  # latest() warns about it
            metric = next((each for each in BEST_BY if each in position.history), None)
            if metric is None or position.step or not position.history[metric]:
                continue
            if math.isfinite(position.history[metric][-1]):
                scored.append((position.history[metric][-1], name))
        return min(scored)[1] if scored else None


def differing(arrays: Mapping[str, NDArray[Any]], expected: Mapping[str, tuple[str, tuple[int, ...]]]) -> str | None:
    """The first difference between a checkpoint and a model, in words; None if the checkpoint fits.

    Args:
        arrays: the arrays of the checkpoint.
        expected: by the same names, the path and the shape of the model's variable.
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
    """A sort key by number: epoch 10000 is after epoch 9999."""
    return [int(number) for number in re.findall("[0-9]+", name)]
