"""What can be known of the executors before a launch: one short Spark job that asks them, and a store that both try.

The launch of an engine tells the same too, after minutes, or by hanging. `check_executors` refuses; ``dlspark doctor``
tells what it found by the same functions.
"""

from __future__ import annotations

import re
import shutil
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlspark.errors import ConfigError
from dlspark.spark.session import is_local
from dlspark.spark.slots import running_dynamic_allocation
from dlspark.storage import Store

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

PACKAGES = ("dlspark", "keras", "tensorflow", "numpy", "pyspark", "cloudpickle", "pyarrow")
UNKNOWN = "of unknown version"
# The first task of an executor waits for what `--archives` sends: a packed environment of two gigabytes.
TIMEOUT_SECONDS = 180.0
_CANCEL_AGAIN_SECONDS = 1.0
_DRIVER_FILE = "driver"


def check_executors(
    spark: SparkSession,
    store: Store,
    num_workers: int,
    *,
    packages: Sequence[str] = (),
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> None:
    """Refuse executors that lack what the driver has, or do not share its store; one short job of ``num_workers`` tasks.

    Nothing is asked where tasks run inside the driver's JVM in the driver's own Python: there it is all the same by
    construction, and the job would be the session's first, before the first step. Measured on two cores that others
    used too: the first job 5.8 to 8 s, later ones 0.8 to 1.5 s.

    Args:
        spark: the session; `require_slots` has counted its executors.
        store: the run's folder. What is written there to try it is removed again, and the folder too if it is new.
        num_workers: tasks of the job. Spark spreads them over the executors.
        packages: distributions of the engine's, beside `PACKAGES`, of which both sides must have the same version.
        timeout_seconds: the most that the job may take; it is cancelled then.

    Raises:
        ConfigError: what differs, where, and what to do; or that no executor answered in time.
    """
    if _same_process_environment(spark):
        return
    names = (*PACKAGES, *packages)
    here = describe_process(names)
    with probing(store) as folder:
        answers = ask_executors(spark, num_workers, names, folder, timeout_seconds=timeout_seconds)
        wrong = differences(here, answers)
        if wrong:
            raise ConfigError(
                "Expected the same packages for the driver and on every executor: received "
                f"{'; '.join(wrong)}. Install the driver's versions for the executors' Python "
                f"({', '.join(sorted({each['executable'] for each in answers}))}), or send the driver's environment along "
                "(--archives and PYSPARK_PYTHON; docs/clusters.md)."
            )
        wrong = store_troubles(folder, answers)
        if wrong:
            raise ConfigError(
                f"Expected a store that the driver and all executors reach and may write to: {store.uri!r} is not: "
                f"{'; '.join(wrong)}. Give Trainer another store ('s3://…' or a shared folder), or the executors what opens "
                "this one (rights, credentials, the mount)."
            )


def describe_process(packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """This process: host, executable, python, versions by package (None: absent), available_bytes."""
    return dict(_question(packages, None)(0))


def ask_executors(
    spark: SparkSession,
    tasks: int,
    packages: Sequence[str] = PACKAGES,
    folder: Store | None = None,
    *,
    at_once: bool = False,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> list[dict[str, Any]]:
    """What ``tasks`` executor processes say of themselves, each as `describe_process` does of this one, in no order.

    Args:
        spark: the session.
        tasks: how many to ask.
        packages: distributions whose versions are asked for.
        folder: of `probing`. Each process reads what the driver wrote there and writes a file; ``store`` in its answer
            is what went wrong with that, or empty.
        at_once: as for `on_executors`.
        timeout_seconds: as for `on_executors`.

    Raises:
        ConfigError: as of `on_executors`.
    """
    ask = _question(tuple(packages), folder)
    return on_executors(spark, tasks, lambda task: ask(task), at_once=at_once, timeout_seconds=timeout_seconds)


def differences(here: Mapping[str, Any], answers: Sequence[Mapping[str, Any]]) -> list[str]:
    """What executors lack or have in another version than the driver, one text for each package and host, sorted.

    Of Python the first two numbers count, as they do for Spark. What the driver has not is not compared.
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
    """A new folder of ``store`` with a file of the driver's in it; at the end it is removed, with what was made for it."""
    path = Path(store.uri)
    made = [each for each in (path, *path.parents) if not each.exists()] if store.is_local else []
    folder = store.child(f".dlspark-probe-{uuid.uuid4().hex}")
    try:
        folder.write_bytes(_DRIVER_FILE, folder.uri.encode())
        yield folder
    finally:
        folder.delete_all()
        for each in made:
            with suppress(OSError):  # it was never made, or somebody else has put something there
                each.rmdir()


def store_troubles(folder: Store, answers: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is wrong with a folder of `probing` that the executors were given; empty when nothing is."""
    troubles = {each["host"]: each["store"] for each in answers if each["store"]}  # one says what all on a host say
    written = set(folder.list())
    unseen = {each["host"] for each in answers if not each["store"] and each["file"] not in written}
    told = [f"on {host}: {trouble}" for host, trouble in sorted(troubles.items())]
    return told + [f"what {host} wrote is not to be seen by the driver" for host in sorted(unseen)]


def on_executors(
    spark: SparkSession,
    tasks: int,
    function: Callable[[int], Any],
    *,
    at_once: bool = False,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> list[Any]:
    """Run ``function(task)`` in ``tasks`` tasks of one job, and return what they return.

    Args:
        spark: the session. Its other jobs are left alone.
        tasks: how many.
        function: what to run. A function of another module is imported where it runs; one inside a function is sent.
        at_once: have all tasks run at the same time, so that they take as many slots, where Spark can: a barrier stage
            cannot be had under dynamic allocation.
        timeout_seconds: the job is cancelled then.

    Raises:
        ConfigError: it was cancelled, or its tasks failed; with the line that says most, and what to do.
    """
    context = spark.sparkContext
    tag = f"dlspark-preflight-{uuid.uuid4().hex}"
    done, late = threading.Event(), threading.Event()

    def cancel_when_late() -> None:
        if done.wait(timeout_seconds):
            return
        late.set()
        context.cancelJobsWithTag(tag)
        while not done.wait(_CANCEL_AGAIN_SECONDS):  # it may not have been submitted when it was cancelled
            context.cancelJobsWithTag(tag)

    # A tag, not a job group: a thread has one group, and that is the user's.
    context.addJobTag(tag)
    watch = threading.Thread(target=cancel_when_late, name="dlspark-preflight", daemon=True)
    watch.start()
    try:
        ranks = context.parallelize(range(tasks), tasks)
        if at_once and not running_dynamic_allocation(spark):
            return list(ranks.barrier().mapPartitions(lambda part: map(function, part)).collect())
        return list(ranks.map(function).collect())
    except Exception as error:  # whatever py4j makes of an executor that cannot start its Python
        if late.is_set():
            raise ConfigError(
                f"Expected {tasks} short tasks on executors to end within {timeout_seconds:g} s: they did not, and are "
                "cancelled. Other jobs of this session may hold the slots, or the executors take long to start Python or "
                "to reach the store; the executors' logs say which."
            ) from error
        minor = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise ConfigError(
            f"Expected executors to run a short task in the driver's Python {minor}: received {cause(error).rstrip('.')}. "
            "Set PYSPARK_PYTHON or spark.pyspark.python to a path of that Python that exists on all of them, such as "
            f"{sys.executable}; if they start it, their logs say more."
        ) from error
    finally:
        done.set()
        watch.join()
        context.removeJobTag(tag)


def cause(error: Exception) -> str:
    """The line that says most in an error; Spark's have a hundred lines in two languages."""
    text = str(error).strip()
    printed = re.search(r"^Error from python worker:\n((?:[ \t].*\n)+)", text, re.MULTILINE)
    if printed:  # of a Python that could not start; a traceback ends with what counts
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


def _same_process_environment(spark: SparkSession) -> bool:
    """Whether tasks run on this machine, in this Python, with this search path."""
    context = spark.sparkContext
    found = shutil.which(context.pythonExec)
    if not is_local(spark) or not found or context.getConf().get("spark.executorEnv.PYTHONPATH"):
        return False
    here, there = Path(sys.executable), Path(found)
    # A virtual environment is told by the folder of its Python, which is a link to the Python that made it.
    return there.parent.samefile(here.parent) and there.samefile(here)


def _question(packages: Sequence[str], folder: Store | None) -> Callable[[int], dict[str, Any]]:
    """What an executor is asked, as a function inside a function: pickled whole, it runs where dlspark is not installed.

    So it names nothing of this module, and gets the folder by its URI.
    """
    uri = folder.uri if folder else None
    driver_file, unknown = _DRIVER_FILE, UNKNOWN

    def answer(task: int) -> dict[str, Any]:
        import importlib.util
        import os
        import platform
        import socket
        import sys
        import uuid
        from importlib import metadata

        def version(name: str) -> str | None:
            there = importlib.util.find_spec(name.replace("-", "_")) is not None
            if name.startswith("dlspark") and not there:  # an editable install whose folder is elsewhere
                return None
            try:
                return metadata.version(name) or unknown
            except metadata.PackageNotFoundError:  # it may have been sent as plain files (--py-files)
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
                    return f"{uri!r} holds something else there than the driver wrote"
                store.write_bytes(name, name.encode())
            except Exception as error:  # that of any file system, or of a dlspark that is not there
                return f"{type(error).__name__}: {error}".rstrip(".")
            return ""

        import pyspark

        versions = {name: version(name) for name in packages}
        if "pyspark" in versions:
            versions["pyspark"] = pyspark.__version__  # SPARK_HOME's own copy has no metadata
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
