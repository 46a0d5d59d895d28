"""The check around all fault tests finds each kind of leak."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dlspark.testing.leaks import no_leaks

pytestmark = pytest.mark.timeout(60)
SETTLE_SECONDS = 0.3


@contextlib.contextmanager
def a_process() -> Iterator[None]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield
        process.communicate()


@contextlib.contextmanager
def a_port() -> Iterator[None]:
    with socket.create_server(("127.0.0.1", 0)):
        yield


@contextlib.contextmanager
def a_thread() -> Iterator[None]:
    end = threading.Event()
    thread = threading.Thread(target=end.wait, name="dlspark-example")
    thread.start()
    yield
    end.set()
    thread.join()


@contextlib.contextmanager
def a_file() -> Iterator[None]:
    with tempfile.NamedTemporaryFile(prefix="dlspark-"):
        yield


@pytest.mark.parametrize(
    ("leak", "told"),
    [
        (a_process, r"process \d+: .*input"),
        (a_port, r"port \d+ of"),
        (a_thread, "thread dlspark-example"),
        (a_file, "file "),
    ],
)
def test_a_leak_is_seen(leak: Callable[[], Any], told: str) -> None:
    refused = pytest.raises(AssertionError, match=f"left behind.*{told}")
    with contextlib.ExitStack() as stack, refused, no_leaks(SETTLE_SECONDS):
        stack.enter_context(leak())


def test_what_ends_in_time_is_no_leak() -> None:
    with contextlib.ExitStack() as stack, no_leaks():
        stack.enter_context(a_thread())
        threading.Timer(0.2, stack.pop_all().close).start()


@pytest.mark.spark
def test_a_task_of_sparks_is_none_and_what_it_starts_is(spark: Any) -> None:
    def start(_: int) -> int:
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]).pid

    def fork(_: int) -> int:  # with the command line of Spark's own processes
        import time

        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
        return child

    ranks = spark.sparkContext.parallelize(range(2), 2)
    with no_leaks(SETTLE_SECONDS):
        assert ranks.map(lambda rank: rank + 1).collect() == [1, 2]
    for leak in (start, fork):
        started: list[int] = []
        with pytest.raises(AssertionError, match=r"left behind.*process \d+"), no_leaks(SETTLE_SECONDS):
            started = ranks.map(leak).collect()
        for pid in started:
            os.kill(pid, 9)
