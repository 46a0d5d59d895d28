"""The driver's end of the channel: a port at which workers and their guards report, and hear when to hold and to stop."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import itertools
import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable

from dlspark.wire.client import SocketEndpoint
from dlspark.wire.framing import Frames, Report, read

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 4096
MAX_STRANGERS = 64  # connections that have not proved the secret yet, which takes a worker a few milliseconds
HANDSHAKE_SECONDS = 5.0  # for all of it, however slowly it comes


def _shut(sock: socket.socket) -> None:
    """Wake the thread that waits for this connection, which then closes it."""
    with contextlib.suppress(OSError):  # the peer may be gone already
        sock.shutdown(socket.SHUT_RDWR)


def _tell(frames: Frames, message: Report) -> None:
    with contextlib.suppress(OSError):  # that worker has ended already
        frames.send(message)


class ReportServer:
    """The driver's end. Every report of an authenticated worker is handed to ``on_report``, one at a time.

    The server adds ``connection``, a number that grows with every connection, and a report of its own, ``lost``, when one
    ends that never said ``left``.

    Args:
        host: the address to bind; loopback unless executors run elsewhere.
        on_report: called in a thread of the server, never two at a time.
        max_strangers: the most connections that have not proved the secret yet; one more pushes out the oldest.
    """

    def __init__(self, host: str, on_report: Callable[[Report], None], *, max_strangers: int = MAX_STRANGERS) -> None:
        self._on_report = on_report
        self._max_strangers = max_strangers
        self._secret = secrets.token_bytes(32)
        self._lock = threading.Lock()
        self._report_lock = threading.Lock()
        self._slots = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._connections: set[Frames] = set()
        self._guards: set[Frames] = set()
        self._strangers: dict[socket.socket, None] = {}  # in the order in which they came
        self._threads: set[threading.Thread] = set()
        self._closed = False
        self._stop: Report | None = None
        self._numbers = itertools.count()
        self._listener = socket.create_server((host, 0), backlog=128)
        self.endpoint = SocketEndpoint(host, self._listener.getsockname()[1], self._secret)
        self._acceptor = threading.Thread(target=self._accept, name="dlspark-reports", daemon=True)
        self._acceptor.start()

    def stop_workers(self, reason: str) -> None:
        """Tell every worker to end its process now, those that connect from now on too."""
        with self._lock:
            self._stop = {"kind": "stop", "reason": reason}
            connections = list(self._connections)
        for frames in connections:
            _tell(frames, self._stop)

    def tell(self, message: Report) -> None:
        """Send ``message`` to the workers, and not to their guards, to which every message means the end."""
        with self._lock:
            workers = self._connections - self._guards
        for frames in workers:
            _tell(frames, message)

    def close(self) -> None:
        """Close the port and every connection, and wait for the server's threads (at most a few seconds)."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            connections = list(self._connections)
            strangers = list(self._strangers)
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        self._listener.close()
        for frames in connections:
            frames.close()
        for sock in strangers:
            _shut(sock)
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
                time.sleep(0.1)  # no file descriptor is left, say: it will not be better at once
                continue
            if not self._slots.acquire(blocking=False):
                sock.close()
                continue
            with self._lock:
                if len(self._strangers) >= self._max_strangers:  # who has waited longest goes
                    oldest = next(iter(self._strangers))
                    del self._strangers[oldest]
                    _shut(oldest)
                self._strangers[sock] = None
            thread = threading.Thread(target=self._serve, args=(sock,), name="dlspark-report", daemon=True)
            self._threads.add(thread)
            thread.start()

    def _serve(self, sock: socket.socket) -> None:
        frames = None
        try:
            until = time.monotonic() + HANDSHAKE_SECONDS
            sock.settimeout(HANDSHAKE_SECONDS)
            nonce = secrets.token_bytes(32)
            sock.sendall(nonce)
            if not hmac.compare_digest(read(sock, 32, until=until), hmac.digest(self._secret, nonce, hashlib.sha256)):
                return
            sock.settimeout(None)  # bounded by close(), which shuts the socket down
            frames = Frames(sock, self._secret, nonce, server=True)
            with self._lock:
                if self._closed:
                    return
                self._strangers.pop(sock, None)
                self._connections.add(frames)
                stop = self._stop
            if stop is not None:  # a task that Spark has started again, for a run that has failed
                _tell(frames, stop)
            self._listen(frames)
        except (OSError, ValueError) as error:  # the end of the stream, or a stranger's noise
            logger.debug("A connection ended: %s", error)
        finally:
            with self._lock:
                if frames is not None:
                    self._connections.discard(frames)
                    self._guards.discard(frames)
                self._strangers.pop(sock, None)
                self._threads.discard(threading.current_thread())
            sock.close()
            self._slots.release()

    def _listen(self, frames: Frames) -> None:
        """Hand on what comes, until the connection ends."""
        number, last = next(self._numbers), None
        while True:
            try:
                last = {**frames.receive(), "connection": number}
            except (OSError, ValueError):
                if last is not None and last["kind"] not in ("left", "guard", "ended") and not self._closed:
                    with self._report_lock:
                        self._on_report({"kind": "lost", "rank": last["rank"], "connection": number})
                raise
            if last["kind"] == "guard":
                with self._lock:
                    self._guards.add(frames)
            with self._report_lock:
                self._on_report(last)
