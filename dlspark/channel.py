"""How workers talk to the driver: authenticated JSON frames over TCP, in Spark tasks and beside them alike.

The driver listens on one address and a port that the system gives. To every caller it sends a fresh nonce; who cannot
answer with HMAC-SHA256(secret, nonce) is dropped before anything else is read, so a replayed frame is worth nothing. A
frame is a 4-byte length (at most 1 MiB), a 32-byte HMAC over nonce, running number and payload, and the payload: one JSON
object. Nothing is ever unpickled.

A worker that loses the driver, or that the driver tells to stop because another rank has failed, ends its process: the
thread that notices cannot interrupt a collective that waits for a dead peer.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import logging
import os
import secrets
import socket
import struct
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from dlspark.errors import WorkerError

logger = logging.getLogger(__name__)

MAX_FRAME_BYTES = 1 << 20
MAX_TRACEBACK_CHARACTERS = 100_000
MAX_CONNECTIONS = 4096
HANDSHAKE_SECONDS = 5.0
CONNECT_SECONDS = 30.0
SEND_SECONDS = 30
STOPPED_EXIT_CODE = 75  # EX_TEMPFAIL: ended by the driver or without one, through no fault of its own

Report = dict[str, Any]


class Reporter(Protocol):
    """What a worker needs of a connection: ``send`` and ``close``."""

    def send(self, kind: str, **fields: Any) -> None: ...

    def close(self) -> None: ...


class Endpoint(Protocol):
    """Where a worker finds its driver: plain data that crosses processes, or an object in the same one."""

    def connect(self, rank: int) -> Reporter: ...


def failure_fields(error: BaseException) -> Report:
    """The fields of a ``failed`` report for ``error``, its traceback cut in the middle when it is endless."""
    text = "".join(traceback.format_exception(error))
    if len(text) > MAX_TRACEBACK_CHARACTERS:
        half = MAX_TRACEBACK_CHARACTERS // 2
        text = f"{text[:half]}\n… {len(text) - 2 * half} characters left out …\n{text[-half:]}"
    return {"error": type(error).__name__, "message": str(error)[:2000], "traceback": text}


class _Frames:
    """Frames over one connected socket, both ways, after the handshake."""

    def __init__(self, sock: socket.socket, secret: bytes, nonce: bytes, *, server: bool) -> None:
        self._sock = sock
        self._secret = secret
        self._nonce = nonce
        self._out, self._in = (b"driver", b"worker") if server else (b"worker", b"driver")
        self._sent = self._received = 0
        self._lock = threading.Lock()

    def _tag(self, sender: bytes, number: int, payload: bytes) -> bytes:
        return hmac.digest(self._secret, self._nonce + sender + struct.pack(">Q", number) + payload, "sha256")

    def send(self, message: Report) -> None:
        payload = json.dumps(message).encode()
        with self._lock:
            tag = self._tag(self._out, self._sent, payload)
            self._sent += 1
            self._sock.sendall(struct.pack(">I", len(payload)) + tag + payload)

    def receive(self) -> Report:
        """The next message. Raises ConnectionError at the end of the stream and for anything that is not a true frame."""
        (length,) = struct.unpack(">I", _read(self._sock, 4))
        if length > MAX_FRAME_BYTES:
            raise ConnectionError(f"a frame of {length} bytes was announced; the most is {MAX_FRAME_BYTES}")
        tag, payload = _read(self._sock, 32), _read(self._sock, length)
        if not hmac.compare_digest(tag, self._tag(self._in, self._received, payload)):
            raise ConnectionError("a frame's authentication code is wrong")
        self._received += 1
        message = json.loads(payload)
        if not isinstance(message, dict):
            raise ConnectionError("a frame holds no JSON object")
        return message

    def close(self) -> None:
        with contextlib.suppress(OSError):  # the peer may be gone already
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()


def _read(sock: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = sock.recv(min(size - len(parts), 1 << 16))
        if not part:
            raise ConnectionError("the other side closed the connection")
        parts += part
    return bytes(parts)


@dataclass(frozen=True)
class SocketEndpoint:
    """The driver's address and the secret of this run. Never logged: ``repr`` leaves the secret out."""

    host: str
    port: int
    secret: bytes = field(repr=False)

    def connect(self, rank: int) -> Reporter:
        """Connect and prove knowledge of the secret.

        Raises:
            WorkerError: the driver cannot be reached from here.
        """
        try:
            sock = socket.create_connection((self.host, self.port), timeout=CONNECT_SECONDS)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            nonce = _read(sock, 32)
            sock.sendall(hmac.digest(self.secret, nonce, "sha256"))
        except OSError as error:
            raise WorkerError(
                f"Rank {rank} on {socket.gethostname()} cannot reach the driver at {self.host}:{self.port} ({error}). "
                "Set spark.driver.host to an address of the driver that executors reach, and open its ports to them.",
                rank=rank,
                host=socket.gethostname(),
            ) from error
        return _SocketReporter(_Frames(sock, self.secret, nonce, server=False), sock, rank)


