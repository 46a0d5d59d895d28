"""For spark-submit: train the same model with one engine after the other, and write the result of each.

Arguments: store, a folder that all executors reach; the file to write; the engines, "local" (one process) among them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import keras
import numpy as np

from dlspark import Trainer, WorkerError
from dlspark.testing import toys

ROWS, EPOCHS, BATCH_SIZE = 101, 3, 32  # uneven steps, in uneven parts
WORKERS = 2
MEETING_SECONDS = 60.0


class Witness(keras.callbacks.Callback):
    """Records the process of each rank on unpickling, which precedes any failure of the rank.

    A rank waits until all ranks have written their record, because the failure of one ends the others.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        rank = os.environ.get("DLSPARK_RANK")
        if rank is None:  # on the driver
            return
        told = {"pid": os.getpid(), "cwd": os.getcwd(), "devices": os.environ.get("CUDA_VISIBLE_DEVICES")}
        if not (self.folder / f"{rank}.json").exists():  # a task that Spark retries may run anywhere
            (self.folder / f"{rank}.new").write_text(json.dumps(told))
            (self.folder / f"{rank}.new").rename(self.folder / f"{rank}.json")
        deadline = time.monotonic() + MEETING_SECONDS
        while len(list(self.folder.glob("*.json"))) < WORKERS and time.monotonic() < deadline:
            time.sleep(0.05)


def run(engine: str, store: Path) -> tuple[Any, dict[str, Any]]:
    """Return the trained weights, or None, and the outcome."""
    workers = 1 if engine == "local" else WORKERS
    folder = store / f"witnesses-{engine}"
    folder.mkdir(parents=True)
    weights: Any = None
    told: dict[str, Any]
    started = time.perf_counter()
    try:
        result = Trainer(backend=engine, num_workers=workers, store=store).fit(
            toys.dense_classifier(),
            toys.separable(ROWS),
            validation_data=toys.separable(37, seed=1),
            epochs=EPOCHS,
            batch_size=BATCH_SIZE,
            callbacks=[] if engine == "local" else [Witness(folder)],
            verbose=0,
        )
    except WorkerError as error:
        told = {"error": str(error), "rank": error.rank}
    else:
        weights = result.weights
        told = {
            "history": dict(result.history),
            "workers": [dataclasses.asdict(worker) for worker in result.workers],
        }
    told["witnesses"] = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    told["seconds"] = time.perf_counter() - started
    return weights, told


def main(store: Path, out: Path, engines: list[str]) -> None:
    """Run all ``engines``."""
    reference: Any = None
    told = {}
    for engine in engines:
        weights, told[engine] = run(engine, store)
        if engine == "local":
            reference = weights
        elif weights is not None and reference is not None:
            pairs = zip(weights, reference, strict=True)
            told[engine]["difference"] = max(float(np.abs(mine - local).max()) for mine, local in pairs)
    out.write_text(json.dumps(told, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
