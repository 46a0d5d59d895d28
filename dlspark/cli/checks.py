"""The checks of `doctor`, one function each."""

from __future__ import annotations

import platform
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from dlspark.errors import ConfigError, DlsparkError
from dlspark.spark import ask_executors, cause, differences, on_executors, probing, store_troubles
from dlspark.storage import Store

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from dlspark.wire import Endpoint, messages

_GIB = 1 << 30
# TensorFlow and Keras alone take 0.5 GiB; a worker with ResNet50, Adam and a small batch of 96 px takes about 1.
_MEMORY_PER_WORKER = _GIB
_REPORT_SECONDS = 10.0
_EXECUTORS_SECONDS = 60.0  # longer than a training waits: doctor should tell whether executors register at all


@dataclass(frozen=True)
class Check:
    """The result of a check. ``ok`` is None for information; ``advice`` says what to do."""

    name: str
    ok: bool | None
    found: str
    advice: str = ""


def _judged(name: str, fine: bool, found: str, cure: str) -> Check:
    """A check that has advice only if it fails."""
    return Check(name, fine, found, "" if fine else cure)


def python() -> Check:
    """The Python of the driver."""
    return Check("python", True, f"{platform.python_version()} at {sys.executable}")


def backends() -> Check:
    """Whether the installed backends can be imported and have their requirements."""
    from dlspark.cli.backends import describe_backends

    there = [each for each in describe_backends() if each["status"] != "not installed"]
    cures = [f"{each['name']}: {each['error'] or each['install']}" for each in there if each["status"] != "ready"]
    found = ", ".join(f"{each['name']} {each['status']}" for each in there)
    return _judged("backends", not cures, found, "; ".join(cures))


def cluster(spark: SparkSession, workers: int) -> Iterator[Check]:
    """Properties of the session that the driver knows: Java, Spark, slots, dynamic allocation, ports."""
    from dlspark.registry import installed_engines
    from dlspark.spark import (
        available_slots,
        is_local,
        require_slots,
        running_dynamic_allocation,
        session_master,
        task_resources,
    )

    ask = "SELECT java_method('java.lang.System', 'getProperty', 'java.{0}')"
    version, home = (spark.sql(ask.format(name)).first()[0] for name in ("version", "home"))
    yield Check("java", True, f"{version} at {home}")
    yield Check("spark", True, f"{spark.version} on {session_master(spark)}")
    try:
        resources = task_resources(spark)
        require_slots(spark, workers, wait_seconds=_EXECUTORS_SECONDS)
        each = f", of {resources.cores} cores each" if resources.cores > 1 else ""
        each += ", with a GPU each" if resources.gpus else ""
        yield Check("slots", True, f"{available_slots(spark)}{each}")
    except ConfigError as error:
        yield Check("slots", False, f"{available_slots(spark)}, for {workers} workers", str(error))
    if running_dynamic_allocation(spark):
        cure = "Engines that need all their workers at once cannot run. Set spark.dynamicAllocation.enabled=false."
        yield Check("dynamic allocation", False, "on", cure)
    if not is_local(spark):
        ports = [f"{name} ({engine.open_ports})" for name, engine in installed_engines().items() if engine.open_ports]
        yield Check(
            "engine ports",
            None,
            f"during a training, these backends listen on executors without authentication: {', '.join(ports) or 'none'}",
            "Allow only machines of this cluster to reach the ports of its executors and the driver.",
        )


def executors(found: Sequence[Mapping[str, Any]], here: Mapping[str, Any]) -> Iterator[Check]:
    """Compare executor processes with the driver; see `describe_process`."""
    tasks = Counter(each["host"] for each in found)
    yield Check("executors", True, ", ".join(f"{host} ({count} tasks)" for host, count in sorted(tasks.items())))

    # Paths may differ between hosts, because a shipped environment has its own; on one host they must not.
    def same_path(each: Mapping[str, Any]) -> bool:
        return bool(each["host"] != here["host"] or each["executable"] == here["executable"])

    unlike = differences(here, found)
    yield _judged(
        "executor python",
        all(map(same_path, found)) and not any(text.startswith("Python ") for text in unlike),
        ", ".join(sorted({f"{each['python']} at {each['executable']}" for each in found})),
        f"Set PYSPARK_PYTHON to the driver's, {here['executable']} ({here['python']}), before the session starts.",
    )
    differing = [text for text in unlike if not text.startswith("Python ")]
    same = ", ".join(f"{name} {version}" for name, version in here["versions"].items() if version)
    cure = "Install the same versions on the driver and every executor."
    yield _judged("packages", not differing, "; ".join(differing) or f"the same everywhere: {same}", cure)
    room = {each["host"]: each["available_bytes"] / tasks[each["host"]] for each in found}
    yield _judged(
        "memory",
        min(room.values()) >= _MEMORY_PER_WORKER,
        ", ".join(f"{free / _GIB:.1f} GiB free per worker on {host}" for host, free in sorted(room.items())),
        f"A worker takes {_MEMORY_PER_WORKER / _GIB:.0f} GiB or more outside the JVM. Use fewer workers per host, or "
        "give executors more (spark.executor.memoryOverhead on YARN and Kubernetes).",
    )


def way_to_driver(spark: SparkSession, tasks: int) -> Check:
    """Whether executors reach the driver as workers do: at its address, on a free port."""
    from dlspark.spark import driver_host
    from dlspark.wire import ReportServer

    heard: set[int] = set()
    all_heard = threading.Event()

    def hear(message: messages.FromWorker) -> None:
        heard.add(message.rank)
        if len(heard) == tasks:
            all_heard.set()

    host = driver_host(spark)
    started = time.monotonic()
    wrong = ""
    try:
        server = ReportServer(host, hear)
        try:
            report = partial(_report, server.endpoint)
            wrong = next(filter(None, on_executors(spark, tasks, report, at_once=True)), "")
            if not wrong and not all_heard.wait(_REPORT_SECONDS):
                wrong = f"{tasks - len(heard)} of {tasks} tasks connected, but their messages did not arrive"
        finally:
            server.close()
    except Exception as error:  # an address of another machine, or a dead executor
        wrong = cause(error)
    return _judged(
        "way to the driver",
        not wrong,
        wrong or f"{tasks} tasks reached {host} in {time.monotonic() - started:.1f} s",
        f"Set spark.driver.host (now {host}) to an address of this machine that executors reach, and open its ports.",
    )


def _report(endpoint: Endpoint, rank: int) -> str:
    """On an executor: send the driver a report; returns the error, or an empty text."""
    from dlspark.wire import messages

    try:
        reporter = endpoint.connect(rank)
    except DlsparkError as error:
        return str(error)
    reporter.send(messages.Note(rank=rank, text="doctor"))
    reporter.close()
    return ""


def store(spark: SparkSession, tasks: int, uri: str) -> Check:
    """Whether executors read the driver's files, and the driver theirs."""
    wrong = ""
    try:
        with probing(Store(uri)) as folder:
            answers = ask_executors(spark, tasks, folder=folder, at_once=True)
            wrong = "; ".join(store_troubles(folder, answers))
    except Exception as error:  # dlspark's, or of any file system of fsspec
        wrong = cause(error)
    cure = "Give a store that the driver and all executors can write to."
    return _judged("store", not wrong, wrong or f"{uri}: written and read by the driver and by {tasks} tasks", cure)
