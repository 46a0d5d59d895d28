"""What `doctor` runs on executors: one task per slot, all at once where Spark can."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from dlspark.errors import DlsparkError

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from dlspark.channel import Endpoint
    from dlspark.store import Store


def describe(spark: SparkSession, tasks: int) -> list[dict[str, Any]]:
    """What ``tasks`` executor processes say of themselves, each as `describe_process` does of this one, in no order."""
    tell = _description()
    return _on_executors(spark, tasks, lambda _rank: tell())


def describe_process() -> dict[str, Any]:
    """This process: host, executable, python, versions by package, dlspark (can it be imported), available_bytes."""
    return _description()()


def report_to_driver(spark: SparkSession, tasks: int, endpoint: Endpoint) -> list[str]:
    """Have ``tasks`` executor processes send the driver a report; what went wrong with each, or empty texts."""
    return _on_executors(spark, tasks, lambda rank: _report(rank, endpoint))


def read_and_write(spark: SparkSession, tasks: int, store: Store) -> list[str]:
    """Have ``tasks`` executor processes read ``driver`` and write ``executor-<rank>``; what went wrong, as above."""
    return _on_executors(spark, tasks, lambda rank: _read_and_write(rank, store))


def _report(rank: int, endpoint: Endpoint) -> str:
    try:
        reporter = endpoint.connect(rank)
    except DlsparkError as error:
        return str(error)
    reporter.send("doctor")
    reporter.close()
    return ""


def _read_and_write(rank: int, store: Store) -> str:
    try:
        store.read_bytes("driver")
        store.write_bytes(f"executor-{rank}", b"executor")
    except (DlsparkError, OSError) as error:
        return f"{socket.gethostname()}: {error}"
    return ""


def _on_executors(spark: SparkSession, tasks: int, function: Callable[[int], Any]) -> list[Any]:
    from dlspark.spark import running_dynamic_allocation

    ranks = spark.sparkContext.parallelize(range(tasks), tasks)
    if running_dynamic_allocation(spark):
        return list(ranks.map(function).collect())
    # A barrier has all tasks run at the same time, so that they take every slot, and proves that barriers work here.
    return list(ranks.barrier().mapPartitions(lambda part: map(function, part)).collect())


def _description() -> Callable[[], dict[str, Any]]:
    """`describe_process` as a function inside a function: pickled whole, it runs where dlspark is not installed."""

    def tell() -> dict[str, Any]:
        import importlib.util
        import os
        import platform
        import socket
        import sys
        from importlib import metadata

        names = ["dlspark", "keras", "tensorflow", "jax", "torch", "numpy", "pandas", "pyarrow", "cloudpickle"]
        names += ["horovod", "elephas", "spark-tensorflow-distributor"]
        versions: dict[str, str | None] = {}
        for name in names:
            try:
                versions[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                versions[name] = None
        import pyspark

        versions["pyspark"] = pyspark.__version__  # SPARK_HOME's own copy has no metadata

        def limits() -> Iterator[int]:
            try:
                with open("/proc/meminfo") as lines:
                    yield next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
            except (OSError, StopIteration):
                yield os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            try:  # a container's own limit
                with open("/sys/fs/cgroup/memory.max") as most, open("/sys/fs/cgroup/memory.current") as used:
                    yield int(most.read()) - int(used.read())
            except (OSError, ValueError):
                return

        return {
            "host": socket.gethostname(),
            "executable": os.path.abspath(sys.executable),
            "python": platform.python_version(),
            "versions": versions,
            "dlspark": importlib.util.find_spec("dlspark") is not None,
            "available_bytes": max(0, min(limits())),
        }

    return tell
