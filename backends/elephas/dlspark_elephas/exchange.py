"""How a worker exchanges weights with the parameter server of its round.

The connection is authenticated as that of dlspark's reports, with a secret of the round's own; see `dlspark.wire.framing`.
Nobody can forge, change or replay a frame. A request is a message; weights follow it in a frame of raw arrays, whose size
both sides know. Nothing is encrypted: anyone who can listen can read the weights, as with every other engine.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from numpy.typing import NDArray

from dlspark.plugin import SocketEndpoint, WorkerError, messages

EXCHANGE_SECONDS = 300.0  # for each frame: a gigabyte of weights at 10 MB/s takes 100


def encoded(weights: Sequence[NDArray[Any]]) -> bytes:
    """``weights`` in Elephas' format. The length depends only on their shapes and dtypes."""
    from elephas.utils.serialization import weights_to_bytes

    body: bytes = weights_to_bytes(weights)
    return body


def decoded(body: bytes, like: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
    """The weights in ``body``, with the shapes of ``like``.

    Raises:
        ValueError: the body has other arrays.
    """
    from elephas.utils.serialization import bytes_to_weights

    try:
        arrays = bytes_to_weights(body)
    except (IndexError, TypeError, ValueError) as error:
        raise ValueError(f"expected arrays; got {len(body)} other bytes ({error})") from error
    if [(a.size, a.dtype) for a in like] != [(a.size, a.dtype) for a in arrays]:
        raise ValueError(f"expected {len(like)} arrays of the model's sizes and dtypes; got {len(arrays)} others")
    # Elephas turns a single number into an array of one (danielenricocahall/elephas, serialization.py).
    return [array.reshape(one.shape) for array, one in zip(arrays, like, strict=True)]


class ParameterClient:
    """A worker's connection to the parameter server; a context manager that closes it.

    It replaces Elephas' HttpClient, which signs nothing, has no timeouts and uses http_proxy.

    Args:
        server: the server's endpoint.
        rank: this worker.
        like: arrays with the shapes and dtypes of the weights.

    Raises:
        WorkerError: here or in a method: the server cannot be reached, or refuses the request.
    """

    def __init__(self, server: SocketEndpoint, rank: int, like: Sequence[NDArray[Any]]) -> None:
        self._server = server
        self._rank = rank
        self._like = list(like)
        self._size = len(encoded(self._like))
        self._frames = server.open(rank)
        self._frames.sock.settimeout(EXCHANGE_SECONDS)

    def __enter__(self) -> ParameterClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._frames.close()

    def get_parameters(self) -> list[NDArray[Any]]:
        """The server's current weights."""
        with self._explaining_failures():
            self._ask(messages.GetWeights(rank=self._rank))
            body = self._frames.receive(least=self._size, most=self._size, seconds=EXCHANGE_SECONDS)
            return decoded(body, self._like)

    def update_parameters(self, delta: Sequence[NDArray[Any]]) -> None:
        """Subtract ``delta``, the weights before training minus those after it, from the server's weights."""
        with self._explaining_failures():
            self._ask(messages.SubtractFromWeights(rank=self._rank), encoded(delta))

    def _ask(self, request: messages.ToParameterServer, body: bytes | None = None) -> None:
        """Send a request and wait until it is accepted."""
        self._frames.send(messages.encode(request))
        if body is not None:
            self._frames.send(body)
        answer = messages.decode(self._frames.receive(seconds=EXCHANGE_SECONDS), messages.FromParameterServer)
        if isinstance(answer, messages.Refused):
            raise self._error(f"was refused: {answer.reason}")

    @contextmanager
    def _explaining_failures(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            raise self._error(
                f"cannot exchange weights with the driver ({type(error).__name__}: {error}). Has the driver ended?"
            ) from error

    def _error(self, what: str) -> WorkerError:
        host = socket.gethostname()
        address = f"{self._server.host}:{self._server.port}"
        message = f"Rank {self._rank} on {host}, at the parameter server {address}, {what}"
        return WorkerError(message, rank=self._rank, host=host)
