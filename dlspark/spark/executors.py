"""Run a function on executors, within a time limit and without touching the session's other jobs."""

from __future__ import annotations

import re
import sys
import threading
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dlspark.errors import ConfigError
from dlspark.spark.slots import running_dynamic_allocation

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

# The first task of an executor waits until `--archives` has unpacked its environment, which may have two gigabytes.
TIMEOUT_SECONDS = 180.0
_CANCEL_AGAIN_SECONDS = 1.0


def on_executors(
    spark: SparkSession,
    tasks: int,
    function: Callable[[int], Any],
    *,
    at_once: bool = False,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> list[Any]:
    """Run ``function(task)`` in each of ``tasks`` tasks of one job; returns the results.

    Args:
        spark: the session. Its other jobs are not affected.
        tasks: the number of tasks.
        function: the function. One of a module is imported where it runs; one defined in a function is sent.
        at_once: run all tasks at the same time, so that they need as many slots. It has no effect under dynamic
            allocation, which allows no barrier stage.
        timeout_seconds: after that the job is cancelled.

    Raises:
        ConfigError: the job was cancelled or failed; the message has the most telling line and what to do.
    """
    context = spark.sparkContext
    tag = f"dlspark-preflight-{uuid.uuid4().hex}"
    done, late = threading.Event(), threading.Event()

    def cancel_when_late() -> None:
        if done.wait(timeout_seconds):
            return
        late.set()
        context.cancelJobsWithTag(tag)
        while not done.wait(_CANCEL_AGAIN_SECONDS):  # the first call has no effect on a job not yet submitted
            context.cancelJobsWithTag(tag)

    # A tag, not a job group: a thread has only one group, which belongs to the user.
    context.addJobTag(tag)
    watch = threading.Thread(target=cancel_when_late, name="dlspark-preflight", daemon=True)
    watch.start()
    try:
        ranks = context.parallelize(range(tasks), tasks)
        if at_once and not running_dynamic_allocation(spark):
            return list(ranks.barrier().mapPartitions(lambda part: map(function, part)).collect())
        return list(ranks.map(function).collect())
    except Exception as error:  # py4j raises several kinds when an executor cannot start its Python
        if late.is_set():
            raise ConfigError(
                f"Expected {tasks} short tasks on executors to end within {timeout_seconds:g} s; got no answer, and "
                "cancelled them. Other jobs of this session may hold the slots, or executors are slow to start Python or to "
                "reach the store. See their logs."
            ) from error
        minor = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise ConfigError(
            f"Expected executors to run a short task in the driver's Python {minor}; got {cause(error).rstrip('.')}. "
            "Set PYSPARK_PYTHON or spark.pyspark.python to a path of that Python that exists on all of them, such as "
            f"{sys.executable}. If they start it, see their logs."
        ) from error
    finally:
        done.set()
        watch.join()
        context.removeJobTag(tag)


def cause(error: Exception) -> str:
    """The most telling line of an error; Spark's have a hundred lines in two languages."""
    text = str(error).strip()
    printed = re.search(r"^Error from python worker:\n((?:[ \t].*\n)+)", text, re.MULTILINE)
    if printed:  # a Python that did not start; the last line of a traceback is the error
        return printed[1].strip().splitlines()[-1].strip()
    for pattern in (
        r"^[\w.]*(?:PySparkRuntimeError|RuntimeError|ModuleNotFoundError|ImportError): .+$",
        r"java\.io\.IOException: .+$",
        r"^Caused by: .+$",
    ):
        match = re.search(pattern, text, re.MULTILINE)
        if match and "\n" in text:
            return match[0]
    return text.splitlines()[0] if text else type(error).__name__
