"""Master: the interface of the driver's model to Elephas, and one round of Elephas' synchronous mode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from elephas.spark_model import SparkModel, average_and_subtract
from numpy.typing import NDArray

from dlspark.plugin import Endpoint, Feed, TrainJob
from dlspark_elephas.round import Outcome, RoundWorker, evaluate_part, set_state, state_of

__all__ = ["Master", "Outcome"]


class Master:
    """Wraps the driver's model for Elephas: its "weights" are the model's variables and the optimizer's.

    Elephas creates a new optimizer in every round, which silently resets momentum and learning-rate schedules at every
    epoch. Here the optimizer's variables are sent and averaged together with the weights instead.
    """

    def __init__(self, model: Any, job: TrainJob) -> None:
        self._model = model
        self._job = job
        # SparkModel reads these attributes; our RoundWorker does not use them.
        self.loss = None
        self._compile_metrics = None
        self.optimizer = model.optimizer
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        self._build_metrics()
        self._spark_model = self._make_spark_model()

    def _make_spark_model(self) -> Any:
        return _AveragingModel(self, batch_size=self._job.batch_size)

    def get_weights(self) -> list[NDArray[Any]]:
        return state_of(self._model)

    def set_weights(self, values: Sequence[NDArray[Any]]) -> None:
        set_state(self._model, values)

    def to_json(self) -> str:
        return "{}"

    def compile(self, **_: Any) -> None:
        """Do nothing: the model is compiled already."""

    def train_round(self, spark: Any, **config: Any) -> list[Outcome]:
        """Let every worker train one epoch of its part, and average the results.

        Args:
            spark: the session.
            config: arguments of `round_part`.

        Returns:
            One outcome per worker, in rank order.
        """
        return self._fit(spark, **config)

    def _fit(self, spark: Any, **config: Any) -> list[Outcome]:
        """One fit of Elephas' model, with ranks instead of rows; returns the outcomes in rank order."""
        ranks = spark.sparkContext.parallelize(range(self._job.num_workers), self._job.num_workers)
        already = len(self._spark_model.training_histories)
        self._spark_model._fit(ranks, **config)  # fit() itself only prints, and checks that it is given an RDD
        outcomes: list[Outcome] = self._spark_model.training_histories[already:]
        return sorted(outcomes, key=lambda outcome: outcome.rank)

    def evaluate_round(self, spark: Any, *, job_uri: str, epoch: int, endpoint: Endpoint) -> list[Outcome]:
        """Let every worker evaluate its part of the validation rows with the averaged weights."""
        context = spark.sparkContext
        weights = context.broadcast(self.get_weights())
        try:
            ranks = context.parallelize(range(self._job.num_workers), self._job.num_workers)
            outcomes: list[Outcome] = ranks.map(
                lambda rank: evaluate_part(rank, weights, job_uri=job_uri, epoch=epoch, endpoint=endpoint)
            ).collect()
            return outcomes
        finally:
            weights.destroy()

    def close(self) -> None:
        """Nothing to remove from the store in this mode."""

    def merged_metrics(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        """The metrics over all workers' rows. Their states are sums over rows, so the states can be added.

        A custom step may report something else; that is averaged, weighted by rows.
        """
        for i, variable in enumerate(self._model.metrics_variables):
            variable.assign(sum(outcome.metric_states[i] for outcome in outcomes))
        values = {name: float(value) for name, value in self._model.get_metrics_result().items()}
        self._model.reset_metrics()
        names = outcomes[0].logs
        if not names or set(names) == set(values):
            return values
        rows = sum(outcome.report.rows for outcome in outcomes)
        return {name: sum(each.logs[name] * each.report.rows for each in outcomes) / rows for name in names}

    def _build_metrics(self) -> None:
        """Create the metrics' variables by evaluating one row."""
        with Feed(self._job.train, batch_size=1) as feed:
            self._model.test_on_batch(*feed.batch(0, None))
        self._model.reset_metrics()


class _AveragingModel(SparkModel):  # type: ignore[misc, unused-ignore]
    """Elephas' synchronous model with our worker.

    Elephas' own worker skips a part of at most ``batch_size`` rows, loads its part as one array, and starts a new optimizer
    in every round (danielenricocahall/elephas, worker.py).
    """

    def _fit(self, rdd: Any, **config: Any) -> None:
        """Replaces Elephas' method: the same round, without its prints and without leaking a broadcast."""
        parameters = rdd.context.broadcast(self._master_network.get_weights())
        try:
            results = rdd.mapPartitions(RoundWorker(parameters, config).train).collect()
            weights = average_and_subtract(parameters.value, [delta for delta, _ in results])
        finally:
            parameters.destroy()
        self.training_histories.extend(outcome for _, outcome in results)
        self._master_network.set_weights(weights)
