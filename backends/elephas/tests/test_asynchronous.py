"""Elephas' asynchronous mode with real Spark: what it trains, what it refuses, what it leaves behind."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from dlspark import ConfigError, Trainer, WorkerError
from dlspark_elephas import ElephasOptions

FREQUENCIES = ("epoch", "batch")

# In a process of its own, because speculation is set when Spark starts.
_SPECULATING = """
import os, sys
os.environ["PYSPARK_PYTHON"] = sys.executable
from dlspark import ConfigError, Trainer
from dlspark.spark import get_session
from dlspark.testing import toys
from pyspark.sql import SparkSession

SparkSession.builder.master("local[2]").config("spark.speculation", "true").config("spark.ui.enabled", "false").getOrCreate()
get_session(2)
try:
    trainer = Trainer("elephas", num_workers=2, options={"mode": sys.argv[1]})
    trainer.fit(toys.dense_classifier(), toys.separable(64), batch_size=32)
except ConfigError as error:
    print(error)
"""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The parameter servers that runs have started, in order."""
    from dlspark_elephas.parameter_server import ParameterServer

    servers: list[Any] = []
    original = ParameterServer.start

    def start(self: Any) -> None:
        servers.append(self)
        original(self)

    monkeypatch.setattr(ParameterServer, "start", start)
    return servers


def is_closed(server: Any) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex((server.address.host, server.address.port)) != 0


@contextlib.contextmanager
def elephas_port_taken() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # another process has taken it, which serves as well
            stack.enter_context(socket.create_server(("127.0.0.1", 4000)))
        yield


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("dlspark-parameters")]


def fit(frequency: str = "epoch", *, num_workers: int = 2, model: Any = None, rows: int = 203, **changes: Any) -> Any:
    from dlspark.testing import toys

    trainer = Trainer(
        "elephas",
        num_workers=num_workers,
        options={"mode": "asynchronous", "frequency": frequency},
        store=changes.pop("store", None),
    )
    data = toys.separable(rows)
    return trainer.fit(model or toys.dense_classifier(), data, **{"batch_size": 32, "verbose": 0, "seed": 3, **changes})


@pytest.mark.spark
@pytest.mark.usefixtures("spark")
class TestOneWorker:
    """One worker with a server trains as one process does: the reference for all state that rounds must hand on."""

    @pytest.mark.parametrize("frequency", FREQUENCIES)
    def test_trains_as_one_process(self, frequency: str, tmp_path: Any) -> None:
        import keras

        from dlspark.testing import toys

        def model() -> Any:
            keras.utils.set_random_seed(1)
            layers = [keras.layers.Dense(8, activation="relu"), keras.layers.BatchNormalization(), keras.layers.Dense(3)]
            model = keras.Sequential([keras.layers.Input((8,)), *layers, keras.layers.Softmax()])
            model.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy", metrics=["accuracy"])
            return model

        def settings() -> dict[str, Any]:
            slower = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.5)
            return {"epochs": 3, "validation_data": toys.separable(50, seed=9), "callbacks": [slower]}

        ours = fit(frequency, num_workers=1, model=model(), store=tmp_path, **settings())
        theirs = Trainer("local").fit(model(), toys.separable(203), batch_size=32, verbose=0, seed=3, **settings())
        for mine, reference in zip(ours.weights, theirs.weights, strict=True):
            np.testing.assert_allclose(mine, reference, rtol=0, atol=1e-5)
        for name, values in theirs.history.items():
            np.testing.assert_allclose(ours.history[name], values, rtol=1e-4, atol=1e-5, err_msg=name)
        mine, reference = (result.model.optimizer.variables for result in (ours, theirs))
        for one, other in zip(mine, reference, strict=True):
            np.testing.assert_allclose(one.numpy(), other.numpy(), rtol=1e-4, atol=1e-5, err_msg=one.path)
        assert not list(tmp_path.rglob("optimizers")), "the workers' optimizers are removed from the store"


