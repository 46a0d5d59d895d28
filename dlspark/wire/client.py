"""How workers talk to the driver: authenticated JSON frames over TCP, in Spark tasks and beside them alike.

The driver listens on one address and a port that the system gives (`dlspark.wire.server`; `dlspark.wire.framing` has the
protocol). Here is the worker's end.

A worker that loses the driver, or that the driver tells to stop because another rank has failed, ends its process: the
thread that notices cannot interrupt a collective that waits for a dead peer. A worker that ends as it should says so
("left"), so that the driver can tell an end from a death ("lost").
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import os
import socket
import struct
import threading
import traceback
from dataclasses import dataclass, field
from typing import Any, Protocol

from dlspark.errors import ConfigError, DataError, MissingDependencyError, NonFiniteLossError, WorkerError
from dlspark.wire.framing import Frames, Report, read

logger = logging.getLogger(__name__)

MAX_TRACEBACK_CHARACTERS = 100_000
CONNECT_SECONDS = 30.0
HEARTBEAT_SECONDS = 1.0
SEND_SECONDS = 30
HOLD_SECONDS = 60.0  # a driver that asks for a halt says within this time where
STOPPED_EXIT_CODE = 75  # EX_TEMPFAIL: ended by the driver or without one, through no fault of its own


class Halt(Protocol):
    """How a worker learns that it is to stop."""

    def reached(self) -> bool:
        """Whether to stop now; to be asked after every call of the training step."""
        ...


class Interruption:
    """How all ranks stop after the same step when the driver asks them to.

    Ranks that exchange gradients are at most one call of the training step apart, so "one more than the furthest has done"
    is a step that nobody has gone beyond, if everybody waits there until all have been asked.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._calls = 0
        self._limit: int | None = None
        self._target: int | None = None

    def hold(self) -> int:
        """From now on go no further than the next call; returns the calls that have ended."""
        with self._changed:
            self._limit = self._calls + 1
            return self._calls

    def stop_after(self, calls: int) -> None:
        """The call after which all ranks stop."""
        with self._changed:
            self._target = calls
            self._changed.notify_all()

    def reached(self) -> bool:
        """Whether to stop now; to be asked after every call of the training step."""
        with self._changed:
            self._calls += 1
            if self._limit is None or self._calls < self._limit:
                return False
            self._changed.wait_for(lambda: self._target is not None, timeout=HOLD_SECONDS)
            return self._target is not None and self._calls >= self._target


class Reporter(Protocol):
    """What a worker needs of a connection."""

    @property
    def interruption(self) -> Halt: ...

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
    retryable = not isinstance(error, ConfigError | DataError | MissingDependencyError | NonFiniteLossError)
    return {"error": type(error).__name__, "message": str(error)[:2000], "traceback": text, "retryable": retryable}


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
            _notice_lost_hosts(sock)
            nonce = read(sock, 32)
            sock.sendall(hmac.digest(self.secret, nonce, "sha256"))
        except OSError as error:
            raise WorkerError(
                f"Rank {rank} on {socket.gethostname()} cannot reach the driver at {self.host}:{self.port} ({error}). "
                "Set spark.driver.host to an address of the driver that executors reach, and open its ports to them.",
                rank=rank,
                host=socket.gethostname(),
            ) from error
        return _SocketReporter(Frames(sock, self.secret, nonce, server=False), sock, rank)


class _SocketReporter:
    def __init__(self, frames: Frames, sock: socket.socket, rank: int) -> None:
        self.interruption = Interruption()
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
        with contextlib.suppress(OSError):  # the driver may be gone
            self._frames.send({"kind": "left", "rank": self._rank})
        self._frames.close()

    def _obey(self) -> None:
        try:
            while (message := self._frames.receive())["kind"] != "stop":
                if message["kind"] == "hold":
                    self.send("held", calls=self.interruption.hold())
                elif message["kind"] == "stop_after":
                    self.interruption.stop_after(int(message["calls"]))
            reason = f"the driver said stop: {message['reason']}"
        except (OSError, ValueError, KeyError) as error:
            reason = f"the driver is gone ({error})"
        if not self._closing.is_set():
            self._end_process(reason)

    def _end_process(self, reason: str) -> None:
        logger.warning("Rank %s ends: %s", self._rank, reason)
        logging.shutdown()
        os._exit(STOPPED_EXIT_CODE)


def _notice_lost_hosts(sock: socket.socket) -> None:
    """Have the kernel end a connection to a host that has not answered for 40 seconds, instead of 15 minutes and more."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 40_000)):
        if hasattr(socket, name):  # Linux has them all
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
