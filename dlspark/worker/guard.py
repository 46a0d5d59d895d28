"""The guard: a small process beside each worker that ends it when it cannot end itself.

A worker obeys the driver in a thread of its own. A stopped process (SIGSTOP), or C code that never releases the
interpreter, cannot obey; the guard still can, on any host and with any engine. It connects to the driver as workers do. If
the driver orders a stop or is gone, the guard gives the worker a moment to end, and then kills it. When the worker has
ended, the guard reports whether the kernel ran out of memory.

The guard runs as ``python -I -S -c`` with the standard library only, so that it starts in 50 ms and takes 10 MB.
`dlspark.worker.heartbeat` gives it the source of framing and its three messages, encoded.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import time

from dlspark.wire import framing

GRACE_SECONDS = 2.0
POLL_SECONDS = 0.5
DYING_SECONDS = 5.0  # a process that the kernel kills may need that long to free its memory
TIMEOUT_SECONDS = 30.0


def main() -> None:
    """Read the settings from stdin, which the worker closes when it ends or needs no guard any more."""
    settings = json.loads(sys.stdin.readline())
    worker, secret = settings["pid"], bytes.fromhex(settings["secret"])
    frames = framing.connect(settings["host"], settings["port"], secret, seconds=TIMEOUT_SECONDS)
    frames.send(settings["connected"].encode())
    cause, kills = wait(frames.sock, worker)
    if cause == "released":
        return
    if cause == "stop":
        deadline = time.monotonic() + GRACE_SECONDS
        while os.getppid() == worker and time.monotonic() < deadline:
            time.sleep(0.05)
        if os.getppid() == worker:
            os.kill(worker, signal.SIGKILL)
            return
    # The driver may have noticed the death already and ordered a stop, but it does not know the cause.
    ended = "out_of_memory" if kills != out_of_memory_kills() else "ended"
    try:
        frames.send(settings[ended].encode())
        frames.sock.shutdown(socket.SHUT_WR)
    except OSError:
        return  # the driver is gone


def wait(sock: socket.socket, worker: int) -> tuple[str, list[int]]:
    """Wait for the end of the worker or of the run.

    Returns:
        (cause, `out_of_memory_kills` a few seconds earlier). The cause is "ended": the worker has; "stop": the driver
        orders it or is gone; or "released": the worker needs no guard any more.
    """
    seen = [(time.monotonic(), out_of_memory_kills())]
    while True:
        ready, _, _ = select.select([sock, sys.stdin], [], [], POLL_SECONDS)
        now = time.monotonic()
        seen.append((now, out_of_memory_kills()))
        while seen[1][0] < now - DYING_SECONDS:
            del seen[0]
        if sys.stdin in ready:
            # The pipe also closes when the worker dies, but then without a line.
            return "released" if sys.stdin.readline() else "ended", seen[0][1]
        if os.getppid() != worker:
            return "ended", seen[0][1]
        if sock in ready:
            return "stop", seen[0][1]  # the only message to a guard, or the end of the stream


def out_of_memory_kills() -> list[int]:
    """How many processes the kernel has killed for memory, in this container and on this host, if it says so."""
    counts = []
    for path in ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control", "/proc/vmstat"):
        try:
            with open(path) as lines:
                counts += [int(line.split()[1]) for line in lines if line.startswith("oom_kill ")]
        except (OSError, ValueError):
            continue
    return counts
