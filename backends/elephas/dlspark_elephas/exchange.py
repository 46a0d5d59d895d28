"""What a worker and the parameter server say to each other, and how each knows that it was the other who said it.

The protocol is that of Elephas' HttpServer and HttpClient: GET /parameters gives the weights, POST /update takes what a
worker has changed, both as raw arrays. Elephas takes either from anyone. Here every request carries an HMAC-SHA256, by the
round's secret, over its method, path, sender, running number and the SHA-256 of its body, and every answer one over that
request's and its own body. So a request cannot be forged, changed or sent twice, and no answer stands in for another.
Nothing is encrypted: who can listen can read the weights, as with every other engine.
"""

from __future__ import annotations

import hashlib
import hmac
import http.client
import itertools
import re
import secrets
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from dlspark.plugin import WorkerError

PARAMETERS, UPDATE = "/parameters", "/update"
ANSWER_HEADER = "X-Dlspark-Answer"
CONNECT_SECONDS = 30.0
EXCHANGE_SECONDS = 300.0  # for one request and its answer: a gigabyte of weights at 10 MB/s takes 100
_AUTHORIZATION = re.compile(r"DLSPARK-HMAC-SHA256 ([0-9a-f]{32}) ([0-9]{1,9}) ([0-9]{1,18}) ([0-9a-f]{64}) ([0-9a-f]{64})")


@dataclass(frozen=True)
class ServerAddress:
    """Where a round's parameter server is, and the round's secret. Never logged: ``repr`` leaves the secret out."""

    host: str
    port: int
    secret: bytes = field(repr=False)


@dataclass(frozen=True)
class Request:
    """What is signed of a request.

    Attributes:
        method: GET or POST.
        path: PARAMETERS or UPDATE.
        sender: drawn for each attempt of a worker's task, so that a second attempt is told from the first.
        rank: the worker's.
        number: larger in each request of a sender.
        digest: the SHA-256 of the body, in hex.
    """

    method: str
    path: str
    sender: str
    rank: int
    number: int
    digest: str

    def tag(self, secret: bytes) -> str:
        """The HMAC over all of it, in hex."""
        parts = ("request", self.method, self.path, self.sender, str(self.rank), str(self.number), self.digest)
        return hmac.digest(secret, "\n".join(parts).encode(), "sha256").hex()

    def authorization(self, secret: bytes) -> str:
        """The value of the header Authorization."""
        return f"DLSPARK-HMAC-SHA256 {self.sender} {self.rank} {self.number} {self.digest} {self.tag(secret)}"


def read_request(method: str, path: str, authorization: str, secret: bytes) -> Request | None:
    """The request whose Authorization header this is; None when it was not signed with ``secret``."""
    match = _AUTHORIZATION.fullmatch(authorization)
    if match is None:
        return None
    sender, rank, number, digest, tag = match.groups()
    request = Request(method, path, sender, int(rank), int(number), digest)
    return request if hmac.compare_digest(tag, request.tag(secret)) else None


def digest_of(body: bytes) -> str:
    """The SHA-256 of ``body``, in hex."""
    return hashlib.sha256(body).hexdigest()


def answer_tag(secret: bytes, request: Request, body: bytes) -> str:
    """The HMAC of the answer ``body`` to ``request``, in hex."""
    return hmac.digest(secret, f"answer\n{request.tag(secret)}\n{digest_of(body)}".encode(), "sha256").hex()


def encoded(weights: Sequence[NDArray[Any]]) -> bytes:
    """``weights`` as Elephas sends them. The length depends on nothing but their shapes and dtypes."""
    from elephas.utils.serialization import weights_to_bytes

    body: bytes = weights_to_bytes(weights)
    return body


def decoded(body: bytes, like: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
    """The weights in ``body``, of the shapes of ``like``.

    Raises:
        ValueError: they are others than those.
    """
    from elephas.utils.serialization import bytes_to_weights

    try:
        arrays = bytes_to_weights(body)
    except (IndexError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"expected arrays; {len(body)} bytes came that hold none ({error})") from error
    expected, came = [(a.size, a.dtype) for a in like], [(a.size, a.dtype) for a in arrays]
    if expected != came:
        raise ValueError(f"expected {len(expected)} arrays of the model's sizes and dtypes; {len(came)} others came")
    # Elephas turns a single number into an array of one (danielenricocahall/elephas, serialization.py).
    return [array.reshape(one.shape) for array, one in zip(arrays, like, strict=True)]


class ParameterClient:
    """A worker's end, in place of Elephas' HttpClient, which signs nothing, waits for ever and obeys http_proxy.

    Args:
        address: the server.
        rank: this worker.
        like: arrays of the shapes and dtypes of the weights.
    """

    def __init__(self, address: ServerAddress, rank: int, like: Sequence[NDArray[Any]]) -> None:
        self._address = address
        self._rank = rank
        self._like = list(like)
        self._size = len(encoded(self._like))
        self._sender = secrets.token_hex(16)
        self._numbers = itertools.count(1)

    def get_parameters(self) -> list[NDArray[Any]]:
        """The server's weights as they are now."""
        return decoded(self._ask("GET", PARAMETERS, b"", self._size), self._like)

    def update_parameters(self, delta: Sequence[NDArray[Any]]) -> None:
        """Let the server subtract ``delta``, weights before training minus after."""
        self._ask("POST", UPDATE, encoded(delta), 0)

    def _ask(self, method: str, path: str, body: bytes, size: int) -> bytes:
        """The answer, which must have ``size`` bytes."""
        address = self._address
        request = Request(method, path, self._sender, self._rank, next(self._numbers), digest_of(body))
        connection = http.client.HTTPConnection(address.host, address.port, timeout=CONNECT_SECONDS)
        try:
            connection.connect()
            connection.sock.settimeout(EXCHANGE_SECONDS)
            connection.request(method, path, body or None, {"Authorization": request.authorization(address.secret)})
            response = connection.getresponse()
            answer = response.read(size if response.status == http.client.OK else 1000)
        except (OSError, http.client.HTTPException) as error:
            raise self._error(
                f"cannot exchange weights with the driver ({type(error).__name__}: {error}). Is spark.driver.host an "
                "address of the driver that executors reach, and are its ports open to them?"
            ) from error
        finally:
            connection.close()
        if response.status != http.client.OK:
            raise self._error(f"was refused: {answer.decode(errors='replace')}")
        tag = response.getheader(ANSWER_HEADER, "")
        # The tag is over what was read, so an answer that is cut short or too long does not fit it.
        if not hmac.compare_digest(tag.encode(), answer_tag(address.secret, request, answer).encode()):
            raise self._error("got an answer that was not the parameter server's. Who else listens there?")
        return answer

    def _error(self, what: str) -> WorkerError:
        host, address = socket.gethostname(), self._address
        message = f"Rank {self._rank} on {host}, at the parameter server {address.host}:{address.port}, {what}"
        return WorkerError(message, rank=self._rank, host=host)
