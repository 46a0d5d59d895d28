"""Horovod never stops the rendezvous server of a run: ``launch_gloo`` starts one in the driver and forgets it.

So every run left a port open on all interfaces, and a thread, for as long as the driver lived (Horovod 0.28.1,
horovod/runner/gloo_run.py). Needed until a Horovod stops it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_lock = threading.Lock()
_of_thread = threading.local()  # two runs may be going on: each thread stops its own


@contextmanager
def stopped_rendezvous() -> Iterator[None]:
    """Stop, at the end of the block, the servers that Horovod has started in this thread."""
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
    """Have Horovod's launch use a server that is remembered; once in a process."""
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
