"""Horovod's driver waits for a rank's exit code on a connection that has no timeout and no keep-alive.

A host that loses its power, or stands still as a whole, never answers, so ``horovod.spark.run`` never returns, and as its
threads are no daemons the driver cannot even end (Horovod 0.28.1, ``BasicClient._send_one`` in
horovod/runner/common/util/network.py; nobody has reported it, horovod#3165 is a hang alike). Needed until a Horovod bounds
that wait.
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
    """Stands in for the module ``socket`` where Horovod's clients use it, and remembers who opened which."""

    def __init__(self) -> None:
        self._opened: weakref.WeakKeyDictionary[socket.socket, threading.Thread] = weakref.WeakKeyDictionary()
        self._given_up: weakref.WeakSet[threading.Thread] = weakref.WeakSet()

    def __getattr__(self, name: str) -> Any:
        return getattr(socket, name)

    def socket(self, *arguments: Any, **keywords: Any) -> socket.socket:
        opened = socket.socket(*arguments, **keywords)
        with _lock:
            if threading.current_thread() in self._given_up:
                opened.close()  # it tries again, and shall not
            self._opened[opened] = threading.current_thread()
        return opened

    def end(self) -> None:
        with _lock:
            opened = dict(self._opened)
            self._given_up.update(opened.values())
        for each in opened:
            with contextlib.suppress(OSError):  # it is closed already
                each.shutdown(socket.SHUT_RDWR)


_sockets = _Sockets()


@contextmanager
def ending_connections() -> Iterator[Callable[[], None]]:
    """Inside the block, calling what is yielded ends all waits of Horovod's clients in this process, and so their runs.

    All, because nothing tells to which run one belongs: of two that go on at once, both have to start again.
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
