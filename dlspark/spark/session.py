"""The Spark session: find it, or start one with a Java, this Python and quiet logs."""

from __future__ import annotations

import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlspark._require import extra, require, whole_number
from dlspark.errors import ConfigError, DataError, DlsparkError
from dlspark.mends import spark_interrupts
from dlspark.spark.java import java_home
from dlspark.worker import environment

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

logger = logging.getLogger(__name__)

ARROW_ROWS = 500
"""Rows per Arrow batch in a session started here: 100 MB of images of 200 kB; Spark's default of 10,000 would be 2 GB."""

_LOOPBACK = "127.0.0.1"
# Errors only. The error of a failed task reaches the driver as an exception, so the two loggers that also log it are
# silenced. Spark compares the gateway's level with the root's before it prints "Setting default log level".
_QUIET_LOGS = """\
rootLogger.level = error
logger.gateway.name = org.apache.spark.api.python.PythonGatewayServer
logger.gateway.level = error
logger.executor.name = org.apache.spark.executor.Executor
logger.executor.level = fatal
logger.tasks.name = org.apache.spark.scheduler.TaskSetManager
logger.tasks.level = fatal
rootLogger.appenderRef.stderr.ref = stderr
appender.stderr.type = Console
appender.stderr.name = stderr
appender.stderr.target = SYSTEM_ERR
appender.stderr.layout.type = PatternLayout
appender.stderr.layout.pattern = %d{HH:mm:ss} %p %c{1}: %m%n%ex
"""


def local_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def get_session(num_workers: int = 1, *, app_name: str = "dlspark") -> SparkSession:
    """The active Spark session, or a new local one with ``num_workers`` slots.

    An active session and that of ``spark-submit`` are never reconfigured. A session started here runs
    ``local[num_workers]`` in the Python of this process, listens on the loopback address only, has no web page, logs errors
    only, and passes rows to Python in Arrow batches of `ARROW_ROWS`. The environment variables needed to start it are
    restored. Ctrl-C raises KeyboardInterrupt from here on; see `dlspark.mends.spark_interrupts`.

    Args:
        num_workers: the number of slots of a session started here. `require_slots` checks that a session has enough.
        app_name: the name of a session started here.

    Raises:
        ConfigError: no supported Java was found, ``num_workers`` is not a positive integer, or the JVM has ended.
        MissingDependencyError: pyspark is not installed.
    """
    num_workers = whole_number("num_workers", num_workers)
    require("pyspark", install=extra("spark"), purpose="Running on Spark")
    from pyspark.sql import SparkSession

    try:
        session = SparkSession.getActiveSession() or _started(num_workers, app_name)
    except ConnectionError as error:
        raise ConfigError(
            "Expected the JVM of the Spark session to run; it has ended, perhaps by a signal. Start this program again."
        ) from error
    spark_interrupts.mend()
    return session


def _started(num_workers: int, app_name: str) -> SparkSession:
    from pyspark import SparkContext
    from pyspark.sql import SparkSession

    builder = SparkSession.builder.appName(app_name)
    # A context without an active session belongs to another thread. With a gateway, spark-submit chose the settings.
    if SparkContext._active_spark_context is not None or "PYSPARK_GATEWAY_PORT" in os.environ:
        return builder.getOrCreate()
    settled = {
        "PYSPARK_PYTHON": sys.executable,
        "PYSPARK_DRIVER_PYTHON": sys.executable,
        "SPARK_LOCAL_IP": _LOOPBACK,
    }
    with (
        java_home() as home,
        environment(JAVA_HOME=str(home), **settled),
        tempfile.TemporaryDirectory(prefix="dlspark-") as folder,
    ):
        log_settings = Path(folder, "log4j2.properties")
        log_settings.write_text(_QUIET_LOGS)
        settings = {
            "spark.driver.host": _LOOPBACK,
            "spark.driver.bindAddress": _LOOPBACK,
            # Spark's 1 GiB is too little for a local session: driver and executors share it, and an engine that averages
            # on the driver sends three times the weights of every worker through it (ResNet50 with Adam: 300 MB each).
            "spark.driver.memory": f"{_driver_memory_mib()}m",
            "spark.driver.extraJavaOptions": f"-Dlog4j2.configurationFile={log_settings.as_uri()}",
            "spark.sql.shuffle.partitions": str(2 * num_workers),  # the default of 200 is for clusters
            "spark.sql.execution.arrow.maxRecordsPerBatch": str(ARROW_ROWS),
            "spark.ui.enabled": "false",
            "spark.ui.showConsoleProgress": "false",
        }
        for key, value in settings.items():
            builder = builder.config(key, value)
        logger.info("starting Spark: local[%d]", num_workers)
        return builder.master(f"local[{num_workers}]").getOrCreate()


def _driver_memory_mib() -> int:
    """A quarter of this machine's memory, from 1 to 8 GiB."""
    import psutil

    return int(min(max(psutil.virtual_memory().total // 4, 1 << 30), 8 << 30)) >> 20


def session_master(spark: SparkSession) -> str:
    """The URL of the master: ``local[2]``, ``spark://host:7077``, ``yarn``, ``k8s://…``."""
    return str(context_of(spark).master)


def is_local(spark: SparkSession) -> bool:
    """Whether all tasks run in the driver's JVM. ``local-cluster[…]`` is not local: it has executors."""
    return re.match(r"local(\[|$)", session_master(spark)) is not None


@contextmanager
def told_plainly() -> Iterator[None]:
    """Replace the error of a failed job by the `DataError` of its task, without the JVM's hundred lines."""
    try:
        yield
    except DlsparkError:
        raise
    except Exception as error:
        # Spark 4 adds a state of SQL.
        told = re.search(r"(?:^|[:\]] )dlspark\.errors\.DataError: (.*?)(?: SQLSTATE: \w+)?$", str(error), re.MULTILINE)
        if told is None:
            raise
        raise DataError(told[1]) from error


def context_of(spark: SparkSession) -> Any:
    """The session's SparkContext.

    Raises:
        ConfigError: a Spark Connect session, which has none.
    """
    spark_interrupts.mend()
    try:
        return spark.sparkContext
    except Exception as error:
        raise ConfigError(
            f"Expected a classic Spark session, with a SparkContext; got {type(spark).__module__}.SparkSession. "
            "Start one without Spark Connect, which cannot run the barrier and RDD jobs of training."
        ) from error
