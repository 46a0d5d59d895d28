"""Lease: one process at a time may write to a folder of a store."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator

import psutil

from dlspark.errors import ConfigError
from dlspark.storage.store import Store, StoreError

logger = logging.getLogger(__name__)

LEASE_FILE = "running.json"
LEASE_SECONDS = 10.0  # how often a driver says that it is still there
LEASE_LIMIT_SECONDS = 60.0  # after that it counts as gone, when it cannot be looked at


@contextlib.contextmanager
def lease(run: Store) -> Iterator[None]:
    """Be the only driver of ``run`` in the block.

    Raises:
        ConfigError: another driver is: its process is there, or, on another host, has said so within the last minute.
    """
    refuse_if_running(run)
    mine = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "began": psutil.Process().create_time(),
        "id": uuid.uuid4().hex,
    }
    run.write_json(LEASE_FILE, {**mine, "time": time.time()})
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(LEASE_SECONDS):
            try:
                run.write_json(LEASE_FILE, {**mine, "time": time.time()})
            except Exception as error:  # an object store has errors of its own
                logger.warning("The run could not be marked as running: %s", error)

    thread = threading.Thread(target=renew, name="dlspark-lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(LEASE_SECONDS)
        try:
            run.delete(LEASE_FILE, missing_ok=True)
        except StoreError as error:  # what the block itself has raised says more
            logger.warning("The run could not be marked as ended: %s", error)


def refuse_if_running(run: Store) -> None:
    """Raise ConfigError if the process that holds the lease of ``run`` is alive; see `lease`."""
    if not run.exists(LEASE_FILE):
        return
    held = run.read_json(LEASE_FILE)
    if held["host"] == socket.gethostname():
        try:
            running = abs(psutil.Process(held["pid"]).create_time() - held["began"]) < 1
        except psutil.NoSuchProcess:
            running = False
    else:
        running = time.time() - held["time"] < LEASE_LIMIT_SECONDS
    if running:
        raise ConfigError(
            f"What is in {run.uri!r} is still running, on {held['host']} in process {held['pid']}. Wait for it, end it, or "
            "use another store; a fit may also be given resume=False."
        )
