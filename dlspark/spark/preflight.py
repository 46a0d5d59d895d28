"""Checks of executors before a launch: one short Spark job compares packages and tries the store.

Without them an engine would fail minutes later, or hang. `check_executors` raises an error; ``dlspark doctor`` reports the
results of the same functions.
"""

from __future__ import annotations

import shutil
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlspark._require import DISTRIBUTION
from dlspark.errors import ConfigError
from dlspark.spark.executors import on_executors
from dlspark.spark.session import is_local
from dlspark.storage import Store

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

PACKAGES = (DISTRIBUTION, "keras", "tensorflow", "numpy", "pyspark", "cloudpickle", "pyarrow")
UNKNOWN = "of unknown version"
_DRIVER_FILE = "driver"


def check_executors(spark: SparkSession, store: Store, num_workers: int, *, packages: Sequence[str] = ()) -> None:
    """Check that executors have the driver's packages and reach its store, by one short job of ``num_workers`` tasks.

    The job is skipped if tasks run in the driver's JVM and its Python, where nothing can differ. There it would be the
    first job of the session and delay the first step. Measured on two shared cores: the first job takes 5.8 to 8 s, later
    ones 0.8 to 1.5 s.

    Args:
        spark: the session; `require_slots` has counted its executors.
        store: the folder of the run. Files written as a test are removed, and so are new folders.
        num_workers: the number of tasks. Spark spreads them over the executors.
        packages: distributions of the engine that must have the same version on both sides, besides `PACKAGES`.

    Raises:
        ConfigError: packages differ, the store is not shared, or no executor answered in time.
    """
    if _same_process_environment(spark):
        return
    names = (*PACKAGES, *packages)
    here = describe_process(names)
    with probing(store) as folder:
        answers = ask_executors(spark, num_workers, names, folder)
        wrong = differences(here, answers)
        if wrong:
            raise ConfigError(
                f"Expected the same packages on the driver and every executor; got {'; '.join(wrong)}. Install the driver's "
                f"versions in the executors' Python ({', '.join(sorted({each['executable'] for each in answers}))}), or "
                "ship the driver's environment (--archives and PYSPARK_PYTHON; docs/clusters.md)."
            )
        wrong = store_troubles(folder, answers)
        if wrong:
            raise ConfigError(
                f"Expected a store that the driver and all executors can write to; got {store.uri!r}: {'; '.join(wrong)}. "
                "Give Trainer another store ('s3://…' or a shared folder), or give executors access (rights, credentials, "
                "the mount)."
            )


