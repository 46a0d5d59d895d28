"""Horovod's driver waits for the exit code of a rank on a connection without timeout or keep-alive.

A host that loses power or freezes never answers, so ``horovod.spark.run`` never returns; its threads are not daemons, so the
driver cannot exit either (Horovod 0.28.1, ``BasicClient._send_one`` in horovod/runner/common/util/network.py; not reported,
horovod#3165 is a similar hang). Needed until Horovod limits that wait.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_lock = threading.Lock()
_users = 0


class _Sockets:
    """Replaces the module ``socket`` in Horovod's clients and records which thread opened which socket."""

    def __init__(self) -> None:
        self._opened: weakref.WeakKeyDictionary[socket.socket, threading.Thread] = weakref.WeakKeyDictionary()
        self._given_up: weakref.WeakSet[threading.Thread] = weakref.WeakSet()

    def __getattr__(self, name: str) -> Any:
        return getattr(socket, name)

    def socket(self, *arguments: Any, **keywords: Any) -> socket.socket:
        opened = socket.socket(*arguments, **keywords)
        with _lock:
            if threading.current_thread() in self._given_up:
                opened.close()  # a retry, which must not happen
            self._opened[opened] = threading.current_thread()
        return opened

    def end(self) -> None:
        with _lock:
            opened = dict(self._opened)
            self._given_up.update(opened.values())
        for each in opened:
            with contextlib.suppress(OSError):  # already closed
                each.shutdown(socket.SHUT_RDWR)


_sockets = _Sockets()


@contextmanager
def ending_connections() -> Iterator[Callable[[], None]]:
    """Yield a function that ends all waits of Horovod's clients in this process, and so their runs.

    It ends all of them because a connection does not identify its run: two concurrent runs must both restart.
    """
    from horovod.runner.common.util import network

    global _users
    with _lock:
        _users += 1
        network.socket = _sockets
    try:
        yield _sockets.end
    finally:
        with _lock:
            _users -= 1
            if not _users:
                network.socket = socket
