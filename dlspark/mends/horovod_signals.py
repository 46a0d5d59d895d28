"""Horovod takes over SIGINT and SIGTERM of the driver for a run, and never gives them back.

``register_shutdown_event`` (Horovod 0.28.1, horovod/runner/gloo_run.py) sets handlers that kill all workers, so that nothing
can be kept of a run that is asked to end, and Ctrl-C does nothing from then on. It also fails outside the main thread. We
end workers ourselves. Needed until a Horovod restores the handlers that it found.
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
    with _lock:  # two runs may be going on
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
