"""Drivers that are asked to end, or killed: the checkpoint, the exit code, and whether the run resumes exactly."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from dlspark import RunInterruptedError
from tests.faults.disturbed import (
    ENGINES,
    EPOCHS,
    assert_equal,
    events,
    finished,
    fit,
    seconds_until_told,
    trainer,
    undisturbed,
)

pytestmark = [pytest.mark.timeout(180), pytest.mark.spark]


@pytest.mark.parametrize("engine", ["local", *ENGINES])
def test_f26_sigterm_leaves_a_checkpoint(spark: Any, engine: str, fault: Any, tmp_path: Path) -> None:
    injected = fault("end driver", rank=0)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RunInterruptedError) as caught:
        fit(trainer(engine, tmp_path), injected)
    assert seconds_until_told(time.time(), injected) < 25
    assert caught.value.code == 75
    assert signal.getsignal(signal.SIGTERM) == before
    result = fit(trainer(engine, tmp_path), injected)
    if engine == "elephas":
        assert result.resumed_from == "epoch-0001-step-000000"
    else:
        assert result.resumed_from > "epoch-0001-step-000000", "the checkpoint of SIGTERM, not that of the epoch"
    assert_equal(result, undisturbed(engine))


@pytest.mark.usually("mirrored", "local")
@pytest.mark.parametrize("engine", ["local", *ENGINES])
def test_ctrl_c_is_a_keyboard_interrupt(spark: Any, engine: str, fault: Any, tmp_path: Path) -> None:
    injected = fault("interrupt driver", rank=0)
    with pytest.raises(KeyboardInterrupt):
        fit(trainer(engine, tmp_path, max_restarts=1), injected)
    assert seconds_until_told(time.time(), injected) < 25
    assert spark.range(3).count() == 3, "the session goes on"
    result = fit(trainer(engine, tmp_path), injected)
    assert result.resumed_from == "epoch-0001-step-000000"
    assert_equal(result, undisturbed(engine))


def test_f26_a_sigterm_that_comes_too_late_is_told(fault: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import keras

    class EndsTheDriver(keras.callbacks.Callback):
        def on_train_end(self, logs: Any = None) -> None:
            signal.raise_signal(signal.SIGTERM)

    result = fit(trainer("local", tmp_path), fault("raise").prevent(), callbacks=[EndsTheDriver()])
    assert len(result.history["loss"]) == EPOCHS
    assert "SIGTERM arrived as the run on backend 'local' ended" in caplog.text


SCRIPT = """
import os, sys
from dlspark import Trainer
from dlspark.testing import toys
from dlspark.testing.faults import Fault, disturbed_classifier

if __name__ == "__main__":
    engine, folder, action, driver = sys.argv[1:5]
    fault = Fault(action=action, marker=folder + "/happened", rank=0, driver=int(driver) or os.getpid())
    result = Trainer(engine, num_workers=1 if engine == "local" else 2, store=folder + "/store").fit(
        disturbed_classifier(fault), toys.separable(1003), validation_data=toys.separable(257, seed=9),
        epochs=int(sys.argv[5]), batch_size=64, seed=3, verbose=2)
    print("resumed from", result.resumed_from)
"""


def script(tmp_path: Path, engine: str, action: str, *, driver: int = 0, epochs: int = EPOCHS) -> list[str]:
    """The command that runs it. ``driver`` 0 is its own process."""
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(SCRIPT))
    return [sys.executable, str(path), engine, str(tmp_path), action, str(driver), str(epochs)]


def test_f26_the_exit_code_says_that_it_can_be_resumed(tmp_path: Path) -> None:
    # Many epochs: an epoch here takes as long as it takes to notice the signal.
    command = script(tmp_path, "local", "end driver", epochs=200)
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 75, ended.stderr[-2000:]
    assert "To resume it, run the same command again." in ended.stderr


@pytest.mark.usually("elephas")
@pytest.mark.parametrize("engine", ENGINES)
def test_f5_a_driver_that_is_killed(engine: str, tmp_path: Path, spark: Any) -> None:
    """kill -9: the workers end by themselves; the same command resumes from the last checkpoint."""
    # The model names the fault's driver: it must be the same model in both runs.
    command = script(tmp_path, engine, "hang", driver=1)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as driver:
        deadline = time.monotonic() + 90
        while not (tmp_path / "happened").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert (tmp_path / "happened").exists()
        pids = {event["pid"] for event in events(tmp_path) if event["kind"] == "started"}
        assert len(pids) == 2
        workers = [psutil.Process(pid) for pid in pids]
        driver.kill()
        driver.wait(10)
        killed = time.monotonic()
        psutil.wait_procs(workers, timeout=30)
        assert not [worker for worker in workers if worker.is_running()], "orphaned workers"
        assert time.monotonic() - killed < 30
    again = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "resumed from epoch-0001-step-000000" in again.stdout
    assert_equal(finished(tmp_path), undisturbed(engine))
    epochs = [event["epoch"] for event in events(tmp_path) if event["kind"] == "epoch" and event["rank"] == 0]
    assert epochs == [0, 1, 2]
