"""Horovod replaces the driver's handlers of SIGINT and SIGTERM for a run and never restores them.

``register_shutdown_event`` (Horovod 0.28.1, horovod/runner/gloo_run.py) sets handlers that kill all workers, so a run cannot
save a checkpoint on SIGTERM, and Ctrl-C has no effect afterwards. It also fails outside the main thread. dlspark stops
workers itself. Needed until Horovod restores the handlers.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_users = 0
_original: object = None


@contextmanager
def own_signals() -> Iterator[None]:
    """Inside the block, Horovod's launches leave the signal handlers of this process alone."""
    from horovod.runner import gloo_run

    global _users, _original
    with _lock:  # runs may be concurrent
        if not _users:
            _original = gloo_run.register_shutdown_event
            gloo_run.register_shutdown_event = threading.Event
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                gloo_run.register_shutdown_event = _original
