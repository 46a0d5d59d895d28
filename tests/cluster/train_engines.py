"""For spark-submit: trains the same model by each engine, and in this process, and writes down what came out.

Arguments: store, a folder that all executors reach; the file to write; the engines.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np

from dlspark import Trainer
from dlspark.testing import toys

ROWS, EPOCHS = 101, 3  # with 32 a step: uneven steps of uneven parts


class Witness(keras.callbacks.Callback):  # type: ignore[misc]
    """Writes down in which process it was unpickled: on every rank of every engine that is before its training."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if rank := os.environ.get("DLSPARK_RANK"):  # not set on the driver
            self.folder.mkdir(parents=True, exist_ok=True)
            told = {"pid": os.getpid(), "cwd": os.getcwd(), "devices": os.environ.get("CUDA_VISIBLE_DEVICES")}
            (self.folder / f"{rank}.json").write_text(json.dumps(told))


def train(engine: str, workers: int, store: Path) -> tuple[Any, dict[str, Any]]:
    x, y = toys.separable(ROWS)
    witness = Witness(store / f"witness-{engine}")
    result = Trainer(backend=engine, num_workers=workers, store=store).fit(
        toys.dense_classifier(),
        (x, y),
        validation_data=toys.separable(37, seed=1),
        epochs=EPOCHS,
        batch_size=32,
        callbacks=[witness] if workers > 1 else [],
        verbose=0,
    )
    told = {
        "history": dict(result.history),
        "workers": [dataclasses.asdict(worker) for worker in result.workers],
        "witnesses": [json.loads(path.read_text()) for path in sorted(witness.folder.glob("*.json"))],
    }
    return result.weights, told


def main(store: Path, out: Path, engines: list[str]) -> None:
    reference, local = train("local", 1, store)
    results = {"local": local}
    for engine in engines:
        weights, results[engine] = train(engine, 2, store)
        pairs = zip(weights, reference, strict=True)
        results[engine]["difference"] = max(float(np.abs(mine - theirs).max()) for mine, theirs in pairs)
    out.write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
