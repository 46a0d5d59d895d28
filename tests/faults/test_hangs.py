"""Workers that hang, are slow, or run beside others: who is named, and how soon."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from dlspark import Trainer, WorkerError
from tests.faults.disturbed import (
    ENGINES,
    PROCESSES,
    TIMEOUTS,
    assert_equal,
    events,
    fit,
    seconds_until_told,
    trainer,
    undisturbed,
)

pytestmark = [pytest.mark.timeout(180), pytest.mark.spark]


@pytest.fixture
def thawed(tmp_path: Path) -> Iterator[None]:
    """Ends the workers with the processes above and below them that are stopped: nobody else could."""
    yield
    for pid in {event["pid"] for event in events(tmp_path) if event["kind"] == "started"}:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker = psutil.Process(pid)
            for process in [*worker.children(recursive=True), *worker.parents(), worker]:
                if process.status() == psutil.STATUS_STOPPED:
                    process.kill()


@pytest.mark.usefixtures("thawed")
@pytest.mark.usually("mirrored")
@pytest.mark.parametrize("engine", ENGINES)
def test_f3_a_host_that_stands_still(spark: Any, engine: str, fault: Any, tmp_path: Path) -> None:
    """Nobody on it ends the worker, and no connection breaks; the run ends all the same."""
    injected = fault("freeze")
    with pytest.raises(WorkerError, match="gave no sign of life") as caught:
        fit(trainer(engine, tmp_path), injected)
    stop = 10.0  # timeouts: stop_seconds
    assert seconds_until_told(time.time(), injected) < TIMEOUTS["heartbeat_seconds"] + stop + 10
    assert caught.value.rank == 1
    assert spark.range(10).count() == 10, "the session is still usable"


def test_f3_a_hang_in_the_drivers_own_process(fault: Any, tmp_path: Path) -> None:
    """With backend local, what hangs in Python is interrupted as Ctrl-C does it."""
    import keras

    class Hangs(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            if epoch == 1:
                threading.Event().wait(600)

    local = Trainer("local", store=tmp_path, timeouts={"step_seconds": 2, "stop_seconds": 1})
    with pytest.raises(WorkerError, match=r"rank 0 on .* made no progress for 2 s") as caught:
        fit(local, fault("raise").prevent(), callbacks=[Hangs()])
    assert "threading.Event().wait(600)" in str(caught.value)


def test_f3_says_where_a_mirrored_rank_hangs(spark: Any, fault: Any, tmp_path: Path) -> None:
    """A hang in Python: the process lives, its heart beats, and it gets nowhere. The other rank waits, and is not blamed."""
    injected = fault("hang")
    with pytest.raises(WorkerError, match=r"rank 1 on .* made no progress for 8 s \(timeouts: step_seconds\)") as caught:
        fit(trainer("mirrored", tmp_path), injected)
    assert seconds_until_told(time.time(), injected) < TIMEOUTS["step_seconds"] + 10
    assert caught.value.rank == 1


@pytest.mark.usually(PROCESSES)
@pytest.mark.parametrize("engine", [PROCESSES, "mirrored", "horovod"])
def test_f21_a_straggler_is_a_warning(
    spark: Any, engine: str, fault: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    injected = fault("slow", step=4, seconds=0.4)
    result = fit(trainer(engine, tmp_path), injected)
    assert "rank 1 on" in caplog.text
    assert "all wait for it" in caplog.text
    assert result.restarts == 0
    assert_equal(result, undisturbed(engine))


@pytest.mark.full
def test_f18_two_runs_at_once(spark: Any, tmp_path: Path, fault: Any) -> None:
    """In one session, in two threads; Elephas, as two barrier stages of two slots each cannot both be there."""
    from concurrent.futures import ThreadPoolExecutor

    prevented = fault("raise").prevent()
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(fit, trainer("elephas", tmp_path / name), prevented) for name in ("a", "b")]
        results = [run.result(timeout=150) for run in runs]
    for result in results:
        assert_equal(result, undisturbed("elephas"))
