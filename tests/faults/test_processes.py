"""Processes that fail, die, hang or are slow: which error, how soon, and whether the run resumes exactly.

Most faults do not depend on the engine and run on the stranger's plug-in, without a JVM. `make test-all` repeats them on
every engine.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from dlspark import FitResult, RunInterruptedError, Trainer, WorkerError
from dlspark.testing import toys
from dlspark.testing.faults import Fault, disturbed_classifier

pytestmark = [pytest.mark.timeout(180), pytest.mark.spark]

ENGINES = ("mirrored", "horovod", "elephas")
PROCESSES = "processes"  # the stranger's plug-in
EPOCHS, STEPS = 3, 16
TIMEOUTS = {"heartbeat_seconds": 5.0, "step_seconds": 8.0}
DETECT_SECONDS = {"raise": 10.0, "kill": 5.0, "stop": TIMEOUTS["heartbeat_seconds"] + 10, "nan": 5.0, "memory": 10.0}


def fit(trainer: Trainer, fault: Fault, **settings: Any) -> FitResult:
    return trainer.fit(
        disturbed_classifier(fault),
        toys.separable(1003),
        validation_data=toys.separable(257, seed=9),
        **{"epochs": EPOCHS, "batch_size": 64, "seed": 3, "verbose": 0, **settings},
    )


def trainer(engine: str, folder: Path, **settings: Any) -> Trainer:
    workers = 1 if engine == "local" else 2
    return Trainer(engine, num_workers=workers, store=folder / "store", timeouts=TIMEOUTS, **settings)


@pytest.fixture
def fault(tmp_path: Path) -> Callable[..., Fault]:
    return lambda action, **where: Fault(action=action, marker=str(tmp_path / "happened"), **where)


@cache
def undisturbed(engine: str) -> FitResult:
    """The same training without a fault."""
    marker = Path(f"/nonexistent/{engine}")  # never made: the step is never reached
    return fit(
        Trainer(engine, num_workers=1 if engine == "local" else 2), Fault(action="raise", marker=str(marker), step=1 << 30)
    )


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
def thawed() -> Iterator[None]:
    """Ends the processes below this one that are stopped: nobody else could."""
    yield
    for process in psutil.Process().children(recursive=True):
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
    """kill -9: the workers end by themselves; the same command goes on where the last checkpoint was."""
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
    result = FitResult.from_json(next(tmp_path.glob("store/run-*/result.json")).read_text())
    assert result.history == undisturbed(engine).history
    trained = np.load(next(tmp_path.glob("store/run-*/trained.npz")))
    for i, expected in enumerate(undisturbed(engine).weights):
        np.testing.assert_array_equal(trained[f"w{i}"], expected)
    epochs = [event["epoch"] for event in events(tmp_path) if event["kind"] == "epoch" and event["rank"] == 0]
    assert epochs == [0, 1, 2]


def test_f18_two_runs_at_once(spark: Any, tmp_path: Path, fault: Any) -> None:
    """In one session, in two threads; Elephas, as two barrier stages of two slots each cannot both be there."""
    from concurrent.futures import ThreadPoolExecutor

    prevented = fault("raise").prevent()
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(fit, trainer("elephas", tmp_path / name), prevented) for name in ("a", "b")]
        results = [run.result(timeout=150) for run in runs]
    for result in results:
        assert_equal(result, undisturbed("elephas"))


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


def test_the_guard_ends_with_its_mirrored_worker(spark: Any) -> None:
    undisturbed("mirrored")
    guards = [
        p for p in psutil.process_iter(["cmdline"]) if "The guard: a small process" in " ".join(p.info["cmdline"] or ())
    ]
    mine = [guard for guard in guards if psutil.Process(os.getpid()) in guard.parents()]
    assert not mine
