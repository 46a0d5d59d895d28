"""Refusals before the launch: too few slots, dynamic allocation, executors unlike the driver, failed pickling."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import keras
import pytest

from dlspark import ConfigError, DlsparkError, Trainer, load_backend
from dlspark.spark import preflight
from dlspark.spark.java import find_java
from dlspark.testing import toys

pytestmark = [pytest.mark.spark, pytest.mark.timeout(120)]

DATA = toys.separable(60)
REFUSAL_SECONDS = 15.0  # on a busy machine; nothing is launched
EXECUTORS_CASE = Path(__file__).with_name("executors_case.py")


@contextmanager
def refused(within_seconds: float, *told: str) -> Iterator[None]:
    """Expect a ConfigError that contains all of ``told``, in time."""
    started = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        yield
    seconds = time.monotonic() - started
    assert seconds <= within_seconds, f"refused after {seconds:.1f} s"
    for text in told:
        assert text in str(caught.value)


@pytest.fixture
def no_launch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a test in which any engine is asked to train."""

    def launched(self: Any, job: Any) -> Any:
        pytest.fail("the job was launched")

    for name in ("local", "mirrored", "horovod", "elephas"):
        try:
            monkeypatch.setattr(load_backend(name), "fit", launched)
        except DlsparkError:  # not installed here
            continue


