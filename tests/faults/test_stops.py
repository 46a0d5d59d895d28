"""Callbacks that stop training on one rank only, where the others would wait in a sum; and on every rank, which is fine."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlspark import Trainer, WorkerError
from tests.faults.disturbed import ENGINES, EPOCHS, PROCESSES, events, fit, trainer

pytestmark = [pytest.mark.timeout(180), pytest.mark.spark]

TOLD_WITHIN_SECONDS = 5.0  # two heartbeats on a busy machine; the limit of a step is 600


def stops(hook: str, marker: Path, *, ranks: Iterable[int], slow: int = -1) -> Any:
    """A callback that stops training once on these ranks: in ``hook`` of the second epoch, after step 3 if it has steps.

    ``hook`` may name an exception to raise after that step instead. The rank ``slow`` decides later than the others.
    """
    import os

    import keras

    # No attribute: every rank resumes with rank 0's.
    mine = tuple(map(str, ranks))

    class Stops(keras.callbacks.Callback):
        epoch = 0

        def _decide(self, name: str) -> None:
            rank = os.environ["DLSPARK_RANK"]
            if name not in (hook, "on_train_batch_end" * (hook == "StopIteration")) or rank not in mine:
                return
            if rank == str(slow):
                time.sleep(3)
            if marker.exists() and len(mine) == 1:
                return
            marker.touch()
            if hook == "StopIteration":
                raise StopIteration
            self.model.stop_training = True

        def on_train_begin(self, logs: Any = None) -> None:
            self._decide("on_train_begin")

        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            self.epoch = epoch
            if epoch == 1:
                self._decide("on_epoch_begin")

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if self.epoch == 1 and batch == 2:
                self._decide("on_train_batch_end")

        def on_test_end(self, logs: Any = None) -> None:
            if self.epoch == 1:
                self._decide("on_test_end")

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            if epoch == 1:
                self._decide("on_epoch_end")

    return Stops()


HOOKS = {
    "on_train_batch_end": r"after step 3 of epoch 2, and rank {} went on to step 4: a callback sets stop_training",
    "on_epoch_end": r"after epoch 2, and rank {} went on to epoch 3: a callback sets stop_training",
    "on_train_begin": r"after step 1 of epoch 1, and rank {} went on to step 2: a callback sets stop_training",
    "on_epoch_begin": r"after step 1 of epoch 2, and rank {} went on to step 2: a callback sets stop_training",
    "on_test_end": r"after epoch 2, and rank {} went on to epoch 3: a callback sets stop_training",
    "StopIteration": r"after step 3 of epoch 2, and rank {} went on to step 4: a callback raises StopIteration",
}


@pytest.mark.usually(f"{PROCESSES} on_train_batch_end", f"{PROCESSES} on_epoch_end")
@pytest.mark.parametrize(
    ("engine", "hook", "rank"),
    [
        *[(PROCESSES, hook, 1) for hook in HOOKS],
        *[(engine, hook, rank) for engine in ("mirrored", "horovod") for hook in list(HOOKS)[:2] for rank in (0, 1)],
    ],
)
def test_one_rank_stops(spark: Any, engine: str, hook: str, rank: int, fault: Any, tmp_path: Path) -> None:
    """The error names it, long before a timeout, and is not retried."""
    marker = tmp_path / "stopped"
    alone = trainer(engine, tmp_path, timeouts=None, max_restarts=1)
    expected = rf"rank {rank} stopped training {HOOKS[hook].format(1 - rank)} on rank {rank} only"
    with pytest.raises(WorkerError, match=expected) as caught:
        fit(alone, fault("raise").prevent(), callbacks=[stops(hook, marker, ranks=[rank])])
    (told,) = (event["time"] for event in events(tmp_path) if event["kind"] == "failure")
    assert told - marker.stat().st_mtime < TOLD_WITHIN_SECONDS
    stop = 10.0  # timeouts: stop_seconds
    assert time.time() - told < stop + 10
    assert (caught.value.rank, caught.value.retryable) == (rank, False)


def test_an_early_stopping_on_rank_0_only_is_not_resumed_as_a_finished_run(spark: Any, fault: Any, tmp_path: Path) -> None:
    """As horovod/horovod#4027 has it. The last checkpoint is the one before."""
    marker = tmp_path / "stopped"
    prevented, callback = fault("raise").prevent(), stops("on_epoch_end", marker, ranks=[0])
    callback.rank_zero_only = True
    with pytest.raises(WorkerError, match="rank 0 stopped training after epoch 2, and rank 1 went on to epoch 3"):
        fit(trainer(PROCESSES, tmp_path), prevented, callbacks=[callback])
    resumed = fit(trainer(PROCESSES, tmp_path), prevented, callbacks=[callback])  # which stops once only
    assert resumed.resumed_from == "epoch-0001-step-000000"
    assert len(resumed.history["loss"]) == EPOCHS


@pytest.mark.usually(f"{PROCESSES} on_train_batch_end", f"{PROCESSES} on_epoch_end")
@pytest.mark.parametrize("engine", [PROCESSES, "mirrored", "horovod"])
@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_epoch_end", "StopIteration"])
def test_all_ranks_stop_after_the_same_step(spark: Any, engine: str, hook: str, fault: Any, tmp_path: Path) -> None:
    """As one process does, though one rank decides three heartbeats later than the other."""
    callback = stops(hook, tmp_path / "stopped", ranks=[0, 1], slow=1)
    prevented = fault("raise").prevent()
    result = fit(trainer(engine, tmp_path), prevented, callbacks=[callback])
    one = fit(Trainer("local"), prevented, callbacks=[callback])
    assert len(result.history["loss"]) == (EPOCHS if hook == "StopIteration" else 2)
    assert result.history.keys() == one.history.keys()
    for name, values in one.history.items():
        np.testing.assert_allclose(result.history[name], values, rtol=1e-5)


@pytest.mark.usually(PROCESSES)
@pytest.mark.parametrize("engine", [PROCESSES, *ENGINES])
def test_early_stopping(spark: Any, engine: str, fault: Any, tmp_path: Path) -> None:
    import keras

    early = keras.callbacks.EarlyStopping("val_loss", min_delta=10.0, patience=0)
    result = fit(trainer(engine, tmp_path), fault("raise").prevent(), callbacks=[early])
    assert len(result.history["loss"]) == 2