@pytest.mark.spark
@pytest.mark.usefixtures("spark")
class TestRuns:
    def test_history_rows_and_a_stated_loss(self, started: list[Any]) -> None:
        """By epoch. test_parameter_server.py attacks a run by batch, and the contract runs both."""
        from dlspark.testing import toys

        with elephas_port_taken():
            result = fit(rows=1003, epochs=3, batch_size=64, validation_data=toys.separable(50, seed=9))
        metrics = {"loss", "accuracy", "top_2"}
        assert set(result.history) == metrics | {f"val_{name}" for name in metrics}
        assert all(len(values) == 3 and np.isfinite(values).all() for values in result.history.values())
        assert result.history["loss"][-1] < 0.5
        assert result.history["val_loss"][-1] < 0.5
        assert sum(worker.rows for worker in result.workers) == 3 * 1003
        assert int(result.model.optimizer.iterations) == 3 * 16, "a worker counts its own steps"
        assert len(started) == 3
        assert all(server.address.host == "127.0.0.1" and is_closed(server) for server in started)
        assert len({server.address.secret for server in started}) == 3
        assert not threads()

    def test_a_failing_worker_leaves_no_server(self, started: list[Any]) -> None:
        from dlspark.testing import toys

        model = toys.failing_classifier(1)
        before = model.get_weights()
        with pytest.raises(WorkerError, match="this layer fails on rank 1"):
            fit("batch", model=model)
        assert len(started) == 1
        assert is_closed(started[0])
        assert not threads()
        assert all((a == b).all() for a, b in zip(before, model.get_weights(), strict=True))

    def test_an_interrupt_stops_the_server(self, started: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupted(*_: Any) -> None:
            assert not is_closed(started[0])
            raise KeyboardInterrupt

        monkeypatch.setattr("pyspark.rdd.RDD.collect", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fit()
        assert is_closed(started[0])
        assert not threads()


class TestShares:
    def test_steps_count_in_full_and_statistics_by_their_mean(self) -> None:
        from dlspark.testing import toys
        from dlspark_elephas.asynchronous_round import difference, shares

        assert shares(toys.counting_model(3), 4) == [1, 1, 1, 1, 0.25, 0.25, 1, 1]  # dense, batch normalisation, dense
        half = difference(np.float32(3), np.float32(1), 0.5)
        assert (half, half.dtype, half.shape) == (1, np.float32, ())


class TestOptions:
    def test_defaults(self) -> None:
        assert ElephasOptions().mode == "synchronous"
        assert ElephasOptions(mode="asynchronous", frequency="batch").frequency == "batch"

    @pytest.mark.parametrize("options", [{"mode": "socket"}, {"mode": "asynchronous", "frequency": "socket"}])
    def test_sockets_are_refused_with_the_reason(self, options: dict[str, str]) -> None:
        with pytest.raises(ConfigError, match=r"got 'socket'.*no authentication.*its own host.*with authentication"):
            Trainer("elephas", options=options)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"mode": "hogwild"}, "Expected mode to be 'synchronous' or 'asynchronous'; got 'hogwild'"),
            ({"mode": "asynchronous", "frequency": "step"}, "Expected frequency to be 'epoch' or 'batch'; got 'step'"),
            ({"frequency": "batch"}, "Expected no frequency with mode='synchronous'"),
            ({"parameter_server_mode": "http"}, "no option 'parameter_server_mode'"),
        ],
    )
    def test_others_are_refused(self, options: dict[str, str], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            Trainer("elephas", options=options)

    @pytest.mark.parametrize("mode", ["synchronous", pytest.param("asynchronous", marks=pytest.mark.full)])
    def test_speculation_is_refused(self, mode: str) -> None:
        done = subprocess.run(
            [sys.executable, "-c", _SPECULATING, mode], capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "starts slow tasks twice" in done.stdout

    def test_capabilities_follow_the_mode(self) -> None:
        from dlspark_elephas import ElephasBackend

        assert ElephasBackend().capabilities == ElephasBackend.capabilities
        ours = ElephasBackend(ElephasOptions(mode="asynchronous")).capabilities
        assert (ours.synchronous_gradients, ours.exact_rows, ours.deterministic, ours.resumable) == (
            False,
            True,
            False,
            False,
        )
