"""The contract of a backend, as tests. docs/contract.md describes each clause.

    class TestMyBackend(BackendContract):
        backend = "mine"

At most six launches serve all clauses. The backend's capabilities select the clauses, never its name.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from dlspark import ConfigError, FitResult, Trainer, WorkerError, load_backend
from dlspark.backend import Backend, Capabilities
from dlspark.data import ShardedRows, num_steps
from dlspark.job import TrainJob

ROWS, VALIDATION_ROWS, BATCH_SIZE, EPOCHS = 1003, 257, 64, 3
CLASS_WEIGHT = {0: 1.0, 1: 2.0, 2: 0.5}
TOLERANCE = 1e-5
STATED_LOSS = 0.5
HEAVY = ("keras", "tensorflow", "jax", "torch", "pyspark")  # and the modules of the backend's engine
GUARDED_VARIABLES = ("CUDA_VISIBLE_DEVICES", "KERAS_BACKEND", "DLSPARK_RANK")  # and those of the backend's engine
REFUSAL_SECONDS = 5.0


class BackendContract:
    """Base class of a backend's contract tests: subclass it and set ``backend``.

    Attributes:
        backend: the installed backend's name.
        options: the backend's options in these tests.
        num_workers: the world size; never more than the backend's ``max_workers``.
    """

    backend: ClassVar[str]
    options: ClassVar[Mapping[str, Any]] = {}
    num_workers: ClassVar[int] = 2

    @classmethod
    def backend_class(cls) -> type[Backend]:
        return load_backend(cls.backend)

    @classmethod
    def capabilities(cls) -> Capabilities:
        """Return the backend's capabilities with these options."""
        return cls.backend_class().from_options(dict(cls.options)).capabilities

    @classmethod
    def world_size(cls) -> int:
        return min(cls.num_workers, cls.capabilities().max_workers or cls.num_workers)

    @classmethod
    def trainer(cls, **changes: Any) -> Trainer:
        return Trainer(cls.backend, **{"num_workers": cls.world_size(), "options": dict(cls.options), **changes})

    @classmethod
    def fit_classifier(cls, trainer: Trainer, callbacks: Sequence[Any] = ()) -> FitResult:
        from dlspark.testing import toys

        return trainer.fit(
            toys.dense_classifier(),
            toys.separable(ROWS),
            validation_data=toys.separable(VALIDATION_ROWS, seed=9),
            epochs=EPOCHS,
            batch_size=BATCH_SIZE,
            seed=3,
            class_weight=CLASS_WEIGHT,
            callbacks=list(callbacks),
            verbose=0,
        )

    # The launches. Each runs once per class.

    @pytest.fixture(scope="class")
    @classmethod
    def surroundings(cls) -> dict[str, Any]:
        """Return the driver process' state before the first launch."""
        return _surroundings([*GUARDED_VARIABLES, *cls.backend_class().engine.environment])

    @pytest.fixture(scope="class")
    @classmethod
    def result(cls, surroundings: dict[str, Any]) -> FitResult:
        return cls.fit_classifier(cls.trainer())

    @pytest.fixture(scope="class")
    @classmethod
    def reference(cls) -> FitResult:
        """Return the same training in one process."""
        return cls.fit_classifier(Trainer("local"))

    @pytest.fixture(scope="class")
    @classmethod
    def failure(cls) -> tuple[WorkerError, list[Any], list[Any]]:
        """Run a job whose last rank raises; return (the error, the model's weights before, the weights after)."""
        from dlspark.testing import toys

        model = toys.failing_classifier(cls.world_size() - 1)
        before = model.get_weights()
        with pytest.raises(WorkerError) as caught:
            cls.trainer().fit(model, toys.separable(100), batch_size=20, verbose=0)
        return caught.value, before, model.get_weights()

    @pytest.fixture(scope="class")
    @classmethod
    def cut(cls, failure: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[WorkerError, Path, Any]:
        """Run a job that fails in its last epoch; return (the error, the store, the callback that caused it)."""
        folder = tmp_path_factory.mktemp("cut")
        strays = cls.capabilities().synchronous_gradients and cls.world_size() > 1
        callback = (_strays if strays else _cuts)(str(folder / "happened"), EPOCHS - 1)
        with pytest.raises(WorkerError) as caught:
            cls.fit_classifier(cls.trainer(store=folder / "store"), callbacks=[callback])
        return caught.value, folder / "store", callback

    @pytest.fixture(scope="class")
    @classmethod
    def resumed(cls, result: FitResult, cut: tuple[WorkerError, Path, Any]) -> FitResult:
        """Resume the run of `cut` with the same fit in its store."""
        _, store, callback = cut
        return cls.fit_classifier(cls.trainer(store=store), callbacks=[callback])

    # Clauses.

    def test_clause_1_success_changes_the_weights(self, result: FitResult) -> None:
        from dlspark.testing import toys

        initial = toys.dense_classifier().get_weights()
        assert all((a != b).any() for a, b in zip(initial, result.model.get_weights(), strict=True))
        assert all((a == b).all() for a, b in zip(result.weights, result.model.get_weights(), strict=True))

    def test_clause_1_failure_leaves_the_weights(self, failure: tuple[WorkerError, list[Any], list[Any]]) -> None:
        _, before, after = failure
        assert all((a == b).all() for a, b in zip(before, after, strict=True))

    def test_clause_2_history(self, result: FitResult) -> None:
        metrics = {"loss", "accuracy", "top_2"}
        assert set(result.history) == metrics | {f"val_{name}" for name in metrics}
        for values in result.history.values():
            assert len(values) == EPOCHS
            assert np.isfinite(values).all()
        assert len(result.epoch_seconds) == EPOCHS
        assert result.time_to_first_step_seconds > 0

    def test_clause_3_every_row_once(self, failure: Any) -> None:
        """Also clause 7: the backend trains again after a failure."""
        from dlspark.testing import toys

        rows, validation_rows = 101, 37
        result = self.trainer().fit(
            toys.counting_model(rows),
            toys.row_ids(rows),
            validation_data=toys.row_ids(validation_rows),
            epochs=2,
            batch_size=13,
            verbose=0,
        )
        assert result.history["seen_once"] == [rows, rows]
        assert result.history["val_seen_once"] == [validation_rows, validation_rows]
        assert sum(worker.rows for worker in result.workers) == 2 * rows
        assert np.abs(result.model.layers[1].get_weights()[2]).max() > 0, "batch-norm statistics are returned"

    def test_clause_4_steps_per_epoch(self, result: FitResult) -> None:
        assert int(result.model.optimizer.iterations) == EPOCHS * num_steps(ROWS, BATCH_SIZE)

    def test_clause_5_equals_one_process(self, result: FitResult, reference: FitResult) -> None:
        if self.capabilities().synchronous_gradients:
            for ours, theirs in zip(result.weights, reference.weights, strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)
            for name, values in reference.history.items():
                np.testing.assert_allclose(result.history[name], values, rtol=TOLERANCE, atol=TOLERANCE, err_msg=name)
        else:
            assert result.history["loss"][-1] < min(STATED_LOSS, result.history["loss"][0])

    def test_clause_5_synchronized_batch_norm(self) -> None:
        """Batch statistics of the whole step, with uneven parts, or an error: ``synchronized`` is never ignored."""
        import keras

        from dlspark.testing import toys

        if keras.backend.backend() != "tensorflow":  # Keras itself refuses
            with pytest.raises(ValueError, match="synchronized=True"):
                toys.normalised_classifier()
            return

        def fit(trainer: Trainer) -> FitResult:
            return trainer.fit(toys.normalised_classifier(), toys.separable(211), epochs=2, batch_size=29, verbose=0)

        if not self.capabilities().synchronous_gradients and self.world_size() > 1:
            with pytest.raises(ConfigError, match="synchronized=True"):
                fit(self.trainer())
            return
        alone, together = fit(Trainer("local")), fit(self.trainer())
        for ours, theirs in zip(together.weights, alone.weights, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)
        for name, values in alone.history.items():
            np.testing.assert_allclose(together.history[name], values, rtol=TOLERANCE, atol=TOLERANCE, err_msg=name)

    def test_clause_6_weights_are_equal_on_all_ranks(self, request: pytest.FixtureRequest) -> None:
        """The loop compares the ranks' weights after every epoch, and must detect a rank that changed its own."""
        if not self.capabilities().synchronous_gradients or self.world_size() == 1:
            return  # nothing to compare: there is one model, the driver's
        assert "weights on ranks" in str(request.getfixturevalue("cut")[0])

    def test_clause_7_worker_error(self, failure: tuple[WorkerError, list[Any], list[Any]]) -> None:
        error, _, _ = failure
        assert error.rank == self.world_size() - 1
        assert error.host
        assert "this layer fails on rank" in str(error)
        assert "toys.py" in error.remote_traceback

    def test_clause_8_unknown_option(self) -> None:
        with pytest.raises(ConfigError, match="no option 'no_such_option'"):
            self.trainer(options={"no_such_option": 1})

    def test_clause_8_too_many_workers(self) -> None:
        from dlspark.testing import toys

        workers = (self.capabilities().max_workers or 511) + 1
        started = time.monotonic()
        with pytest.raises(ConfigError, match=str(workers)):
            self.trainer(num_workers=workers).fit(toys.dense_classifier(), toys.separable(2000), batch_size=1000, verbose=0)
        assert time.monotonic() - started < REFUSAL_SECONDS * 2, "the job is rejected before any work"

    def test_clause_9_imports_nothing_heavy(self) -> None:
        module = self.backend_class().__module__.partition(".")[0]
        code = f"import sys, dlspark, {module}; dlspark.load_backend({self.backend!r}); print(*sys.modules)"
        path = os.pathsep.join(entry for entry in sys.path if entry)
        run = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        assert not {*HEAVY, *self.backend_class().engine.modules} & set(run.stdout.split())

    def test_clause_10_plain_data(self, result: FitResult, failure: tuple[WorkerError, list[Any], list[Any]]) -> None:
        options = self.backend_class().from_options(dict(self.options)).options
        assert pickle.loads(pickle.dumps(options)) == options
        job = TrainJob(
            uri="store", num_workers=2, epochs=1, batch_size=2, seed=0, train=ShardedRows("store", ("a",), (4,), "x", "y")
        )
        assert pickle.loads(pickle.dumps(job)) == job
        error = pickle.loads(pickle.dumps(failure[0]))
        assert (error.rank, error.host, str(error)) == (failure[0].rank, failure[0].host, str(failure[0]))
        copy = FitResult.from_json(result.to_json())
        assert (copy.history, copy.workers, copy.versions) == (result.history, result.workers, result.versions)

    def test_clause_11_surroundings(self, surroundings: dict[str, Any], result: FitResult, failure: Any) -> None:
        assert _settled(surroundings) == surroundings

    def test_clause_11_close_twice(self) -> None:
        backend = self.backend_class().from_options(dict(self.options))
        backend.close()
        backend.close()

    def test_clause_12_same_seed_same_weights(self, request: pytest.FixtureRequest, result: FitResult) -> None:
        """Both runs together trained every epoch a second time."""
        if self.capabilities().deterministic:
            resumed = request.getfixturevalue("resumed")
            assert resumed.history == result.history
            assert all((a == b).all() for a, b in zip(resumed.weights, result.weights, strict=True))

    def test_clause_13_cut_and_resumed(self, request: pytest.FixtureRequest, result: FitResult) -> None:
        """The same fit in the same store resumes a run that failed in its last epoch."""
        if not self.capabilities().resumable:
            return
        resumed = request.getfixturevalue("resumed")
        assert resumed.resumed_from == f"epoch-{EPOCHS - 1:04d}-step-000000"
        assert resumed.history == result.history
        assert all((a == b).all() for a, b in zip(resumed.weights, result.weights, strict=True))

    def test_reports_name_every_rank(self, result: FitResult) -> None:
        assert [worker.rank for worker in result.workers] == list(range(self.world_size()))
        assert sum(worker.rows for worker in result.workers) == EPOCHS * ROWS
        assert all(worker.peak_memory_bytes > 0 and worker.seconds > 0 and worker.device for worker in result.workers)
        assert all(0 <= worker.input_seconds < worker.seconds for worker in result.workers)


def _strays(marker: str, at_epoch: int) -> Any:
    import keras

    class Strays(keras.callbacks.Callback):
        """Changes the weights on rank 1 in one step of the epoch, unless the file ``marker`` exists."""

        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            self.epoch = epoch

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if self.epoch == at_epoch and os.environ["DLSPARK_RANK"] == "1" and not os.path.exists(marker):
                open(marker, "w").close()
                self.model.set_weights([weight + 1 for weight in self.model.get_weights()])

    return Strays()


def _cuts(marker: str, at_epoch: int) -> Any:
    import keras

    class Cuts(keras.callbacks.Callback):
        """Raises at the start of the epoch, unless the file ``marker`` exists."""

        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            if epoch == at_epoch and os.environ.get("DLSPARK_RANK", "0") == "0" and not os.path.exists(marker):
                open(marker, "w").close()
                raise ArithmeticError("cut short")

    return Cuts()


def _surroundings(variables: Sequence[str]) -> dict[str, Any]:
    import keras

    return {
        "variables": {name: os.environ.get(name) for name in variables},
        "policy": keras.config.dtype_policy().name,
        "threads": sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("dlspark")),
    }


def _settled(expected: dict[str, Any]) -> dict[str, Any]:
    """Wait up to ten seconds for threads to end, then return the surroundings."""
    deadline = time.monotonic() + 10
    while (now := _surroundings(list(expected["variables"]))) != expected and time.monotonic() < deadline:
        threading.Event().wait(0.05)
    return now
