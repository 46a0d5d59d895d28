"""What the Spark engines ask of a cluster before they launch, and what a launch takes from it."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dlspark.errors import ConfigError
from dlspark.job import JobSettings
from dlspark.spark import preflight
from dlspark.spark.session import get_session, is_local, session_master
from dlspark.spark.slots import require_slots, running_dynamic_allocation
from dlspark.storage import Store
from dlspark.worker import environment

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
        ConfigError: other than a whole GPU per task, as a worker computes on one device that it shares with nobody; or
            GPUs on a local master, which schedules none: its tasks would wait for ever.
    """
    conf = spark.sparkContext.getConf()
    gpus = float(conf.get("spark.task.resource.gpu.amount", "0") or 0)
    if gpus not in (0, 1):
        raise ConfigError(f"spark.task.resource.gpu.amount is {gpus:g}; a worker needs a whole GPU of its own. Set it to 1.")
    if gpus and is_local(spark):
        raise ConfigError(
            f"spark.task.resource.gpu.amount is set, and the master {session_master(spark)!r} schedules no GPUs. Start a "
            "standalone cluster, on this machine if need be, or leave the setting out to train on CPUs."
        )
    return TaskResources(cores=int(conf.get("spark.task.cpus", "1") or 1), gpus=int(gpus))


_used_gpus = ""  # CUDA reads CUDA_VISIBLE_DEVICES once in the life of a process


@contextmanager
def own_gpus() -> Iterator[str]:
    """Inside a task: let its process see the GPUs that Spark gave the task, and no others, for the length of the block.

    Yields:
        Their addresses as CUDA_VISIBLE_DEVICES has them, separated by commas; empty when Spark gave none.

    Raises:
        ConfigError: this Python worker, which Spark uses again and again, has already computed on another GPU.
    """
    from pyspark import TaskContext

    global _used_gpus
    task = TaskContext.get()
    given = task.resources().get("gpu") if task else None
    addresses = ",".join(given.addresses) if given else ""
    if addresses and _used_gpus not in ("", addresses):
        raise ConfigError(
            f"Spark gave this task the GPU {addresses}, and its Python worker has already used {_used_gpus}, which it "
            "cannot change. Give every executor one GPU (spark.executor.resource.gpu.amount=1), or every task a new "
            "process (spark.python.worker.reuse=false)."
        )
    _used_gpus = addresses or _used_gpus
    with environment(CUDA_VISIBLE_DEVICES=addresses):
        yield addresses


def driver_host(spark: SparkSession) -> str:
    """The driver's address as executors reach it; loopback when they run in the driver's own JVM."""
    return "127.0.0.1" if is_local(spark) else str(spark.sparkContext.getConf().get("spark.driver.host", "127.0.0.1"))


@contextmanager
def cancellable(spark: SparkSession) -> Iterator[Callable[[], None]]:
    """Inside the block, the Spark jobs that this thread starts end with an error when what is yielded is called."""
    context, tag = spark.sparkContext, f"dlspark-{uuid.uuid4().hex}"
    context.addJobTag(tag)
    try:
        yield lambda: context.cancelJobsWithTag(tag)
    finally:
        context.removeJobTag(tag)


def check_cluster(
    settings: JobSettings,
    uri: str,
    *,
    backend: str,
    barrier: bool,
    packages: Sequence[str] = (),
    timeout_seconds: float = preflight.TIMEOUT_SECONDS,
) -> SparkSession:
    """Refuse a job that this cluster cannot run; starts a local session when there is none.

    The driver's own knowledge comes first, in milliseconds; then one short job asks the executors.

    Args:
        settings: what is asked of the run.
        uri: its folder of the store.
        backend: the name, for messages.
        barrier: the engine needs all its tasks at once in one stage.
        packages: the engine's distributions, of which the executors must have the driver's versions.
        timeout_seconds: the most that the executors may take to answer.

    Raises:
        ConfigError: another Keras backend, dynamic allocation with a barrier, too few slots, a store out of reach,
            executors that lack a package or have another version of it, or that do not answer.
    """
    if settings.keras_backend != "tensorflow":
        raise ConfigError(
            f"Backend {backend!r} trains with TensorFlow; this process has loaded Keras with {settings.keras_backend!r}. "
            "Set KERAS_BACKEND=tensorflow before Keras is imported, or use backend 'local'."
        )
    spark = get_session(settings.num_workers)
    if barrier and running_dynamic_allocation(spark):
        raise ConfigError(
            f"Backend {backend!r} needs all its workers at once, which Spark refuses under dynamic allocation. Start "
            "the session with spark.dynamicAllocation.enabled=false and a fixed number of executors."
        )
    resources = task_resources(spark)
    if not is_local(spark) and _is_temporary(uri):
        raise ConfigError(
            f"On {session_master(spark)} the executors must reach the run's data, and without a store it lies in a "
            f"temporary folder of this machine, {uri}. Give Trainer a store that all of them reach: store='s3://…' "
            "or a shared folder."
        )
    try:
        require_slots(spark, settings.num_workers)
    except ConfigError as error:
        if not resources.gpus:
            raise
        raise ConfigError(f"{error} A slot takes a GPU too: see spark.task.resource.gpu.amount.") from error
    preflight.check_executors(spark, Store(uri), settings.num_workers, packages=packages, timeout_seconds=timeout_seconds)
    return spark


def _is_temporary(uri: str) -> bool:
    """Whether this is the folder that Trainer makes when it is given no store."""
    path = Path(uri)
    return path.parent == Path(tempfile.gettempdir()) and path.name.startswith("dlspark-")
