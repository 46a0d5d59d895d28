"""Callbacks: copies run on the workers. Callbacks that stop training run on every rank; those that write files on rank 0."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import keras
import numpy as np

from dlspark import Trainer


class Diary(keras.callbacks.Callback):
    """Writes a line per epoch to a file, because attributes of a copy stay in the worker's process."""

    rank_zero_only = True  # only one rank writes the file

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        with self.path.open("a") as file:  # opened here, because an open file cannot be sent to a worker
            rank = os.environ["DLSPARK_RANK"]
            file.write(f"rank {rank}, epoch {epoch + 1}: val_accuracy {logs['val_accuracy']:.3f}\n")


def main() -> None:
    keras.utils.set_random_seed(1)
    x = np.random.default_rng(0).normal(size=(1000, 4)).astype(np.float32)
    y = (x.sum(axis=1) > 0).astype(np.int32)
    model = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(2, activation="softmax")])
    model.compile(keras.optimizers.Adam(0.05), "sparse_categorical_crossentropy", metrics=["accuracy"])

    with tempfile.TemporaryDirectory() as folder:
        diary, best = Path(folder, "diary.txt"), Path(folder, "best.keras")
        callbacks = [
            keras.callbacks.EarlyStopping("val_accuracy", min_delta=0.01, patience=2, restore_best_weights=True),
            keras.callbacks.ModelCheckpoint(best, "val_accuracy", save_best_only=True),
            Diary(diary),
        ]
        result = Trainer("local").fit(
            model, (x[:800], y[:800]), validation_data=(x[800:], y[800:]), epochs=40, callbacks=callbacks, seed=7
        )
        print(diary.read_text(), end="")
        print(f"stopped after {len(result.epoch_seconds)} of 40 epochs; the best model has {best.stat().st_size} bytes")


if __name__ == "__main__":
    main()