@pytest.mark.usefixtures("no_launch")
class TestOnTheDriver:
    def test_f15_more_workers_than_slots(self, spark: Any, engine: str) -> None:
        with refused(REFUSAL_SECONDS, "Expected 4 free slots", "has 2"):
            Trainer(engine, num_workers=4).fit(toys.dense_classifier(), DATA, verbose=0)

    @pytest.mark.parametrize("backend", ["local", "mirrored", "horovod", "elephas"])
    @pytest.mark.parametrize("what", ["callback", "builder"])
    def test_f20_what_cannot_be_pickled(self, backend: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
        class Locked(keras.callbacks.Callback):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.lock = threading.Lock()

        lock = threading.Lock()

        def builder() -> Any:
            with lock:
                return toys.dense_classifier()

        if backend != "local":
            pytest.importorskip(f"dlspark_{backend}")
        trainer = Trainer(backend, num_workers=1 if backend == "local" else 2)
        monkeypatch.setattr(trainer._backend, "check", lambda job: pytest.fail("a session was looked at before"))
        toys.dense_classifier()  # Keras' first model takes a second
        if what == "callback":
            with refused(REFUSAL_SECONDS, "Callback Locked cannot be sent to workers"):
                trainer.fit(toys.dense_classifier(), DATA, callbacks=[Locked()], verbose=0)
        else:
            with refused(REFUSAL_SECONDS, "The builder cannot be sent to workers"):
                trainer.fit(builder, DATA, verbose=0)


class TestExecutorsThatDoNotAnswer:
    """Tasks of another job are in every slot, or the tasks fail."""

    def test_they_are_waited_for_in_bounded_time_and_nobody_is_disturbed(self, spark: Any) -> None:
        context = spark.sparkContext
        answers: list[Any] = []

        def others() -> None:
            def wait(rank: int) -> int:
                time.sleep(6)
                return rank

            answers.extend(context.parallelize(range(2), 2).map(wait).collect())

        thread = threading.Thread(target=others)
        thread.start()
        while not context.statusTracker().getActiveStageIds():
            time.sleep(0.05)
        context.addJobTag("mine")
        try:
            with refused(5, "2 short tasks", "within 1 s", "Other jobs of this session"):
                preflight.on_executors(spark, 2, lambda rank: rank, timeout_seconds=1)
            assert set(context.getJobTags()) == {"mine"}
        finally:
            context.removeJobTag("mine")
            thread.join()
        assert answers == [0, 1]
        assert preflight.on_executors(spark, 2, lambda rank: rank, timeout_seconds=60) == [0, 1]

    def test_tasks_that_fail_are_a_config_error(self, spark: Any) -> None:
        def fail(_: int) -> None:
            raise ImportError("no module of this name")

        with refused(60, "ImportError: no module of this name. Set PYSPARK_PYTHON"):
            preflight.on_executors(spark, 2, fail)


class TestALocalSession:
    """Its tasks run on the driver's machine, usually in the same Python."""

    def test_in_the_drivers_python_nothing_is_asked(
        self, spark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(preflight, "on_executors", lambda *_, **__: pytest.fail("a job was run"))
        preflight.check_executors(spark, preflight.Store(tmp_path / "run"), 2)

    def test_in_another_it_is(self, spark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        other = tmp_path / "python"  # the same Python at another path, which might be another environment
        other.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        other.chmod(0o755)
        monkeypatch.setattr(spark.sparkContext, "pythonExec", str(other))
        asked = []
        ask = preflight.on_executors
        monkeypatch.setattr(preflight, "on_executors", lambda *a, **k: asked.append(1) or ask(*a, **k))
        preflight.check_executors(spark, preflight.Store(tmp_path / "new" / "run"), 2)
        assert asked
        assert not (tmp_path / "new").exists()
        (tmp_path / "there").mkdir()
        preflight.check_executors(spark, preflight.Store(tmp_path / "there"), 2)
        assert not list((tmp_path / "there").iterdir())


def test_what_counts_as_a_difference() -> None:
    here = {"python": "3.11.4", "versions": {"a": "1", "b": None, "c": preflight.UNKNOWN, "d": "1"}}
    there = {"host": "far", "python": "3.11.9", "versions": {"a": "1", "b": "2", "c": "3", "d": preflight.UNKNOWN}}
    assert not preflight.differences(here, [there])
    assert preflight.differences(here, [there, {**there, "python": "3.12.4"}]) == ["Python 3.11.4 here and 3.12.4 on far"]
    lacking = {**there, "versions": {"a": "2", "b": None, "c": None, "d": "1"}}
    assert preflight.differences(here, [there, lacking]) == [
        "a 1 here and 2 on far",
        f"c {preflight.UNKNOWN} here and absent on far",
    ]


def test_a_distribution_whose_module_is_missing_counts_as_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["dlspark-keras", "dlspark-keras-mirrored"]
    assert all(preflight.describe_process(names)["versions"].values())
    monkeypatch.setitem(sys.modules, "dlspark_mirrored", None)
    assert [bool(version) for version in preflight.describe_process(names)["versions"].values()] == [True, False]


@pytest.fixture(scope="module")
def told(own_temporary_folder: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pytest.importorskip("elephas")
    find_java()
    folder = tmp_path_factory.mktemp("executors")
    out = folder / "out.json"
    ran = subprocess.run(
        [sys.executable, EXECUTORS_CASE, folder, out],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)},
        cwd=folder,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=500,
    )
    assert ran.returncode == 0, ran.stderr[-6000:]
    return dict(json.loads(out.read_text()))


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.timeout(600)
class TestExecutorsOfTheirOwn:
    """local-cluster: two executors in separate processes; see executors_case.py."""

    @pytest.mark.parametrize("engine", ["mirrored", "horovod"], indirect=True)
    def test_f16_dynamic_allocation_with_a_barrier(self, told: dict[str, Any], engine: str) -> None:
        refusal = told[f"dynamic {engine}"]
        assert refusal["type"] == "ConfigError"
        assert refusal["seconds"] <= REFUSAL_SECONDS
        assert "spark.dynamicAllocation.enabled=false" in refusal["error"]

    @pytest.mark.parametrize(
        ("case", "said"),
        [
            ("version", ["cloudpickle", " here and 0.0.1 on ", "Install the driver's versions"]),
            ("minor", ["(3, 7)", "PYSPARK_PYTHON"]),
            ("absent", ["dlspark-keras ", "and absent on", "Install the driver's versions"]),
            ("unwritable", ["run-", "Cannot write", "File too large", "Give Trainer another store"]),
            ("unseen", ["memory://runs", "no such file", "Give Trainer another store"]),
            ("nothing", ["/no/such/python: not found", "PYSPARK_PYTHON"]),
        ],
    )
    def test_executors_unlike_the_driver(self, told: dict[str, Any], case: str, said: list[str]) -> None:
        refusal = told[case]
        assert refusal.get("type") == "ConfigError"
        for text in said:
            assert text in refusal["error"]
        assert refusal["seconds"] < 60  # Spark may run a failing task four times and start Python each time

    def test_sound_ones_pass(self, told: dict[str, Any], engine: str) -> None:
        assert "error" not in told[f"sound {engine}"]
        assert (
            engine == "elephas" or told[f"sound {engine}"]["seconds"] < REFUSAL_SECONDS
        )  # elephas' check is the first, so it starts Python

    def test_nothing_stays_in_the_store_and_the_session(self, told: dict[str, Any]) -> None:
        assert told["left"] == []
        assert told["tags"] == []
