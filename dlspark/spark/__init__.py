"""Spark: the session, slots, checks of executors, and DataFrames as shards."""

from __future__ import annotations

from dlspark.spark.cluster import cancellable, check_cluster, driver_host, own_gpus, task_resources
from dlspark.spark.executors import cause, on_executors
from dlspark.spark.preflight import PACKAGES, ask_executors, describe_process, differences, probing, store_troubles
from dlspark.spark.rows import Columns, write_columns, write_dataframe
from dlspark.spark.session import ARROW_ROWS, get_session, is_local, local_cores, session_master, told_plainly
from dlspark.spark.slots import available_slots, require_slots, running_dynamic_allocation

__all__ = [
    "ARROW_ROWS",
    "PACKAGES",
    "Columns",
    "ask_executors",
    "available_slots",
    "cancellable",
    "cause",
    "check_cluster",
    "describe_process",
    "differences",
    "driver_host",
    "get_session",
    "is_local",
    "local_cores",
    "on_executors",
    "own_gpus",
    "probing",
    "require_slots",
    "running_dynamic_allocation",
    "session_master",
    "store_troubles",
    "task_resources",
    "told_plainly",
    "write_columns",
    "write_dataframe",
]
