"""The engines without dlspark: hand-written training after their own documentation, on Keras 3.

Keras 3's ``fit`` trains on several workers under neither Horovod nor MirroredStrategy (keras-team/keras#20585,
horovod/horovod#4290), so they use a hand-written loop: a traced step with a GradientTape. Everything else is plain: default
options, rows split by rank, batches of a fixed size from arrays in memory. Elephas has its own ``fit``, which receives the
rows as an RDD. An engine that would otherwise fail to run uses dlspark's mend.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from dlspark.spark import get_session
from dlspark_bench.cores import own_threads
from dlspark_bench.scenario import Scenario, Subject
from dlspark_bench.turns import Clock, put


def prepared(scenario: Scenario, subject: Subject, folder: str, epochs: int) -> tuple[Callable[[], Any], Any]:
    """Create the Spark session, and the model and images if the driver holds them.

    Returns:
        A function that launches the engine with the engine's own launcher, and the model; None if only the workers have it.
    """
    # For Elephas, which has no hook to set up workers: the processes that Spark starts inherit these variables.
    os.environ["TF_NUM_INTRAOP_THREADS"] = os.environ["TF_NUM_INTEROP_THREADS"] = str(subject.threads)
    spark = get_session(subject.workers)
    if subject.name == "bare-elephas":
        return _elephas(spark, scenario, subject, folder, epochs)
    if subject.name == "bare-horovod":
        import horovod.spark

        train = partial(_horovod, scenario, subject, folder, epochs)
        return partial(horovod.spark.run, train, num_proc=subject.workers, verbose=0), None
    from spark_tensorflow_distributor import MirroredStrategyRunner

    runner = MirroredStrategyRunner(num_slots=subject.workers, use_gpu=False, use_custom_strategy=True)
    return partial(runner.run, partial(_mirrored, scenario, subject, folder, epochs)), None


def _elephas(spark: Any, scenario: Scenario, subject: Subject, folder: str, epochs: int) -> tuple[Callable[[], Any], Any]:
    from elephas.spark_model import SparkModel

    from dlspark_bench import work

    model = work.model(scenario)
    x, y = work.images(scenario, scenario.rows(subject))

    def train() -> None:
        batch = scenario.batch_size(subject) // subject.workers
        rows = spark.sparkContext.parallelize(list(zip(x, y, strict=True)), subject.workers).cache()
        spark_model = SparkModel(model, batch_size=batch)
        clock = Clock(folder, epochs=scenario.epochs)
        for epoch in range(epochs):
            clock.epoch_begins(epoch)
            with contextlib.redirect_stdout(io.StringIO()):  # Elephas prints
                spark_model.fit(rows, epochs=1, batch_size=batch, verbose=0)
            history = spark_model.training_histories[-1]
            if history is None:
                raise RuntimeError(
                    "Elephas trained nothing: it skips partitions of at most one batch. Use more rows per core."
                )
            clock.epoch_ended(epoch, {name: values[-1] for name, values in history.items()})
        clock.training_ended()

    return train, model


def _horovod(scenario: Scenario, subject: Subject, folder: str, epochs: int) -> None:
    own_threads(subject.threads)
    import horovod.tensorflow as hvd

    hvd.init()
    try:
        from dlspark_bench import work

        model = work.model(scenario)
        hvd.broadcast_variables([variable.value for variable in model.variables], root_rank=0)
        reduce: Callable[[Any], Any] = partial(hvd.grouped_allreduce, op=hvd.Average)
        _train(scenario, subject, model, hvd.rank(), reduce, folder, epochs)
    finally:
        hvd.shutdown()


def _mirrored(scenario: Scenario, subject: Subject, folder: str, epochs: int) -> None:
    from pyspark import BarrierTaskContext

    from dlspark.mends import tensorflow_context

    tensorflow_context.reset()  # otherwise a second launch in Spark's reused processes hangs
    own_threads(subject.threads)
    import tensorflow as tf

    from dlspark_bench import work

    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    rank = BarrierTaskContext.get().partitionId()
    model = work.model(scenario)  # outside the strategy's scope, which a custom step does not need

    def reduce(gradients: Any) -> Any:
        return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.MEAN, gradients)

    _train(scenario, subject, model, rank, reduce, folder, epochs, strategy)


def _train(
    scenario: Scenario,
    subject: Subject,
    model: Any,
    rank: int,
    reduce: Callable[[Any], Any],
    folder: str,
    epochs: int,
    strategy: Any = None,
) -> None:
    """Train with a hand-written loop."""
    import numpy as np
    import tensorflow as tf

    from dlspark_bench import work

    x, y = work.images(scenario, scenario.rows(subject))
    x, y = x[rank :: subject.workers], y[rank :: subject.workers]
    batch = scenario.batch_size(subject) // subject.workers
    model.optimizer.build(model.trainable_variables)
    loss_function = tf.keras.losses.SparseCategoricalCrossentropy()

    def differentiated(images: Any, labels: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = loss_function(labels, model(images, training=True))
        return loss, reduce(tape.gradient(loss, [variable.value for variable in model.trainable_variables]))

    @tf.function
    def step(images: Any, labels: Any) -> Any:
        # Keras applies gradients only outside a strategy's replicas.
        found = strategy.run(differentiated, (images, labels)) if strategy else differentiated(images, labels)
        model.optimizer.apply(found[1])
        return found[0]

    clock = Clock(folder, epochs=scenario.epochs)
    draw = np.random.default_rng(scenario.seed)
    for epoch in range(epochs):
        clock.epoch_begins(epoch)
        order = draw.permutation(len(x))
        losses = []
        for start in range(0, len(x), batch):
            some = order[start : start + batch]
            losses.append(step(tf.constant(x[some]), tf.constant(y[some])))
            clock.step_ended()
        clock.epoch_ended(epoch, {"loss": np.mean(losses)})
    # The harness compares the workers' checksums, to verify that they trained together.
    checksum = float(sum(np.abs(variable.numpy()).sum(dtype=np.float64) for variable in model.trainable_variables))
    put(Path(folder, f"checksum-{rank}"), repr(checksum))
    clock.training_ended()
