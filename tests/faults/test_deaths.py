"""Workers that fail, die or are stopped: which error, how soon, and whether the run resumes exactly."""

from __future__ import annotations

import atexit
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from dlspark import Trainer, WorkerError
from dlspark.testing.faults import Fault
from tests.faults.disturbed import (
    ENGINES,
    PROCESSES,
    STEPS,
    TIMEOUTS,
    assert_equal,
    events,
    fit,
    seconds_until_told,
    trainer,
    undisturbed,
)

pytestmark = [pytest.mark.timeout(180), pytest.mark.spark]

DETECT_SECONDS = {"raise": 10.0, "kill": 5.0, "stop": TIMEOUTS["heartbeat_seconds"] + 10, "nan": 5.0, "memory": 10.0}


@pytest.mark.usually("local", PROCESSES)
@pytest.mark.parametrize("engine", ["local", PROCESSES, *ENGINES])
@pytest.mark.parametrize("action", ["raise", "memory", "nan"])
def test_f1_f11_f19_what_a_worker_can_say(spark: Any, engine: str, action: str, fault: Any, tmp_path: Path) -> None:
    """F1 an exception, F11 a loss that is NaN on one rank, F19 no memory: the rank, the step, its own words; soon."""
    rank = 0 if engine == "local" else 1
    injected = fault(action, rank=rank)
    with pytest.raises(WorkerError) as caught:
        fit(trainer(engine, tmp_path, max_restarts=1 if action == "nan" else 0), injected)
    assert seconds_until_told(time.time(), injected) < DETECT_SECONDS[action]
    error = caught.value
    assert (error.rank, error.epoch) == (rank, 1)
    assert error.host
    assert "Traceback" in error.remote_traceback
    words = {"raise": "this layer fails on rank", "memory": "out of memory: ", "nan": "NonFiniteLossError"}
    assert words[action] in str(error)
    if action == "nan":
        # One process alone does not wait for every step's loss, which would hold up a GPU.
        assert error.step == 20 - STEPS or (engine == "local" and error.step > 20 - STEPS)
        assert not any(event["kind"] == "restart" for event in events(tmp_path)), "trying again cannot help"
        assert [path.name for path in tmp_path.glob("store/*/checkpoints/*.npz")] == ["epoch-0001-step-000000.npz"]
    assert spark.range(10).count() == 10, "the session is still usable"


@pytest.mark.usually(PROCESSES, "kill", "stop horovod", "stop elephas")
@pytest.mark.parametrize("engine", [PROCESSES, *ENGINES])
@pytest.mark.parametrize("action", ["kill", "stop"])
def test_f2_f3_a_dead_or_stopped_worker(spark: Any, engine: str, action: str, fault: Any, tmp_path: Path) -> None:
    """F2 and F3: detected in time and restarted from the last checkpoint, with the weights of an undisturbed run."""
    injected = fault(action)
    result = fit(trainer(engine, tmp_path, max_restarts=1), injected)
    told = [event for event in events(tmp_path) if event["kind"] == "failure"]
    assert len(told) == 1
    assert told[0]["rank"] == 1
    assert seconds_until_told(told[0]["time"], injected) < DETECT_SECONDS[action]
    again = next(e for e in events(tmp_path) if e["kind"] == "step" and e["time"] > told[0]["time"])
    assert again["time"] - told[0]["time"] < 60
    assert again["epoch"] == 1
    assert result.restarts == 1
    assert_equal(result, undisturbed(engine))


@pytest.fixture
def small_cgroup() -> Iterator[Path]:
    """A control group whose processes may have 64 MiB more."""
    version_1 = Path("/sys/fs/cgroup/memory")
    folder = (version_1 if version_1.is_dir() else Path("/sys/fs/cgroup")) / f"dlspark-test-{os.getpid()}"
    limit = folder / ("memory.limit_in_bytes" if version_1.is_dir() else "memory.max")
    try:
        folder.mkdir()
        limit.write_text(str(64 << 20))
    except OSError as error:
        if folder.is_dir():
            folder.rmdir()
        pytest.skip(f"no control group with a memory limit can be made here: {error}")
    try:
        yield folder
    finally:
        deadline = time.monotonic() + 20
        while folder.is_dir():  # a process that is about to end still counts, listed or not
            try:
                folder.rmdir()
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)


