"""ParameterServer: the weights of an asynchronous round, served by the driver to its own workers and to nobody else."""

from __future__ import annotations

import hmac
import secrets
import threading
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from elephas.parameter.server import BaseParameterServer
from elephas.utils import subtract_params
from numpy.typing import NDArray

from dlspark_elephas.exchange import (
    PARAMETERS,
    UPDATE,
    Request,
    ServerAddress,
    answer_tag,
    decoded,
    digest_of,
    encoded,
    read_request,
)
from dlspark_elephas.listener import STOP_SECONDS, Listener, RequestError


class ParameterServer(BaseParameterServer):  # type: ignore[misc, unused-ignore]
    """In place of Elephas' HttpServer, whose protocol and update rule it has.

    That one forks the driver, with Spark's gateway and TensorFlow inside; runs Flask's debugger; binds port 4000; keeps its
    lock for ever when an update fails; and takes weights from anyone. This one is a thread.

    Args:
        host: the address to bind.
        weights: what the round starts from; afterwards ``weights`` is what came of it.
    """

    def __init__(self, host: str, weights: Sequence[NDArray[Any]]) -> None:
        # Not super().__init__: it rebuilds the model from its JSON, custom classes included.
        self.weights = list(weights)
        self._size = len(encoded(self.weights))
        self._lock = threading.Lock()
        self._last_number: dict[str, int] = {}  # by sender
        self._updated_by: dict[int, str] = {}  # rank → sender
        self._stopping = threading.Event()
        self._listener = Listener(host, self)
        self.address = ServerAddress(host, self._listener.server_address[1], secrets.token_bytes(32))
        self._thread = threading.Thread(target=self._serve, name="dlspark-parameters", daemon=True)

    def start(self) -> None:
        """Answer requests from now on. The port was bound, and callers have been queueing, since the server was made."""
        self._thread.start()

    def stop(self) -> None:
        """Close the port and all connections, and wait for the server's threads (at most some seconds)."""
        self._stopping.set()
        try:
            if self._thread.is_alive():
                self._thread.join(STOP_SECONDS)
        finally:
            self._listener.close()

    def _serve(self) -> None:
        while not self._stopping.is_set():  # not serve_forever(): to stop that, one waits without a bound
            self._listener.handle_request()
            self._listener.drop_late()

    def answer_tag(self, request: Request, answer: bytes) -> str:
        """What proves to the worker that ``answer`` is this server's."""
        return answer_tag(self.address.secret, request, answer)

    def admit(self, method: str, path: str, authorization: str) -> Request:
        """The request, after its head and before its body was read.

        Raises:
            RequestError: it was not signed with this round's secret, or was seen before; or its worker's task is a second
                attempt, and the first has updated the weights already.
        """
        request = read_request(method, path, authorization, self.address.secret)
        if request is None:
            raise RequestError(HTTPStatus.UNAUTHORIZED, "not signed with the secret of this round")
        with self._lock:
            if request.number <= self._last_number.get(request.sender, 0):
                raise RequestError(HTTPStatus.UNAUTHORIZED, "this request was here before")
            self._last_number[request.sender] = request.number
            self._check_attempt(request)
        if (method, path) not in (("GET", PARAMETERS), ("POST", UPDATE)):
            raise RequestError(HTTPStatus.NOT_FOUND, f"expected GET {PARAMETERS} or POST {UPDATE}")
        return request

    def _check_attempt(self, request: Request) -> None:
        if self._updated_by.get(request.rank, request.sender) != request.sender:
            raise RequestError(
                HTTPStatus.CONFLICT,
                f"Spark has started the task of rank {request.rank} again, and the weights already have updates of its "
                "first attempt: its rows would count twice. Train again.",
            )

    def body_size(self, request: Request, announced: str | None) -> int:
        """How many bytes of body to read.

        Raises:
            RequestError: others than the weights take were announced.
        """
        expected = self._size if request.path == UPDATE else 0
        if not (announced or "0").isdecimal() or len(announced or "0") > 18:
            raise RequestError(HTTPStatus.BAD_REQUEST, "Content-Length is no number of bytes")
        size = int(announced or "0")
        if size > expected:
            raise RequestError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"expected {expected} bytes; {size} were announced")
        if size < expected:
            raise RequestError(HTTPStatus.LENGTH_REQUIRED, f"expected {expected} bytes; {size} were announced")
        return size

    def answer(self, request: Request, body: bytes) -> bytes:
        """Carry out an admitted request.

        Raises:
            RequestError: the body is another than the one that was signed, or holds other arrays than the weights.
        """
        if request.path == PARAMETERS:
            return encoded(self.weights)  # an update replaces the list and its arrays, so this needs no lock
        if not hmac.compare_digest(digest_of(body), request.digest):
            raise RequestError(HTTPStatus.BAD_REQUEST, "the body is not the one that was signed")
        try:
            delta = decoded(body, self.weights)
        except ValueError as error:
            raise RequestError(HTTPStatus.BAD_REQUEST, str(error)) from error
        with self._lock:
            self._check_attempt(request)
            self._updated_by[request.rank] = request.sender
            # reshape: the difference of two arrays without axes is a NumPy number.
            updated = subtract_params(self.weights, delta)
            self.weights = [new.reshape(old.shape) for new, old in zip(updated, self.weights, strict=True)]
        return b""