def describe_process(packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """Describe this process: host, executable, python, versions by package (None if absent), available_bytes."""
    return dict(_question(packages, None)(0))


def ask_executors(
    spark: SparkSession,
    tasks: int,
    packages: Sequence[str] = PACKAGES,
    folder: Store | None = None,
    *,
    at_once: bool = False,
) -> list[dict[str, Any]]:
    """Describe ``tasks`` executor processes, each as `describe_process` does, in no order.

    Args:
        spark: the session.
        tasks: the number of tasks.
        packages: distributions whose versions are requested.
        folder: the folder of `probing`. Each process reads the driver's file in it and writes another; ``store`` in its
            answer is the error, empty if there was none.
        at_once: see `on_executors`.

    Raises:
        ConfigError: see `on_executors`.
    """
    ask = _question(tuple(packages), folder)
    return on_executors(spark, tasks, lambda task: ask(task), at_once=at_once)


def differences(here: Mapping[str, Any], answers: Sequence[Mapping[str, Any]]) -> list[str]:
    """Packages that executors lack or have in another version than the driver; a sorted text for each package and host.

    Python versions are compared by their first two numbers, as in Spark. Packages that the driver lacks are skipped.
    """

    def minor(python: str) -> list[str]:
        return python.split(".")[:2]

    found = {
        f"Python {here['python']} here and {each['python']} on {each['host']}"
        for each in answers
        if minor(each["python"]) != minor(here["python"])
    }
    for each in answers:
        for name, version in here["versions"].items():
            there = each["versions"].get(name)
            if version and (not there or UNKNOWN not in (version, there)) and there != version:
                found.add(f"{name} {version} here and {there or 'absent'} on {each['host']}")
    return sorted(found)


@contextmanager
def probing(store: Store) -> Iterator[Store]:
    """Yield a new folder of ``store`` that holds a file of the driver; at the end remove it and the folders made for it."""
    path = Path(store.uri)
    made = [each for each in (path, *path.parents) if not each.exists()] if store.is_local else []
    folder = store.child(f".dlspark-probe-{uuid.uuid4().hex}")
    try:
        folder.write_bytes(_DRIVER_FILE, folder.uri.encode())
        yield folder
    finally:
        folder.delete_all()
        for each in made:
            with suppress(OSError):  # never created, or no longer empty
                each.rmdir()


def store_troubles(folder: Store, answers: Sequence[Mapping[str, Any]]) -> list[str]:
    """Errors that the executors found with the folder of `probing`; empty if there were none."""
    troubles = {each["host"]: each["store"] for each in answers if each["store"]}  # one for each host
    written = set(folder.list())
    unseen = {each["host"] for each in answers if not each["store"] and each["file"] not in written}
    told = [f"on {host}: {trouble}" for host, trouble in sorted(troubles.items())]
    return told + [f"the driver does not see what {host} wrote" for host in sorted(unseen)]


def _same_process_environment(spark: SparkSession) -> bool:
    """Whether tasks run on this machine, in this Python, with this search path."""
    context = spark.sparkContext
    found = shutil.which(context.pythonExec)
    if not is_local(spark) or not found or context.getConf().get("spark.executorEnv.PYTHONPATH"):
        return False
    here, there = Path(sys.executable), Path(found)
    # The folder identifies a virtual environment: its Python is a link to the Python that created it.
    return there.parent.samefile(here.parent) and there.samefile(here)


def _question(packages: Sequence[str], folder: Store | None) -> Callable[[int], dict[str, Any]]:
    """The function that describes a process. It is pickled by value, so it runs where dlspark is not installed.

    It therefore uses no other name of this module, and gets the folder by its URI.
    """
    uri = folder.uri if folder else None
    driver_file, unknown, own = _DRIVER_FILE, UNKNOWN, DISTRIBUTION

    def answer(task: int) -> dict[str, Any]:
        import importlib.util
        import os
        import platform
        import socket
        import sys
        import uuid
        from importlib import metadata

        def version(name: str) -> str | None:
            module = name.replace(own, "dlspark").replace("-", "_")  # dlspark-keras-mirrored: dlspark_mirrored
            there = importlib.util.find_spec(module) is not None
            if name.startswith("dlspark") and not there:  # an editable install whose folder is missing here
                return None
            try:
                return metadata.version(name) or unknown
            except metadata.PackageNotFoundError:  # it may have been shipped as plain files (--py-files)
                return unknown if there else None

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

        def try_store(uri: str, name: str) -> str:
            try:
                from dlspark.storage import Store

                store = Store(uri)
                if store.read_bytes(driver_file) != uri.encode():
                    return f"{uri!r} has another content there than the driver wrote"
                store.write_bytes(name, name.encode())
            except Exception as error:  # of any file system, or of a missing dlspark
                return f"{type(error).__name__}: {error}".rstrip(".")
            return ""

        import pyspark

        versions = {name: version(name) for name in packages}
        if "pyspark" in versions:
            versions["pyspark"] = pyspark.__version__  # the copy in SPARK_HOME has no metadata
        file = f"executor-{task}-{uuid.uuid4().hex}"
        return {
            "host": socket.gethostname(),
            "executable": os.path.abspath(sys.executable),
            "python": platform.python_version(),
            "versions": versions,
            "available_bytes": max(0, min(limits())),
            "file": file,
            "store": try_store(uri, file) if uri else "",
        }

    return answer
