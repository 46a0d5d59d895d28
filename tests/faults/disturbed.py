"""Trainings of two workers that a fault disturbs, and the same training undisturbed."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from dlspark import FitResult, Trainer
from dlspark.testing import toys
from dlspark.testing.faults import Fault, disturbed_classifier

ENGINES = ("mirrored", "horovod", "elephas")
PROCESSES = "processes"  # the stranger's plug-in, without a JVM: most faults do not depend on the engine
EPOCHS, STEPS = 3, 16
TIMEOUTS = {"heartbeat_seconds": 5.0, "step_seconds": 8.0}


def fit(trainer: Trainer, fault: Fault, **settings: Any) -> FitResult:
    return trainer.fit(
        disturbed_classifier(fault),
        toys.separable(1003),
        validation_data=toys.separable(257, seed=9),
        **{"epochs": EPOCHS, "batch_size": 64, "seed": 3, "verbose": 0, **settings},
    )


def trainer(engine: str, folder: Path, **settings: Any) -> Trainer:
    workers = 1 if engine == "local" else 2
    return Trainer(engine, num_workers=workers, store=folder / "store", **{"timeouts": TIMEOUTS, **settings})


def finished(folder: Path) -> FitResult:
    """The result of the run that another process has finished in ``folder``."""
    (run,) = folder.glob("store/run-*")
    with np.load(run / "trained.npz") as arrays:
        weights = [arrays[f"w{i}"] for i in range(sum(name.startswith("w") for name in arrays.files))]
    return replace(FitResult.from_json((run / "result.json").read_text()), weights=weights)


def undisturbed(engine: str) -> FitResult:
    """The same training without a fault. Two synchronous workers give the same bits on each engine."""
    return _undisturbed(PROCESSES if engine in ("mirrored", "horovod") else engine)


@cache
def _undisturbed(engine: str) -> FitResult:
    never = Fault(action="raise", marker="/nonexistent/happened", step=1 << 30)
    return fit(Trainer(engine, num_workers=1 if engine == "local" else 2), never)


def assert_equal(result: FitResult, expected: FitResult) -> None:
    assert result.history == expected.history
    for mine, theirs in zip(result.weights, expected.weights, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def events(folder: Path) -> list[dict[str, Any]]:
    (path,) = (folder / "store").glob("run-*/events.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def seconds_until_told(error_at: float, fault: Fault) -> float:
    happened = fault.happened_at()
    assert happened is not None, "the fault did not happen"
    return error_at - happened
