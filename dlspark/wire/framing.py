"""Authenticated frames over TCP. They carry the workers' reports and the weights of a parameter server.

The server sends every client a fresh nonce and drops a client that does not answer with HMAC-SHA256(secret, nonce). Nothing
else is read before that, and a replayed answer or frame fails. A frame is an 8-byte length, a 32-byte HMAC over nonce,
direction, running number and payload, and the payload. The receiver bounds the length before it reads the payload.
Nothing is ever unpickled, and nothing is encrypted.

This module imports the standard library only, because the guard loads its source without dlspark.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import socket
import struct
import threading
import time

MAX_FRAME_BYTES = 1 << 20
NONCE_BYTES = TAG_BYTES = 32
_LENGTH = struct.Struct(">Q")


class Frames:
    """Frames in both directions over one connected socket, after the handshake.

    Attributes:
        sock: the socket; its timeout bounds each wait.
    """

    def __init__(self, sock: socket.socket, secret: bytes, nonce: bytes, *, server: bool) -> None:
        self.sock = sock
        self._secret = secret
        self._nonce = nonce
        self._out, self._in = (b"driver", b"worker") if server else (b"worker", b"driver")
        self._sent = self._received = 0
        self._lock = threading.Lock()

    def _tag(self, sender: bytes, number: int, payload: bytes) -> bytes:
        tag = hmac.new(self._secret, self._nonce + sender + struct.pack(">Q", number), "sha256")
        tag.update(payload)
        return tag.digest()

    def send(self, payload: bytes) -> None:
        """Send one frame. Threads may call this concurrently."""
        with self._lock:
            head = _LENGTH.pack(len(payload)) + self._tag(self._out, self._sent, payload)
            self._sent += 1
            if len(payload) <= MAX_FRAME_BYTES:
                self.sock.sendall(head + payload)  # one packet
            else:
                self.sock.sendall(head)
                self.sock.sendall(payload)  # no copy of large weights

    def receive(self, *, least: int = 0, most: int = MAX_FRAME_BYTES, seconds: float | None = None) -> bytes:
        """The payload of the next frame.

        Args:
            least: the smallest payload to accept, in bytes.
            most: the largest one. Both are checked before any of the payload is read.
            seconds: the time limit for the whole frame; None leaves only the socket's timeout, which bounds each wait.

        Raises:
            ConnectionError: the stream ended, or this is not an authentic frame of an accepted size.
        """
        until, timeout = None if seconds is None else time.monotonic() + seconds, self.sock.gettimeout()
        (length,) = _LENGTH.unpack(read(self.sock, _LENGTH.size, until=until))
        if not least <= length <= most:
            raise ConnectionError(f"expected a frame of {least} to {most} bytes; got one of {length} bytes")
        tag, payload = read(self.sock, TAG_BYTES, until=until), read(self.sock, length, until=until)
        self.sock.settimeout(timeout)
        if not hmac.compare_digest(tag, self._tag(self._in, self._received, payload)):
            raise ConnectionError("the authentication code of a frame is wrong")
        self._received += 1
        return payload

    def close(self) -> None:
        """Close the connection, and wake the thread that waits for it."""
        shut(self.sock)
        self.sock.close()


def connect(host: str, port: int, secret: bytes, *, seconds: float) -> Frames:
    """Connect to a server and prove knowledge of the secret. Each wait is bounded by ``seconds``, then and later.

    Raises:
        OSError: the server cannot be reached.
    """
    sock = socket.create_connection((host, port), timeout=seconds)
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _notice_lost_hosts(sock)
        nonce = read(sock, NONCE_BYTES)
        sock.sendall(hmac.digest(secret, nonce, "sha256"))
    except OSError:
        sock.close()
        raise
    return Frames(sock, secret, nonce, server=False)


def accept(sock: socket.socket, secret: bytes, *, seconds: float) -> Frames | None:
    """The server's side of the handshake, within ``seconds``; None if the client does not know the secret."""
    until = time.monotonic() + seconds
    sock.settimeout(seconds)
    nonce = os.urandom(NONCE_BYTES)
    sock.sendall(nonce)
    if not hmac.compare_digest(read(sock, TAG_BYTES, until=until), hmac.digest(secret, nonce, "sha256")):
        return None
    sock.settimeout(None)
    return Frames(sock, secret, nonce, server=True)


def read(sock: socket.socket, size: int, *, until: float | None = None) -> bytes:
    """Exactly ``size`` bytes.

    Args:
        sock: the socket. Its own timeout bounds a single wait, so a slow sender could extend it without end.
        size: the number of bytes.
        until: the deadline for all of them, by time.monotonic().
    """
    parts = bytearray()
    while len(parts) < size:
        if until is not None:
            sock.settimeout(max(until - time.monotonic(), 0.001))
        part = sock.recv(min(size - len(parts), 1 << 16))
        if not part:
            raise ConnectionError("the other side closed the connection")
        parts += part
    return bytes(parts)


def shut(sock: socket.socket) -> None:
    """Shut a connection down, which wakes the thread that waits for it."""
    with contextlib.suppress(OSError):  # the peer may have closed it already
        sock.shutdown(socket.SHUT_RDWR)


def _notice_lost_hosts(sock: socket.socket) -> None:
    """Have the kernel end a connection to a host that has not answered for 40 seconds, instead of 15 minutes and more."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 40_000)):
        if hasattr(socket, name):  # Linux has them all
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
