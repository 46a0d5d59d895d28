"""A check that a test leaves no process, listening port, dlspark thread or temporary file of dlspark behind.

Spark's session may keep its own: the JVM with its ports, the daemon that forks Python workers, and these workers, which
Spark reuses. Processes that a worker has started, and ports that it listens on, count as leaks.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

SETTLE_SECONDS = 10.0  # Spark ends the Python worker of a cancelled task after 2 s; threads poll
_POLL_SECONDS = 0.1
_OWN = "dlspark"


@contextmanager
def no_leaks(settle_seconds: float = SETTLE_SECONDS, *, worker_ports: bool = True) -> Iterator[None]:
    """Fail if the block leaves a process, port, thread or temporary file behind.

    Args:
        settle_seconds: grace period after the block.
        worker_ports: also check the ports of Spark's Python workers. TensorFlow cannot stop the server of its collectives:
            it listens until its process ends. Spark ends Python workers that have been idle for a minute.

    Raises:
        AssertionError: something is left; the message lists all of it.
    """
    before = set(_there(worker_ports))
    yield
    deadline = time.monotonic() + settle_seconds
    while left := sorted(set(_there(worker_ports)) - before):
        if time.monotonic() > deadline:
            raise AssertionError(f"left behind, {settle_seconds:g} s after the end: {'; '.join(left)}")
        time.sleep(_POLL_SECONDS)


def _there(worker_ports: bool) -> Iterator[str]:
    this = psutil.Process()
    yield from (f"port {port}" for port in _ports(this))
    for process in this.children(recursive=True):
        try:
            kind = _spark_kind(process)
            if kind is None:
                yield f"process {process.pid}: {' '.join(process.cmdline())[:200] or process.name()}"
            if kind is None or (kind == "worker" and worker_ports):  # the JVM and the daemon listen to each other
                yield from (f"port {port}" for port in _ports(process))
        except psutil.NoSuchProcess:
            continue
    for thread in threading.enumerate():
        if thread.name.startswith(_OWN):
            yield f"thread {thread.name} ({thread.ident})"
    for path in Path(tempfile.gettempdir()).iterdir():
        if path.name.lstrip(".").startswith(f"{_OWN}-"):
            yield f"file {path}"


def _spark_kind(process: psutil.Process) -> str | None:
    """Return "jvm", "daemon" or "worker" for a process of Spark; None for any other process.

    Raises:
        psutil.NoSuchProcess: the process has ended or is a zombie.
    """
    if process.status() == psutil.STATUS_ZOMBIE:
        raise psutil.NoSuchProcess(process.pid)
    command = process.cmdline()
    if command and Path(command[0]).name == "java" and any(each.startswith("org.apache.spark.") for each in command):
        return "jvm"
    if command[1:2] != ["-m"]:
        return None
    # What the JVM starts is the daemon; its module is a setting of Spark. The daemon's workers are its forks, with the same
    # command line. A worker's own forks have it too, but are not Spark's.
    parent = process.parent()
    above = _spark_kind(parent) if parent else None
    if above == "daemon" and parent and parent.cmdline() != command:
        return None
    return {"jvm": "daemon", "daemon": "worker"}.get(above or "")


def _ports(process: psutil.Process) -> Iterator[str]:
    connections: Any = getattr(process, "net_connections", None) or process.connections  # its name before psutil 6
    for each in connections(kind="inet"):
        if each.status == psutil.CONN_LISTEN:
            yield f"{each.laddr.port} of process {process.pid}"