@pytest.mark.usually(PROCESSES)
@pytest.mark.parametrize("engine", [PROCESSES, *ENGINES])
def test_f19_killed_by_the_kernel_for_memory(
    spark: Any, engine: str, fault: Any, tmp_path: Path, small_cgroup: Path
) -> None:
    """A process that is killed can say nothing; its guard saw the kernel do it."""
    injected = fault("oom kill", cgroup=str(small_cgroup))
    with pytest.raises(WorkerError, match=r"failed: out of memory: rank 1 on .* the kernel killed a process") as caught:
        fit(trainer(engine, tmp_path), injected)
    assert seconds_until_told(time.time(), injected) < 10
    assert (caught.value.rank, caught.value.epoch) == (1, 1)


@pytest.mark.usually("mirrored")
@pytest.mark.parametrize("engine", ["mirrored", "horovod"])
def test_f21_a_connection_that_is_reset(spark: Any, engine: str, fault: Any, tmp_path: Path) -> None:
    injected = fault("reset")
    result = fit(trainer(engine, tmp_path, max_restarts=1), injected)
    told = [event for event in events(tmp_path) if event["kind"] == "failure"]
    assert len(told) == 1
    assert seconds_until_told(told[0]["time"], injected) < 10
    assert result.restarts == 1
    assert_equal(result, undisturbed(engine))


@pytest.mark.full
def test_a_worker_that_dies_between_steps_is_the_one_that_is_named(spark: Any, fault: Any, tmp_path: Path) -> None:
    """The other rank notices it in the sum of the metrics."""
    import keras

    class Dies(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if batch == STEPS - 1 and os.environ["DLSPARK_RANK"] == "1":
                os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(WorkerError, match=r"rank 1 on .* ended without a word"):
        fit(trainer("mirrored", tmp_path), fault("raise").prevent(), callbacks=[Dies()])


@pytest.mark.full
def test_a_worker_that_is_stopped_between_two_rounds(spark: Any, tmp_path: Path) -> None:
    """Spark gives the next round's task to it all the same."""
    import keras

    marker = tmp_path / "stopped"

    class StopsAnIdleWorker(keras.callbacks.Callback):  # runs on the driver, as a copy
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            if not marker.exists():
                marker.touch()
                pids = [event["pid"] for event in events(tmp_path) if event["kind"] == "connected" and event["rank"] == 1]
                os.kill(pids[-1], signal.SIGSTOP)

    elephas = Trainer("elephas", num_workers=2, store=tmp_path / "store", timeouts=TIMEOUTS, max_restarts=1)
    never = Fault(action="raise", marker=str(tmp_path / "never"), step=1 << 30)
    result = fit(elephas, never, callbacks=[StopsAnIdleWorker()])
    assert marker.exists()
    (told,) = [event for event in events(tmp_path) if event["kind"] == "failure"]
    # Which rank's task gets the Python worker that is stopped is up to Spark.
    assert re.match(r"rank [01] worked before, and did not come back within 5 s", told["message"])
    assert result.restarts == 1
    assert_equal(result, undisturbed("elephas"))


@pytest.mark.full
def test_a_worker_that_stops_after_its_work(spark: Any, tmp_path: Path) -> None:
    """Nobody listens to it any more, and Horovod waits for its exit code."""
    import keras

    marker = tmp_path / "stopped"

    class StopsAtItsEnd(keras.callbacks.Callback):
        def on_train_end(self, logs: Any = None) -> None:
            if os.environ["DLSPARK_RANK"] == "1" and not marker.exists():
                marker.touch()
                atexit.register(os.kill, os.getpid(), signal.SIGSTOP)

    timeouts = {**TIMEOUTS, "end_seconds": 10.0, "stop_seconds": 2.0}
    horovod = Trainer("horovod", num_workers=2, store=tmp_path / "store", timeouts=timeouts, max_restarts=1)
    never = Fault(action="raise", marker=str(tmp_path / "never"), step=1 << 30)
    result = fit(horovod, never, callbacks=[StopsAtItsEnd()])
    assert marker.exists()
    (told,) = [event for event in events(tmp_path) if event["kind"] == "failure"]
    assert "the engine has not returned for 10 s" in told["message"]
    assert result.restarts == 1
    assert_equal(result, undisturbed("horovod"))


def test_the_guard_ends_with_its_mirrored_worker(spark: Any, fault: Any, tmp_path: Path) -> None:
    assert_equal(fit(trainer("mirrored", tmp_path), fault("raise").prevent()), undisturbed("mirrored"))
    guards = [
        p for p in psutil.process_iter(["cmdline"]) if "The guard: a small process" in " ".join(p.info["cmdline"] or ())
    ]
    mine = [guard for guard in guards if psutil.Process(os.getpid()) in guard.parents()]
    assert not mine
