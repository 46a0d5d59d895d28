"""Horovod never stops the rendezvous server that ``launch_gloo`` starts in the driver for each run.

Every run leaves a thread, and a port open on all interfaces, until the driver exits (Horovod 0.28.1,
horovod/runner/gloo_run.py). Needed until Horovod stops it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_lock = threading.Lock()
_of_thread = threading.local()  # each thread stops the servers of its own run


@contextmanager
def stopped_rendezvous() -> Iterator[None]:
    """Stop the servers that Horovod starts in this thread, at the end of the block."""
    _mend()
    servers: list[Any] = []
    _of_thread.servers = servers
    try:
        yield
    finally:
        _of_thread.servers = None
        for server in servers:
            server.stop()
            server._httpd.server_close()  # private: stop() leaves the port open


def _mend() -> None:
    """Make Horovod's launch record its servers; once per process."""
    from horovod.runner import gloo_run

    class Remembered(gloo_run.RendezvousServer):
        remembers = True

        def start(self, *arguments: Any, **keywords: Any) -> int:
            port: int = super().start(*arguments, **keywords)
            servers = getattr(_of_thread, "servers", None)
            if servers is not None:
                servers.append(self)
            return port

    with _lock:
        if not hasattr(gloo_run.RendezvousServer, "remembers"):
            gloo_run.RendezvousServer = Remembered
