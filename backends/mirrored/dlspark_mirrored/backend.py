"""MirroredBackend: launches workers by MirroredStrategyRunner and lets them sum by TensorFlow's collectives."""

from __future__ import annotations

import base64
import logging
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from dlspark.plugin import (
    Capabilities,
    ConfigError,
    Engine,
    FitResult,
    SparkLaunchBackend,
    TrainJob,
    WorkerError,
    WorkerFunction,
    WorkerResult,
    get_session,
    own_threads,
    task_resources,
    tensorflow_context,
)
from dlspark_mirrored.collectives import CollectiveSession

logger = logging.getLogger(__name__)

LAUNCHES = 3
PORT_TAKEN = "Could not start gRPC server"  # TensorFlow's message, which gives no reason


@dataclass(frozen=True, kw_only=True)
class MirroredOptions:
    """Options of backend ``mirrored``.

    Attributes:
        bytes_per_pack: about how many bytes of gradients one collective sums. A ResNet50 takes four.
        collective_timeout_seconds: how long a collective waits for a worker; 0 waits forever.
    """

    bytes_per_pack: int = 25_000_000
    collective_timeout_seconds: float = 600.0

    def __post_init__(self) -> None:
        if self.bytes_per_pack < 1:
            raise ConfigError(f"Expected bytes_per_pack of at least 1; got {self.bytes_per_pack}.")
        if self.collective_timeout_seconds < 0:
            raise ConfigError(f"Expected collective_timeout_seconds of at least 0; got {self.collective_timeout_seconds}.")


class MirroredBackend(SparkLaunchBackend):
    """One worker per Spark task of a barrier stage; CPU, or one GPU each when Spark schedules them."""

    name: ClassVar[str] = "mirrored"
    engine: ClassVar[Engine] = Engine(
        packages=("dlspark-keras-mirrored", "spark-tensorflow-distributor"),
        modules=("spark_tensorflow_distributor",),
        environment=("TF_CONFIG", "CUDA_VISIBLE_DEVICES"),
        barrier=True,
        open_ports="TensorFlow's gRPC",
    )
    options_type: ClassVar[type] = MirroredOptions
    capabilities = Capabilities(synchronous_gradients=True, exact_rows=True, deterministic=True, resumable=True)

    def fit(self, job: TrainJob) -> FitResult:
        """Launch, and launch again if another process took a worker's port before TensorFlow bound it.

        The runner finds a free port and closes it; TensorFlow binds exactly that port seconds later.
        """
        for _ in range(LAUNCHES - 1):
            try:
                return super().fit(job)
            except WorkerError as error:
                if PORT_TAKEN not in str(error):
                    raise
                logger.warning("Another process took the port of a worker before TensorFlow did: launching again.")
        return super().fit(job)

    def launch(self, function: WorkerFunction, num_workers: int) -> list[WorkerResult]:
        from dlspark_mirrored.runner import Runner

        resources = task_resources(get_session(num_workers))
        with _quiet(Runner.__name__):
            runner = Runner(num_slots=num_workers, use_gpu=resources.gpus > 0, use_custom_strategy=True)
            gathered = runner.run(partial(_rank, function, self.options, resources.cores, resources.gpus > 0))
        return [pickle.loads(base64.b64decode(result)) for result in gathered]


def _rank(function: WorkerFunction, options: MirroredOptions, threads: int, needs_gpu: bool) -> list[str]:
    """Run in every task, after the runner has set TF_CONFIG. Returns the results of all ranks."""
    from pyspark import BarrierTaskContext

    context = BarrierTaskContext.get()
    tensorflow_context.reset()
    try:
        own_threads(threads)
        import tensorflow as tf

        session = CollectiveSession(
            tf.distribute.MultiWorkerMirroredStrategy(),
            rank=context.partitionId(),
            world_size=len(context.getTaskInfos()),
            bytes_per_pack=options.bytes_per_pack,
            timeout_seconds=options.collective_timeout_seconds,
            threads=threads,
            needs_gpu=needs_gpu,
        )
        result = function(session)
    finally:
        tensorflow_context.reset()
    # The runner returns the first task's value only, so the first task must have all results.
    return context.allGather(base64.b64encode(pickle.dumps(result)).decode())


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Hide the runner's informational log lines; its warnings still show."""
    logger = logging.getLogger(name)

    def important(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING

    logger.addFilter(important)
    try:
        yield
    finally:
        logger.removeFilter(important)
