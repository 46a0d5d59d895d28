"""Pulse: a worker's heartbeat and its guard, both independent of the training loop."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
import threading
import traceback
from importlib import resources

from dlspark.wire import HEARTBEAT_SECONDS, Endpoint, Reporter, SocketEndpoint, messages
from dlspark.worker.status import WorkerStatus

GUARD_END_SECONDS = 5.0
STACK_FRAMES = 12


class Pulse:
    """A context manager around a worker's work: a heartbeat every second, and a guard beside the process.

    Args:
        reporter: the connection to the driver.
        endpoint: the driver's; a guard is started if the driver is another process.
        rank: this worker.
        status: updated by the training loop.
    """

    def __init__(self, reporter: Reporter, endpoint: Endpoint, rank: int, status: WorkerStatus) -> None:
        self._reporter = reporter
        self._endpoint = endpoint
        self._rank = rank
        self._status = status
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="dlspark-pulse", daemon=True)
        self._watched = threading.get_ident()
        self._guard: subprocess.Popen[str] | None = None

    def __enter__(self) -> Pulse:
        if isinstance(self._endpoint, SocketEndpoint):
            self._guard = _start_guard(self._endpoint, self._rank)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(HEARTBEAT_SECONDS * 5)
        if self._guard is not None:
            _release_guard(self._guard)

    def _beat(self) -> None:
        before = -1
        while not self._ended.wait(HEARTBEAT_SECONDS):
            moves = self._status.moves
            stack = stack_of(self._watched) if moves == before else ""
            before = moves
            self._send(stack)
        self._send("")  # where the work ended, which explains a failure that is reported next

    def _send(self, stack: str) -> None:
        self._reporter.send(self._status.heartbeat(self._rank, memory_bytes=_resident_bytes(), stack=stack))


def stack_of(thread: int) -> str:
    """The innermost frames of the thread with this identifier, as text; empty if it has ended."""
    frame = sys._current_frames().get(thread)  # documented, in spite of its name
    return "" if frame is None else "".join(traceback.format_stack(frame)[-STACK_FRAMES:])


def _resident_bytes() -> int:
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


# The guard gets the source of what it imports: dlspark may lie in a zip file, and -S leaves out site-packages.
_PROGRAM = """
import sys, types

def load(name, source):
    module = sys.modules[name] = types.ModuleType(name)
    exec(compile(source, name, "exec"), vars(module))
    return module

load("dlspark", "")
load("dlspark.wire", "").framing = load("dlspark.wire.framing", {framing!r})
load("dlspark.worker.guard", {guard!r}).main()
"""


def guard_program() -> str:
    """The guard as one program that needs the standard library only."""
    framing, guard = resources.files("dlspark.wire"), resources.files("dlspark.worker")
    return _PROGRAM.format(framing=framing.joinpath("framing.py").read_text(), guard=guard.joinpath("guard.py").read_text())


def _start_guard(endpoint: SocketEndpoint, rank: int) -> subprocess.Popen[str]:
    program = [sys.executable, "-I", "-S", "-c", guard_program()]
    guard = subprocess.Popen(program, stdin=subprocess.PIPE, text=True)
    pid = os.getpid()
    reports = {
        "connected": messages.GuardConnected(rank=rank, pid=pid),
        "ended": messages.ProcessEnded(rank=rank, pid=pid, out_of_memory=False),
        "out_of_memory": messages.ProcessEnded(rank=rank, pid=pid, out_of_memory=True),
    }
    settings = {"host": endpoint.host, "port": endpoint.port, "secret": endpoint.secret.hex(), "pid": pid}
    settings |= {name: messages.encode(report).decode() for name, report in reports.items()}
    _tell(guard, json.dumps(settings))
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
