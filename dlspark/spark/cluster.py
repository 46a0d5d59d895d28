"""Checks of a cluster before an engine launches, and the resources of its tasks."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dlspark.errors import ConfigError
from dlspark.job import JobSettings
from dlspark.spark.preflight import check_executors
from dlspark.spark.session import get_session, is_local, session_master
from dlspark.spark.slots import require_slots, running_dynamic_allocation
from dlspark.storage import Store
from dlspark.worker import environment

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


@dataclass(frozen=True)
class TaskResources:
    """The resources of each task.

    Attributes:
        cores: ``spark.task.cpus``, the number of threads of a worker.
        gpus: ``spark.task.resource.gpu.amount``: 0 or 1.
    """

    cores: int
    gpus: int


def task_resources(spark: SparkSession) -> TaskResources:
    """The resources that ``spark`` gives each task.

    Raises:
        ConfigError: a number of GPUs other than 0 or 1, because a worker uses one device of its own; or GPUs on a local
            master, which schedules none, so its tasks would wait forever.
    """
    conf = spark.sparkContext.getConf()
    gpus = float(conf.get("spark.task.resource.gpu.amount", "0") or 0)
    if gpus not in (0, 1):
        raise ConfigError(f"Expected one whole GPU per task; got spark.task.resource.gpu.amount={gpus:g}. Set it to 1.")
    if gpus and is_local(spark):
        raise ConfigError(
            "Expected a master that schedules GPUs, as spark.task.resource.gpu.amount is set; got "
            f"{session_master(spark)!r}. Start a standalone cluster (it may run on this machine), or remove the setting to "
            "train on CPUs."
        )
    return TaskResources(cores=int(conf.get("spark.task.cpus", "1") or 1), gpus=int(gpus))


_used_gpus = ""  # CUDA reads CUDA_VISIBLE_DEVICES once per process


@contextmanager
def own_gpus() -> Iterator[str]:
    """Inside a task: make only the GPUs of the task visible to its process during the block.

    Yields:
        The value of CUDA_VISIBLE_DEVICES: addresses separated by commas, empty if the task has no GPU.

    Raises:
        ConfigError: Spark reuses this Python worker, which has already used another GPU.
    """
    from pyspark import TaskContext

    global _used_gpus
    task = TaskContext.get()
    given = task.resources().get("gpu") if task else None
    addresses = ",".join(given.addresses) if given else ""
    if addresses and _used_gpus not in ("", addresses):
        raise ConfigError(
            f"Expected the GPU {_used_gpus}, which this Python worker has used before and cannot change; got {addresses}. "
            "Give every executor one GPU (spark.executor.resource.gpu.amount=1), or every task a new process "
            "(spark.python.worker.reuse=false)."
        )
    _used_gpus = addresses or _used_gpus
    with environment(CUDA_VISIBLE_DEVICES=addresses):
        yield addresses


def driver_host(spark: SparkSession) -> str:
    """The address at which executors reach the driver; loopback if they run in the driver's JVM."""
    return "127.0.0.1" if is_local(spark) else str(spark.sparkContext.getConf().get("spark.driver.host", "127.0.0.1"))


@contextmanager
def cancellable(spark: SparkSession) -> Iterator[Callable[[], None]]:
    """Yield a function that cancels the Spark jobs that this thread starts in the block."""
    context, tag = spark.sparkContext, f"dlspark-{uuid.uuid4().hex}"
    context.addJobTag(tag)
    try:
        yield lambda: context.cancelJobsWithTag(tag)
    finally:
        with suppress(Exception):  # the JVM may be dead, as after a SIGTERM to all processes; then so is the tag
            context.removeJobTag(tag)


def check_cluster(settings: JobSettings, uri: str, *, backend: str, barrier: bool, packages: Sequence[str] = ()) -> None:
    """Check that this cluster can run a job; starts a local session if there is none.

    Checks in the driver run first and take milliseconds; then one short job asks the executors.

    Args:
        settings: the settings of the run.
        uri: the run's folder in the store.
        backend: name of the backend, for messages.
        barrier: whether the engine needs all its tasks at the same time.
        packages: the engine's distributions; executors must have the driver's versions.

    Raises:
        ConfigError: another Keras backend than TensorFlow, dynamic allocation with a barrier, too few slots, an unreachable
            store, executors with missing or different packages, or no answer from them.
    """
    if settings.keras_backend != "tensorflow":
        raise ConfigError(
            f"Expected Keras with TensorFlow for backend {backend!r}; got Keras with {settings.keras_backend!r}. Set "
            "KERAS_BACKEND=tensorflow before Keras is imported, or use backend 'local'."
        )
    spark = get_session(settings.num_workers)
    if barrier and running_dynamic_allocation(spark):
        raise ConfigError(
            f"Expected a fixed number of executors, as backend {backend!r} needs all its workers at once; got dynamic "
            "allocation. Start the session with spark.dynamicAllocation.enabled=false."
        )
    resources = task_resources(spark)
    if not is_local(spark) and _is_temporary(uri):
        raise ConfigError(
            f"Expected a store that the executors of {session_master(spark)} reach; got none, so the run's data is in the "
            f"temporary folder {uri} of this machine. Give Trainer a store: 's3://…' or a shared folder."
        )
    try:
        require_slots(spark, settings.num_workers)
    except ConfigError as error:
        if not resources.gpus:
            raise
        raise ConfigError(f"{error} A slot needs a GPU too: see spark.task.resource.gpu.amount.") from error
    check_executors(spark, Store(uri), settings.num_workers, packages=packages)


def _is_temporary(uri: str) -> bool:
    """Whether Trainer made this folder because it has no store."""
    path = Path(uri)
    return path.parent == Path(tempfile.gettempdir()) and path.name.startswith("dlspark-")
