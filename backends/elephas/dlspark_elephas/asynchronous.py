"""AsynchronousMaster: one round of Elephas' asynchronous mode, with the driver's model as the parameter server's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from elephas.enums.modes import Mode
from elephas.spark_model import AsynchronousSparkModel, SparkModel
from numpy.typing import NDArray
from pyspark.rdd import RDD

from dlspark.plugin import Store, TrainJob, driver_host, set_weights
from dlspark_elephas.asynchronous_round import AsynchronousRoundWorker, optimizer_values, read_optimizer, set_optimizer
from dlspark_elephas.master import Master
from dlspark_elephas.parameter_server import ParameterServer
from dlspark_elephas.round import Outcome


class AsynchronousMaster(Master):
    """Serves the driver's weights for the length of a round, and takes over what came of them.

    Only weights go through the server. Every worker keeps an optimizer of its own from round to round, in the run's store:
    added up, counters would run N times too fast, and Adam's second moments mean nothing. The driver's optimizer is rank
    0's, and what a callback changes in it, such as the learning rate, goes to all workers with the next round.
    """

    def __init__(self, model: Any, job: TrainJob, frequency: str) -> None:
        self._frequency = frequency
        super().__init__(model, job)
        self._store = Store(job.uri)
        self._left_by_round: list[NDArray[Any]] | None = None

    def _make_spark_model(self) -> Any:
        return _ServingModel(self, batch_size=self._job.batch_size, frequency=self._frequency)

    def train_round(self, spark: Any, **config: Any) -> list[Outcome]:
        """Let every worker train one epoch of its part and exchange weights with the server meanwhile.

        Args:
            spark: the session.
            config: what `round_part` needs.

        Returns:
            One outcome per worker, in rank order.
        """
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
        """The optimizer's variables, by index, that are not as the last round left them; before the first round all."""
        now = optimizer_values(self._model)
        left = self._left_by_round
        if left is None:
            return dict(enumerate(now))
        return {i: value for i, value in enumerate(now) if value.tobytes() != left[i].tobytes()}

    def close(self) -> None:
        """Remove the workers' optimizers from the store."""
        self._store.child("optimizers").delete_all()


class _ServingModel(AsynchronousSparkModel):  # type: ignore[misc, unused-ignore]
    """Elephas' asynchronous model with our server and worker, and with an end to the server."""

    def __init__(self, master: Master, *, batch_size: int, frequency: str) -> None:
        # Not super().__init__: it makes Elephas' own server, of the model's JSON.
        SparkModel.__init__(self, master, batch_size=batch_size)
        self.mode = Mode.ASYNCHRONOUS
        self.frequency = frequency
        self.parameter_server_mode = "http"

    def _fit(self, rdd: RDD[int], *, host: str, weights: list[NDArray[Any]], **config: Any) -> None:
        """In place of Elephas' own, which throws away what workers return and leaves a broadcast of the weights behind."""
        self.parameter_server = ParameterServer(host, weights)
        with self.run_parameter_server():
            worker = AsynchronousRoundWorker(self.parameter_server.address, self.frequency, config)
            self.training_histories.extend(rdd.mapPartitions(worker.train).collect())

    @contextmanager
    def run_parameter_server(self) -> Iterator[None]:
        """In place of Elephas' own, which leaves the server running when a worker fails, or the user interrupts."""
        try:
            self.parameter_server.start()
            yield
        finally:
            self.parameter_server.stop()