class _SocketReporter:
    def __init__(self, frames: _Frames, sock: socket.socket, rank: int) -> None:
        self._frames = frames
        self._rank = rank
        self._closing = threading.Event()
        # Reading waits for as long as the run lasts (the end of the stream ends it); only sending has a bound.
        sock.settimeout(None)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND_SECONDS, 0))
        threading.Thread(target=self._obey, name="dlspark-channel", daemon=True).start()

    def send(self, kind: str, **fields: Any) -> None:
        try:
            self._frames.send({"kind": kind, "rank": self._rank, **fields})
        except OSError:
            if not self._closing.is_set():
                self._end_process("the driver is gone")

    def close(self) -> None:
        self._closing.set()
        self._frames.close()

    def _obey(self) -> None:
        try:
            reason = f"the driver said stop: {self._frames.receive().get('reason', '')}"
        except (OSError, ValueError) as error:
            reason = f"the driver is gone ({error})"
        if not self._closing.is_set():
            self._end_process(reason)

    def _end_process(self, reason: str) -> None:
        logger.warning("Rank %s ends: %s", self._rank, reason)
        logging.shutdown()
        os._exit(STOPPED_EXIT_CODE)


def _send_stop(frames: _Frames, reason: str) -> None:
    with contextlib.suppress(OSError):  # that worker has ended already
        frames.send({"kind": "stop", "reason": reason})


class ReportServer:
    """The driver's end. Every report of an authenticated worker is handed to ``on_report``, one at a time.

    Args:
        host: the address to bind; loopback unless executors run elsewhere.
        on_report: called in a thread of the server, never two at a time.
    """

    def __init__(self, host: str, on_report: Callable[[Report], None]) -> None:
        self._on_report = on_report
        self._secret = secrets.token_bytes(32)
        self._lock = threading.Lock()
        self._report_lock = threading.Lock()
        self._slots = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._connections: set[_Frames] = set()
        self._threads: set[threading.Thread] = set()
        self._closed = False
        self._stop_reason: str | None = None
        self._listener = socket.create_server((host, 0), backlog=128)
        self.endpoint = SocketEndpoint(host, self._listener.getsockname()[1], self._secret)
        self._acceptor = threading.Thread(target=self._accept, name="dlspark-reports", daemon=True)
        self._acceptor.start()

    def stop_workers(self, reason: str) -> None:
        """Tell every worker to end its process now, those that connect from now on too."""
        with self._lock:
            self._stop_reason = reason
            connections = list(self._connections)
        for frames in connections:
            _send_stop(frames, reason)

    def close(self) -> None:
        """Close the port and every connection, and wait for the server's threads (at most a few seconds)."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            connections = list(self._connections)
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        self._listener.close()
        for frames in connections:
            frames.close()
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
                continue
            if not self._slots.acquire(blocking=False):
                sock.close()
                continue
            thread = threading.Thread(target=self._serve, args=(sock,), name="dlspark-report", daemon=True)
            self._threads.add(thread)
            thread.start()

    def _serve(self, sock: socket.socket) -> None:
        frames = None
        try:
            sock.settimeout(HANDSHAKE_SECONDS)
            nonce = secrets.token_bytes(32)
            sock.sendall(nonce)
            if not hmac.compare_digest(_read(sock, 32), hmac.digest(self._secret, nonce, hashlib.sha256)):
                return
            sock.settimeout(None)  # bounded by close(), which shuts the socket down
            frames = _Frames(sock, self._secret, nonce, server=True)
            with self._lock:
                if self._closed:
                    return
                self._connections.add(frames)
                reason = self._stop_reason
            if reason is not None:  # a task that Spark has started again, for a run that has failed
                _send_stop(frames, reason)
            while True:
                report = frames.receive()
                with self._report_lock:
                    self._on_report(report)
        except (OSError, ValueError) as error:  # the end of the stream, or a stranger's noise
            logger.debug("A connection ended: %s", error)
        finally:
            with self._lock:
                if frames is not None:
                    self._connections.discard(frames)
                self._threads.discard(threading.current_thread())
            sock.close()
            self._slots.release()
