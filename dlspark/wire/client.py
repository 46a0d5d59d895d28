"""The worker's end of the connection to the driver. `dlspark.wire.server` is the driver's end.

A worker ends its process when it loses the driver, or when the driver orders it to stop because another rank has failed: the
thread that learns of it cannot interrupt a collective that waits for a dead peer. A worker that finishes sends `Left`, so
that the driver can distinguish the end of its work from its death.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import struct
import threading
import traceback
from dataclasses import dataclass, field
from typing import Protocol

from dlspark.errors import ConfigError, DataError, MissingDependencyError, NonFiniteLossError, WorkerError
from dlspark.wire.framing import Frames, connect
from dlspark.wire.messages import Failed, FromDriver, FromWorker, Held, Hold, Left, Stop, StopAfter, decode, encode

logger = logging.getLogger(__name__)

MAX_TRACEBACK_CHARACTERS = 100_000
CONNECT_SECONDS = 30.0
HEARTBEAT_SECONDS = 1.0
SEND_SECONDS = 30
HOLD_SECONDS = 60.0  # the longest wait for `StopAfter` after `Hold`
STOPPED_EXIT_CODE = 75  # EX_TEMPFAIL: the driver stopped this worker, or is gone


class Interruption:
    """Lets all ranks stop after the same step when the driver asks for it.

    Ranks that exchange gradients are at most one call of the training step apart. The driver therefore chooses the call
    after the furthest rank's last one: no rank can pass it, because every rank waits there until the driver has chosen.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._calls = 0
        self._limit: int | None = None
        self._target: int | None = None

    def hold(self) -> int:
        """Allow one more call only; returns the number of completed calls."""
        with self._changed:
            self._limit = self._calls + 1
            return self._calls

    def stop_after(self, calls: int) -> None:
        """Set the call after which all ranks stop."""
        with self._changed:
            self._target = calls
            self._changed.notify_all()

    def reached(self) -> bool:
        """Whether to stop now. Call it after every call of the training step; it may wait for the driver."""
        with self._changed:
            self._calls += 1
            if self._limit is None or self._calls < self._limit:
                return False
            self._changed.wait_for(lambda: self._target is not None, timeout=HOLD_SECONDS)
            return self._target is not None and self._calls >= self._target


class Reporter(Protocol):
    """A worker's connection to its driver."""

    def must_stop(self) -> bool:
        """Whether to stop now. Call it after every call of the training step; it may wait for the driver."""
        ...

    def send(self, message: FromWorker) -> None: ...

    def close(self) -> None: ...


class Endpoint(Protocol):
    """How a worker reaches its driver: plain data that crosses processes, or an object in the same process."""

    def connect(self, rank: int) -> Reporter: ...


def failed(
    rank: int, error: BaseException, *, epoch: int | None = None, step: int | None = None, waits: bool = False
) -> Failed:
    """The report of ``error`` on ``rank``, its traceback shortened in the middle if it is long."""
    text = "".join(traceback.format_exception(error))
    if len(text) > MAX_TRACEBACK_CHARACTERS:
        half = MAX_TRACEBACK_CHARACTERS // 2
        text = f"{text[:half]}\n… {len(text) - 2 * half} characters left out …\n{text[-half:]}"
    return Failed(
        rank=rank,
        host=socket.gethostname(),
        error=type(error).__name__,
        message=str(error)[:2000],
        traceback=text,
        retryable=not isinstance(error, ConfigError | DataError | MissingDependencyError | NonFiniteLossError),
        epoch=epoch,
        step=step,
        waits=waits,
    )


@dataclass(frozen=True)
class SocketEndpoint:
    """The address of a server in the driver, and its secret. Never logged: ``repr`` leaves the secret out."""

    host: str
    port: int
    secret: bytes = field(repr=False)

    def connect(self, rank: int) -> Reporter:
        """Connect as worker ``rank``, to report.

        Raises:
            WorkerError: this host cannot reach the driver.
        """
        return _SocketReporter(self.open(rank), rank)

    def open(self, rank: int) -> Frames:
        """Connect as worker ``rank``, and prove knowledge of the secret.

        Raises:
            WorkerError: this host cannot reach the driver.
        """
        try:
            return connect(self.host, self.port, self.secret, seconds=CONNECT_SECONDS)
        except OSError as error:
            raise WorkerError(
                f"Rank {rank} on {socket.gethostname()} cannot reach the driver at {self.host}:{self.port} ({error}). "
                "Set spark.driver.host to an address of the driver that executors reach, and open its ports to them.",
                rank=rank,
                host=socket.gethostname(),
            ) from error


class _SocketReporter:
    def __init__(self, frames: Frames, rank: int) -> None:
        self._interruption = Interruption()
        self._frames = frames
        self._rank = rank
        self._closing = threading.Event()
        # Reading may take as long as the run, until the stream ends. Sending has a time limit.
        frames.sock.settimeout(None)
        frames.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND_SECONDS, 0))
        threading.Thread(target=self._obey, name="dlspark-channel", daemon=True).start()

    def must_stop(self) -> bool:
        return self._interruption.reached()

    def send(self, message: FromWorker) -> None:
        try:
            self._frames.send(encode(message))
        except OSError:
            if not self._closing.is_set():
                self._end_process("the driver has closed its connection, or is gone")

    def close(self) -> None:
        self._closing.set()
        with contextlib.suppress(OSError):  # the driver may be gone
            self._frames.send(encode(Left(rank=self._rank)))
        self._frames.close()

    def _obey(self) -> None:
        reason = ""
        while not reason:
            try:
                message = decode(self._frames.receive(), FromDriver)
            except (OSError, ValueError) as error:
                reason = f"the driver has closed its connection, or is gone ({error})"
                break
            match message:
                case Hold():
                    self.send(Held(rank=self._rank, calls=self._interruption.hold()))
                case StopAfter():
                    self._interruption.stop_after(message.calls)
                case Stop():
                    reason = f"the driver said stop: {message.reason}"
        if not self._closing.is_set():
            self._end_process(reason)

    def _end_process(self, reason: str) -> None:
        logger.warning("Rank %s ends: %s", self._rank, reason)
        logging.shutdown()
        os._exit(STOPPED_EXIT_CODE)
