"""Slots. A slot runs one task, on ``spark.task.cpus`` cores of an executor; a worker takes one slot."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from dlspark.errors import ConfigError
from dlspark.mends.spark_slots import max_concurrent_tasks
from dlspark.spark.session import context_of, is_local, session_master

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

_POLL_SECONDS = 0.25
_SETTLED_SECONDS = 3.0


def available_slots(spark: SparkSession) -> int:
    """The number of tasks that can run at once on the registered executors, without the driver.

    This is the number that Spark compares with the size of a barrier stage. It counts whole tasks per executor: two
    executors with three cores each have two slots if a task takes two cores. Dynamic allocation may add slots later.
    """
    return max_concurrent_tasks(context_of(spark))


def require_slots(spark: SparkSession, num_workers: int, *, wait_seconds: float = 30.0) -> None:
    """Wait until ``num_workers`` tasks can run at once.

    Args:
        spark: the session.
        num_workers: the number of slots needed.
        wait_seconds: how long to wait for executors to register. The wait also ends three seconds after the last
            registration. There is no wait for a local session.

    Raises:
        ConfigError: there are fewer slots; the message has both numbers.
    """
    now = time.monotonic()
    deadline = now + (0.0 if is_local(spark) else wait_seconds)
    last_change, before = now, 0
    while (slots := available_slots(spark)) < num_workers:
        now = time.monotonic()
        if slots != before:
            last_change, before = now, slots
        if now >= deadline or (slots and now >= last_change + _SETTLED_SECONDS):
            cores = int(context_of(spark).getConf().get("spark.task.cpus", "1"))
            each = f" of {cores} cores each (spark.task.cpus)" if cores > 1 else ""
            cure = "start the session with more cores" if is_local(spark) else "add executors or cores"
            if not slots:
                raise ConfigError(
                    f"Expected {num_workers} free slots; got no executor of {session_master(spark)!r}. See the cluster's "
                    "page or logs: most often it has too little memory or too few cores for the session's settings."
                )
            raise ConfigError(
                f"Expected {num_workers} free slots{each}, one per worker; got a Spark session on "
                f"{session_master(spark)!r} that has {slots}. Ask for at most {slots} workers, or {cure}."
            )
        time.sleep(_POLL_SECONDS)


def running_dynamic_allocation(spark: SparkSession) -> bool:
    """Whether Spark adds and removes executors during a run. Barrier stages, and so most engines, do not allow it."""
    enabled = context_of(spark).getConf().get("spark.dynamicAllocation.enabled", "false")
    return str(enabled).strip().lower() == "true" and not is_local(spark)  # Spark ignores it on a local master
