"""The driver's end of connections: a port that serves whoever proves the secret, and the port for the workers' reports."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable

from dlspark.wire.client import SocketEndpoint
from dlspark.wire.framing import Frames, accept, shut
from dlspark.wire.messages import (
    FromDriver,
    FromWorker,
    GuardConnected,
    Left,
    Lost,
    ProcessEnded,
    Stop,
    decode,
    encode,
)

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 4096
MAX_STRANGERS = 64  # connections that have not proved the secret yet, which takes a worker a few milliseconds
HANDSHAKE_SECONDS = 5.0  # for the whole handshake, even if a client sends a byte now and then


class Server:
    """Accepts connections, and serves each one that proves the secret in a thread of its own.

    Args:
        host: the address to bind; loopback unless executors run elsewhere.
        serve: called with every authenticated connection, which is closed when the call returns or raises OSError or
            ValueError.
        name: how the names of the server's threads begin.
        max_strangers: the limit of connections that have not proved the secret yet; beyond it the oldest is dropped.

    Attributes:
        endpoint: the address and the secret of this server.
    """

    def __init__(self, host: str, serve: Callable[[Frames], None], *, name: str, max_strangers: int = MAX_STRANGERS) -> None:
        self._serve = serve
        self._name = name
        self._max_strangers = max_strangers
        self._lock = threading.Lock()
        self._slots = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._connections: set[Frames] = set()
        self._strangers: dict[socket.socket, None] = {}  # in order of arrival
        self._threads: set[threading.Thread] = set()
        self._closed = False
        self._listener = socket.create_server((host, 0), backlog=128)
        self.endpoint = SocketEndpoint(host, self._listener.getsockname()[1], secrets.token_bytes(32))
        self._secret = self.endpoint.secret
        self._acceptor = threading.Thread(target=self._accept, name=name, daemon=True)
        self._acceptor.start()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def close(self) -> None:
        """Close the port and every connection, and wait for the server's threads (at most a few seconds)."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            connections = [frames.sock for frames in self._connections]
            strangers = list(self._strangers)
        shut(self._listener)  # wakes accept()
        self._listener.close()
        for sock in connections + strangers:
            shut(sock)
        self._acceptor.join(HANDSHAKE_SECONDS)
        for thread in list(self._threads):
            thread.join(HANDSHAKE_SECONDS)

    def _accept(self) -> None:
        while not self._closed:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                if self._closed:
                    return
                time.sleep(0.1)  # the process may have run out of file descriptors, which takes time to change
                continue
            if not self._slots.acquire(blocking=False):
                sock.close()
                continue
            with self._lock:
                if len(self._strangers) >= self._max_strangers:
                    oldest = next(iter(self._strangers))
                    del self._strangers[oldest]
                    shut(oldest)
                self._strangers[sock] = None
            thread = threading.Thread(target=self._run, args=(sock,), name=f"{self._name}-connection", daemon=True)
            self._threads.add(thread)
            thread.start()

    def _run(self, sock: socket.socket) -> None:
        frames = None
        try:
            frames = accept(sock, self._secret, seconds=HANDSHAKE_SECONDS)
            if frames is None:
                return
            with self._lock:
                if self._closed:
                    return
                self._strangers.pop(sock, None)
                self._connections.add(frames)
            self._serve(frames)
        except (OSError, ValueError) as error:  # the end of the stream, or a stranger's noise
            logger.debug("A connection ended: %s", error)
        finally:
            with self._lock:
                if frames is not None:
                    self._connections.discard(frames)
                self._strangers.pop(sock, None)
                self._threads.discard(threading.current_thread())
            sock.close()
            self._slots.release()


class ReportServer:
    """Hands every message of authenticated workers and guards to ``on_message``, one at a time.

    The server sets ``connection``, a number that grows with every connection, and reports `Lost` itself if a worker's
    connection ends without `Left`.

    Args:
        host: the address to bind; loopback unless executors run elsewhere.
        on_message: called in a thread of the server, never two at a time.
        max_strangers: as for `Server`.
    """

    def __init__(self, host: str, on_message: Callable[[FromWorker], None], *, max_strangers: int = MAX_STRANGERS) -> None:
        self._on_message = on_message
        self._lock = threading.Lock()
        self._message_lock = threading.Lock()
        self._connections: set[Frames] = set()
        self._guards: set[Frames] = set()
        self._stop: Stop | None = None
        self._numbers = itertools.count()
        self._server = Server(host, self._serve, name="dlspark-reports", max_strangers=max_strangers)
        self.endpoint = self._server.endpoint

    def stop_workers(self, reason: str) -> None:
        """Order every worker to end its process now, including those that connect later."""
        with self._lock:
            self._stop = Stop(reason=reason)
            connections = list(self._connections)
        for frames in connections:
            _order(frames, self._stop)

    def order(self, message: FromDriver) -> None:
        """Send ``message`` to the workers, not to their guards: a guard takes any message as an order to end the worker."""
        with self._lock:
            workers = self._connections - self._guards
        for frames in workers:
            _order(frames, message)

    def close(self) -> None:
        """Close the port and every connection; see `Server.close`."""
        self._server.close()

    def _serve(self, frames: Frames) -> None:
        with self._lock:
            self._connections.add(frames)
            stop = self._stop
        try:
            if stop is not None:  # Spark has started a task of a failed run again
                _order(frames, stop)
            self._listen(frames)
        finally:
            with self._lock:
                self._connections.discard(frames)
                self._guards.discard(frames)

    def _listen(self, frames: Frames) -> None:
        """Hand on messages until the connection ends."""
        number = next(self._numbers)
        last: FromWorker | None = None
        while True:
            try:
                last = dataclasses.replace(decode(frames.receive(), FromWorker), connection=number)
            except (OSError, ValueError):
                if last and not isinstance(last, Left | GuardConnected | ProcessEnded) and not self._server.closed:
                    with self._message_lock:
                        self._on_message(Lost(rank=last.rank, connection=number))
                raise
            if isinstance(last, GuardConnected):
                with self._lock:
                    self._guards.add(frames)
            with self._message_lock:
                self._on_message(last)


def _order(frames: Frames, message: FromDriver) -> None:
    with contextlib.suppress(OSError):  # that worker has ended already
        frames.send(encode(message))
