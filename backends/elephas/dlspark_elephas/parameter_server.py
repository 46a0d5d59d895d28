"""ParameterServer: the weights of an asynchronous round, which the driver serves to its own workers only."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Sequence
from typing import Any

from elephas.parameter.server import BaseParameterServer
from elephas.utils import subtract_params
from numpy.typing import NDArray

from dlspark.plugin import Frames, Server, SocketEndpoint, messages
from dlspark_elephas.exchange import EXCHANGE_SECONDS, decoded, encoded

logger = logging.getLogger(__name__)


class ParameterServer(BaseParameterServer):  # type: ignore[misc, unused-ignore]
    """Replaces Elephas' HttpServer, with the same update rule.

    That server forks the driver, including Spark's gateway and TensorFlow; runs Flask's debugger; binds port 4000; never
    releases its lock if an update fails; and accepts weights from anyone. This one has a thread for each worker.

    Args:
        host: the address to bind.
        weights: the weights at the start of the round; afterwards ``weights`` has the result.

    Attributes:
        address: the endpoint for `ParameterClient`, after `start`.
    """

    address: SocketEndpoint

    def __init__(self, host: str, weights: Sequence[NDArray[Any]]) -> None:
        # Not super().__init__: it rebuilds the model from its JSON, custom classes included.
        self.weights = list(weights)
        self._host = host
        self._size = len(encoded(self.weights))
        self._lock = threading.Lock()
        self._updated_by: dict[int, Frames] = {}  # rank → the connection of its attempt
        self._server: Server | None = None

    def start(self) -> None:
        """Bind a port and answer requests."""
        self._server = Server(self._host, self._serve, name="dlspark-parameters")
        self.address = self._server.endpoint

    def stop(self) -> None:
        """Close the port and all connections, and wait for the server's threads (at most a few seconds)."""
        if self._server is not None:
            self._server.close()

    def _serve(self, frames: Frames) -> None:
        """Answer the requests of one worker until it closes the connection."""
        while True:
            frames.sock.settimeout(None)  # the worker trains between two requests; `stop` ends the wait
            request = messages.decode(frames.receive(), messages.ToParameterServer)
            frames.sock.settimeout(EXCHANGE_SECONDS)
            try:
                answer = self.answer(frames, request)
            except Exception as error:  # the worker waits for an answer, and fails with this one
                known = isinstance(error, OSError | ValueError)
                if not known:
                    logger.exception("The parameter server failed")
                reason = str(error) if known else f"{type(error).__name__}: {error}"
                with contextlib.suppress(OSError):  # the worker may be gone
                    frames.send(messages.encode(messages.Refused(reason=reason)))
                return
            frames.send(messages.encode(messages.Accepted()))
            if answer is not None:
                frames.send(answer)

    def answer(self, frames: Frames, request: messages.ToParameterServer) -> bytes | None:
        """Carry out a request from ``frames``; returns the frame for the worker, if there is one.

        Raises:
            ConnectionError: the frame of the update has another size than the weights. Nothing of it was read.
            ValueError: the update has other arrays than the weights. Or this is the second attempt of a worker's task, and
                the first one has updated the weights already.
        """
        if isinstance(request, messages.GetWeights):
            with self._lock:
                self._check_attempt(frames, request.rank)
            return encoded(self.weights)  # without the lock: an update replaces the list and its arrays
        delta = decoded(frames.receive(least=self._size, most=self._size, seconds=EXCHANGE_SECONDS), self.weights)
        with self._lock:
            self._check_attempt(frames, request.rank)
            self._updated_by[request.rank] = frames
            # reshape: the difference of two arrays without axes is a NumPy number.
            updated = subtract_params(self.weights, delta)
            self.weights = [new.reshape(old.shape) for new, old in zip(updated, self.weights, strict=True)]
        return None

    def _check_attempt(self, frames: Frames, rank: int) -> None:
        if self._updated_by.get(rank, frames) is not frames:
            raise ValueError(
                f"Spark has started the task of rank {rank} again, and the weights already include updates of its first "
                "attempt: its rows would count twice. Train again."
            )
