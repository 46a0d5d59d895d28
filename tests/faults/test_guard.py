"""The guard beside a worker's process: with the driver's real server, and a process of its own in the worker's place."""

from __future__ import annotations

import queue
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from dlspark.wire import ReportServer
from dlspark.wire.messages import FromWorker, GuardConnected, Held, Hold, ProcessEnded
from dlspark.worker.guard import GRACE_SECONDS

pytestmark = pytest.mark.timeout(60)

# Deaf: as in the moment of its death, it does not obey the driver itself.
WORKER = """
import sys, time
from dlspark.wire.client import SocketEndpoint
from dlspark.worker import WorkerStatus, reporting

host, port, secret, deaf = sys.argv[1:]
if deaf == "deaf":
    from dlspark.wire import client
    client.os._exit = lambda code: (print("told", flush=True), time.sleep(60))
with reporting(SocketEndpoint(host, int(port), bytes.fromhex(secret)), 0, WorkerStatus()) as reporter:
    time.sleep(60)
"""


@contextmanager
def guarded(*, deaf: bool) -> Iterator[tuple[ReportServer, subprocess.Popen[bytes], Any]]:
    """(the driver's server, a worker, a function that returns the next message of a class), once the guard is connected."""
    reports: queue.Queue[FromWorker] = queue.Queue()

    def next_of(kind: type[FromWorker]) -> FromWorker:
        while not isinstance(report := reports.get(timeout=20), kind):
            pass
        return report

    server = ReportServer("127.0.0.1", reports.put)
    try:
        endpoint = server.endpoint
        arguments = [endpoint.host, str(endpoint.port), endpoint.secret.hex(), "deaf" if deaf else ""]
        with subprocess.Popen([sys.executable, "-c", WORKER, *arguments], stdout=subprocess.PIPE) as worker:
            try:
                next_of(GuardConnected)
                yield server, worker, next_of
            finally:
                worker.kill()
    finally:
        server.close()


def test_a_worker_that_is_asked_to_hold_is_not_ended() -> None:
    with guarded(deaf=False) as (server, worker, next_of):
        server.order(Hold())
        next_of(Held)
        with pytest.raises(subprocess.TimeoutExpired):
            worker.wait(GRACE_SECONDS + 2)


def test_why_a_worker_died_is_told_though_the_driver_says_stop() -> None:
    """Its connection may end long before the process does, and the driver hears of nothing else."""
    with guarded(deaf=True) as (server, worker, next_of):
        server.stop_workers("it is lost")
        assert worker.stdout is not None
        assert worker.stdout.readline() == b"told\n"  # and so was the guard, which waits for the worker's own end
        worker.kill()
        report = next_of(ProcessEnded)
        assert (report.rank, report.out_of_memory) == (0, False)


def test_a_worker_that_does_not_obey_is_ended() -> None:
    with guarded(deaf=True) as (server, worker, _):
        server.stop_workers("the test says so")
        assert worker.wait(GRACE_SECONDS + 5) < 0
