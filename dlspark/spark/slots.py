"""Slots: room for one task, which is ``spark.task.cpus`` cores of an executor. A worker takes one."""

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
    """Tasks that can run at once on the executors registered now, the driver excluded.

    This is Spark's own figure, the one that it holds a barrier stage against. It counts whole tasks per executor: two
    executors of three cores have two slots where a task takes two cores. Dynamic allocation may add to it later.
    """
    return max_concurrent_tasks(context_of(spark))


def require_slots(spark: SparkSession, num_workers: int, *, wait_seconds: float = 30.0) -> None:
    """Return when ``num_workers`` tasks can run at once.

    Args:
        spark: the session.
        num_workers: how many slots are needed.
        wait_seconds: how long to wait for the first executor of a cluster to register, and no longer than that for all:
            when some have come and no other follows for three seconds, they are all. A local session is not waited for.

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
                    f"Expected {num_workers} free slots, and no executor of {session_master(spark)!r} has registered. The "
                    "cluster's page or logs say why: mostly too little memory or too few cores for what the session asks."
                )
            raise ConfigError(
                f"Expected {num_workers} free slots{each}, one per worker: the Spark session on "
                f"{session_master(spark)!r} has {slots}. Ask for at most {slots} workers, or {cure}."
            )
        time.sleep(_POLL_SECONDS)


def running_dynamic_allocation(spark: SparkSession) -> bool:
    """Whether Spark adds and removes executors as it runs; barrier stages, and so most engines, refuse that."""
    enabled = context_of(spark).getConf().get("spark.dynamicAllocation.enabled", "false")
    return str(enabled).strip().lower() == "true" and not is_local(spark)  # Spark ignores it on a local master
