"""One script for every backend: python any_backend.py [BACKEND [WORKERS]], for example `any_backend.py mirrored 2`."""

from __future__ import annotations

import sys

import keras
import numpy as np

from dlspark import Trainer


def points(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Random points in eight dimensions; the class is the index of the largest of the first three coordinates."""
    x = np.random.default_rng(seed).normal(size=(rows, 8)).astype(np.float32)
    return x, x[:, :3].argmax(axis=1).astype(np.int32)


def classifier() -> keras.Model:
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.layers.Input((8,)),
            keras.layers.Dense(16, activation="relu"),
            keras.layers.Dense(3, activation="softmax"),
        ]
    )
    model.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def main(backend: str = "local", workers: str = "1") -> None:
    # Only this line selects where training runs. batch_size is global: more workers split the same steps.
    trainer = Trainer(backend, num_workers=int(workers))
    result = trainer.fit(
        classifier(), points(1003, seed=0), validation_data=points(257, seed=1), epochs=5, batch_size=64, seed=7
    )
    for worker in result.workers:
        print(f"rank {worker.rank} on {worker.host}, {worker.device}: {worker.rows} rows")
    print(f"{result.backend}: loss {result.history['loss'][-1]:.6f}, accuracy {result.history['val_accuracy'][-1]:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
