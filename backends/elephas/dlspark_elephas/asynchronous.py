"""AsynchronousMaster: one round of Elephas' asynchronous mode, with the driver's model as the parameter server's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from elephas.spark_model import AsynchronousSparkModel, SparkModel
from numpy.typing import NDArray
from pyspark.rdd import RDD

from dlspark.plugin import Store, TrainJob, driver_host, set_weights
from dlspark_elephas.asynchronous_round import AsynchronousRoundWorker, optimizer_values, read_optimizer, set_optimizer
from dlspark_elephas.master import Master
from dlspark_elephas.parameter_server import ParameterServer
from dlspark_elephas.round import Outcome


class AsynchronousMaster(Master):
    """Serves the driver's weights during a round, and then assigns the result to the driver's model.

    Only weights go through the server. Every worker keeps its own optimizer between rounds, in the run's store: sums of
    counters would grow N times too fast, and sums of Adam's second moments are meaningless. The driver's optimizer is a copy
    of rank 0's. The next round sends all workers what callbacks have changed in it, such as the learning rate.
    """

    def __init__(self, model: Any, job: TrainJob, frequency: str) -> None:
        self._frequency = frequency
        super().__init__(model, job)
        self._store = Store(job.uri)
        self._left_by_round: list[NDArray[Any]] | None = None

    def _make_spark_model(self) -> Any:
        return _ServingModel(self, batch_size=self._job.batch_size, frequency=self._frequency)

    def train_round(self, spark: Any, **config: Any) -> list[Outcome]:
        """Let every worker train one epoch of its part while it exchanges weights with the server; see `Master`."""
        epoch: int = config["epoch"]
        changes = spark.sparkContext.broadcast(self._changes_by_callbacks())
        try:
            host, weights = driver_host(spark), self._model.get_weights()
            outcomes = self._fit(spark, host=host, weights=weights, optimizer_changes=changes, **config)
        finally:
            changes.destroy()
        set_weights(self._model, self._spark_model.parameter_server.weights)
        self._left_by_round = read_optimizer(self._store, epoch, 0, optimizer_values(self._model))
        set_optimizer(self._model, dict(enumerate(self._left_by_round)))
        self._store.child("optimizers").delete(str(epoch - 1), missing_ok=True)
        return outcomes

    def _changes_by_callbacks(self) -> dict[int, NDArray[Any]]:
        """The optimizer's variables, by index, that have changed since the last round; all of them before the first."""
        now = optimizer_values(self._model)
        left = self._left_by_round
        if left is None:
            return dict(enumerate(now))
        return {i: value for i, value in enumerate(now) if value.tobytes() != left[i].tobytes()}

    def close(self) -> None:
        """Remove the workers' optimizers from the store."""
        self._store.child("optimizers").delete_all()


class _ServingModel(AsynchronousSparkModel):  # type: ignore[misc, unused-ignore]
    """Elephas' asynchronous model with our server and worker, which stops the server."""

    def __init__(self, master: Master, *, batch_size: int, frequency: str) -> None:
        # Not super().__init__: it creates Elephas' own server from the model's JSON.
        SparkModel.__init__(self, master, batch_size=batch_size)
        self.frequency = frequency

    def _fit(self, rdd: RDD[int], *, host: str, weights: list[NDArray[Any]], **config: Any) -> None:
        """Replaces Elephas' method, which discards the workers' results and leaks a broadcast of the weights."""
        self.parameter_server = ParameterServer(host, weights)
        with self.run_parameter_server():
            worker = AsynchronousRoundWorker(self.parameter_server.address, self.frequency, config)
            self.training_histories.extend(rdd.mapPartitions(worker.train).collect())

    @contextmanager
    def run_parameter_server(self) -> Iterator[None]:
        """Replaces Elephas' method, which leaves the server running after a failure or an interrupt."""
        try:
            self.parameter_server.start()
            yield
        finally:
            self.parameter_server.stop()
