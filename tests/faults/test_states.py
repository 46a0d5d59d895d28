from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import keras
import pytest

from dlspark import Trainer
from dlspark.testing import toys
from tests.faults.disturbed import PROCESSES
from tests.given_models import ROWS, given

EPOCHS = 2


class DiesOnce(keras.callbacks.Callback):  # type: ignore[misc]
    """Ends the process of rank 1 in the middle of the second epoch, the first time."""

    def __init__(self, marker: str) -> None:
        super().__init__()
        self.marker = marker

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.epoch = epoch

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if (self.epoch, batch, os.environ["DLSPARK_RANK"]) == (1, 3, "1") and not Path(self.marker).exists():
            Path(self.marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_state_that_is_summed_survives_a_restart_within_an_epoch(tmp_path: Path) -> None:
    model = given("a counter").model
    trainer = Trainer(PROCESSES, num_workers=2, store=tmp_path / "store", checkpoint_steps=3, max_restarts=1)
    dies = DiesOnce(str(tmp_path / "died"))
    result = trainer.fit(model, toys.separable(ROWS), epochs=EPOCHS, batch_size=25, callbacks=[dies], verbose=0)
    assert (result.restarts, (tmp_path / "died").exists()) == (1, True)
    assert len(result.history["loss"]) == EPOCHS
    rows = [variable for variable in model.weights if variable.name in ("rows", "total")]
    assert [int(variable) for variable in rows] == [EPOCHS * ROWS] * 2
