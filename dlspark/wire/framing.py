"""Authenticated JSON frames over TCP: what `dlspark.wire.client` and `dlspark.wire.server` speak with each other.

The server sends every caller a fresh nonce; who cannot answer with HMAC-SHA256(secret, nonce) is dropped before anything
else is read, so a replayed frame is worth nothing. A frame is a 4-byte length (at most 1 MiB), a 32-byte HMAC over nonce,
running number and payload, and the payload: one JSON object. Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import socket
import struct
import threading
import time
from typing import Any

MAX_FRAME_BYTES = 1 << 20

Report = dict[str, Any]


class Frames:
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
        (length,) = struct.unpack(">I", read(self._sock, 4))
        if length > MAX_FRAME_BYTES:
            raise ConnectionError(f"a frame of {length} bytes was announced; the most is {MAX_FRAME_BYTES}")
        tag, payload = read(self._sock, 32), read(self._sock, length)
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


def read(sock: socket.socket, size: int, *, until: float | None = None) -> bytes:
    """Exactly ``size`` bytes.

    Args:
        sock: to read from; its own timeout bounds a single wait, of which a byte now and then allows many.
        size: how many.
        until: when, by time.monotonic(), all of them must be there.
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
