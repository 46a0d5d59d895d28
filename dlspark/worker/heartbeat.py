"""Pulse: what a worker's process shows the driver of itself while it works, without the training loop's help."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
import threading
import time
import traceback
from importlib import resources
from types import TracebackType
from typing import Any

from dlspark.wire import HEARTBEAT_SECONDS, Endpoint, Reporter, SocketEndpoint

GUARD_END_SECONDS = 5.0
STACK_FRAMES = 12


class Pulse:
    """A context manager around a worker's work: a heartbeat every second, and a guard beside the process.

    A heartbeat has the position of the training (epoch, step, phase; ``moves``, which grows whenever anything gets done;
    ``waits``, when this rank's part of the step is done), the process' CPU seconds and, when nothing has moved since the
    last one, where the training thread stands.

    Args:
        reporter: the connection to the driver.
        endpoint: where the driver is; a guard is started when it is another process.
        rank: this worker.
        position: kept up to date by the training loop.
    """

    def __init__(self, reporter: Reporter, endpoint: Endpoint, rank: int, position: dict[str, Any]) -> None:
        self._reporter = reporter
        self._endpoint = endpoint
        self._rank = rank
        self._position = position
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="dlspark-pulse", daemon=True)
        self._watched = threading.get_ident()
        self._guard: subprocess.Popen[str] | None = None

    def __enter__(self) -> Pulse:
        if isinstance(self._endpoint, SocketEndpoint):
            self._guard = _start_guard(self._endpoint, self._rank)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join(HEARTBEAT_SECONDS * 5)
        if self._guard is not None:
            _release_guard(self._guard)

    def _beat(self) -> None:
        before = -1
        while not self._ended.wait(HEARTBEAT_SECONDS):
            position = dict(self._position)
            if "waits" in position:
                position["waits"] = position["waits"]()
            moves = position.setdefault("moves", 0)
            if moves == before:
                position["stack"] = stack_of(self._watched)
            before = moves
            self._reporter.send("heartbeat", **position, cpu_seconds=time.process_time(), memory_bytes=_resident_bytes())


def stack_of(thread: int) -> str:
    """Where the thread with this identifier stands: its innermost frames as text; empty when it has ended."""
    frame = sys._current_frames().get(thread)  # documented, in spite of its name
    return "" if frame is None else "".join(traceback.format_stack(frame)[-STACK_FRAMES:])


def _resident_bytes() -> int:
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


def _start_guard(endpoint: SocketEndpoint, rank: int) -> subprocess.Popen[str]:
    program = resources.files("dlspark.worker").joinpath("guard.py").read_text()  # dlspark may lie in a zip file
    guard = subprocess.Popen([sys.executable, "-I", "-S", "-c", program], stdin=subprocess.PIPE, text=True)
    settings = {"host": endpoint.host, "port": endpoint.port, "secret": endpoint.secret.hex(), "rank": rank}
    _tell(guard, json.dumps({**settings, "pid": os.getpid()}))
    return guard


def _release_guard(guard: subprocess.Popen[str]) -> None:
    _tell(guard, "released")
    try:
        guard.communicate(timeout=GUARD_END_SECONDS)
    except subprocess.TimeoutExpired:
        guard.kill()
        guard.communicate()


def _tell(guard: subprocess.Popen[str], line: str) -> None:
    pipe = guard.stdin
    with contextlib.suppress(BrokenPipeError):  # it has ended already
        if pipe is not None:
            pipe.write(line + "\n")
            pipe.flush()
