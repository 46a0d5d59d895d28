"""What the Spark engines ask of a cluster before they launch, and what a launch takes from it."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dlspark.errors import ConfigError
from dlspark.job import TrainJob
from dlspark.spark import get_session, is_local, require_slots, running_dynamic_allocation, session_master

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


@dataclass(frozen=True)
class TaskResources:
    """What Spark gives each task.

    Attributes:
        cores: ``spark.task.cpus``: as many threads as a worker computes with.
        gpus: ``spark.task.resource.gpu.amount``: 0 or 1.
    """

    cores: int
    gpus: int


def task_resources(spark: SparkSession) -> TaskResources:
    """What ``spark`` gives each of its tasks.

    Raises:
        ConfigError: other than a whole GPU per task; a worker computes on one device that it shares with nobody.
    """
    conf = spark.sparkContext.getConf()
    gpus = float(conf.get("spark.task.resource.gpu.amount", "0") or 0)
    if gpus not in (0, 1):
        raise ConfigError(
            f"spark.task.resource.gpu.amount is {gpus:g}; a worker needs a whole GPU of its own. Set it to 1."
        )
    return TaskResources(cores=int(conf.get("spark.task.cpus", "1") or 1), gpus=int(gpus))


def driver_host(spark: SparkSession) -> str:
    """The driver's address as executors reach it; loopback when they run in the driver's own JVM."""
    return "127.0.0.1" if is_local(spark) else str(spark.sparkContext.getConf().get("spark.driver.host", "127.0.0.1"))


def check_cluster(job: TrainJob, backend: str, *, barrier: bool) -> SparkSession:
    """Refuse a job that this cluster cannot run; starts a local session when there is none.

    Args:
        job: the run.
        backend: for the messages.
        barrier: the engine needs all its tasks at once in one stage.

    Raises:
        ConfigError: another Keras backend, dynamic allocation with a barrier, too few slots, a store out of reach.
    """
    if job.keras_backend != "tensorflow":
        raise ConfigError(
            f"Backend {backend!r} trains with TensorFlow, and this process has loaded Keras with {job.keras_backend!r}. "
            "Set KERAS_BACKEND=tensorflow before Keras is imported, or use backend 'local'."
        )
    spark = get_session(job.num_workers)
    if barrier and running_dynamic_allocation(spark):
        raise ConfigError(
            f"Backend {backend!r} needs all its workers at once, which Spark refuses under dynamic allocation. Start the "
            "session with spark.dynamicAllocation.enabled=false and a fixed number of executors."
        )
    task_resources(spark)
    require_slots(spark, job.num_workers)
    if not is_local(spark) and Path(job.uri).is_relative_to(tempfile.gettempdir()):
        raise ConfigError(
            f"On {session_master(spark)} the executors must reach the run's data, and the store is this machine's temporary "
            f"folder {tempfile.gettempdir()}. Give Trainer a store that all of them reach: store='s3://…' or a shared folder."
        )
    return spark
