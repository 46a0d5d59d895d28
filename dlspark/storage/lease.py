"""Lease: exclusive write access to a folder of a store."""

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
LEASE_SECONDS = 10.0  # how often a driver renews its lease
LEASE_LIMIT_SECONDS = 60.0  # when a lease of another host expires


@contextlib.contextmanager
def lease(run: Store) -> Iterator[None]:
    """Hold the lease of ``run`` during the block.

    Raises:
        ConfigError: another driver holds it: its process is alive or, on another host, renewed it within the last minute.
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
            except Exception as error:  # object stores raise their own errors
                logger.warning("Cannot renew the lease of the run: %s", error)

    thread = threading.Thread(target=renew, name="dlspark-lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(LEASE_SECONDS)
        try:
            run.delete(LEASE_FILE, missing_ok=True)
        except StoreError as error:  # an error of the block is more important
            logger.warning("Cannot remove the lease of the run: %s", error)


def refuse_if_running(run: Store) -> None:
    """Raise ConfigError if the holder of the lease of ``run`` is alive; see `lease`."""
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
            f"Expected no other driver in {run.uri!r}; got one that is still running, on {held['host']} in process "
            f"{held['pid']}. Wait for it, end it, or use another store. A fit also accepts resume=False."
        )
