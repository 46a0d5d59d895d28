"""Listener: HTTP on a port that the system gives, with a bound on whatever a stranger can hold or send."""

from __future__ import annotations

import io
import logging
import socket
import socketserver
import threading
import time
from collections.abc import Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import Any

from dlspark_elephas.exchange import ANSWER_HEADER, EXCHANGE_SECONDS

logger = logging.getLogger(__name__)

HEAD_SECONDS = 5.0  # to say who one is
STOP_SECONDS = 5.0
POLL_SECONDS = 0.1
MAX_HEAD_BYTES = 8192
MAX_STRANGERS = 64


class RequestError(Exception):
    """A request that is refused with an HTTP status."""

    def __init__(self, status: HTTPStatus, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Listener(socketserver.TCPServer):
    """Accepts connections on a port that the system gives, each in a thread, and bounds what strangers can hold."""

    request_queue_size = 128
    timeout = POLL_SECONDS  # of handle_request

    def __init__(self, host: str, parameters: Any) -> None:
        super().__init__((host, 0), _Handler)
        self.parameters = parameters
        self._lock = threading.Lock()
        self._late_at: dict[socket.socket, float] = {}
        self._strangers: dict[socket.socket, None] = {}  # in the order in which they came
        self._threads: set[threading.Thread] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        thread = threading.Thread(
            target=self._handle, args=(request, client_address), name="dlspark-parameters-request", daemon=True
        )
        with self._lock:
            if len(self._strangers) >= MAX_STRANGERS:  # a worker says who it is at once; who has waited longest goes
                oldest = next(iter(self._strangers))
                del self._strangers[oldest]
                _shut(oldest)
            self._strangers[request] = None
            self._late_at[request] = time.monotonic() + HEAD_SECONDS
        thread.start()

    def _handle(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._threads.add(threading.current_thread())
        try:
            self.finish_request(request, client_address)
        except (OSError, ValueError) as error:  # the end of the stream, or a stranger's noise
            logger.debug("A connection to the parameter server ended: %s", error)
        finally:
            self.shutdown_request(request)
            with self._lock:
                self._threads.discard(threading.current_thread())

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._strangers.pop(request, None)
            self._late_at.pop(request, None)
        super().shutdown_request(request)

    def trust(self, request: Any) -> None:
        """Give a connection that has said who it is the time that an exchange takes."""
        with self._lock:
            self._strangers.pop(request, None)
            self._late_at[request] = time.monotonic() + EXCHANGE_SECONDS

    def drop_late(self) -> None:
        """Shut the connections whose time is up, however busily they send."""
        now = time.monotonic()
        with self._lock:
            for request in [request for request, late_at in self._late_at.items() if late_at < now]:
                _shut(request)

    def close(self) -> None:
        """Close the port and all connections, and wait for their threads."""
        self.server_close()
        with self._lock:
            for request in self._late_at:
                _shut(request)
            threads = list(self._threads)
        deadline = time.monotonic() + STOP_SECONDS
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))


class _Head(io.BufferedReader):
    """Reads lines until their bound is used up, then none: the head of a request has no bound of its own worth the name."""

    _left = MAX_HEAD_BYTES

    def readline(self, size: int | None = -1, /) -> bytes:
        line = super().readline(self._left if size is None or size < 0 else min(size, self._left))
        self._left -= len(line)
        return line


class _Handler(BaseHTTPRequestHandler):
    """One connection, one request: nothing of a body is read before `ParameterServer.admit`."""

    server: Listener
    timeout = EXCHANGE_SECONDS  # of each operation on the socket; `drop_late` bounds the whole

    def setup(self) -> None:
        super().setup()
        self.rfile = _Head(self.connection.makefile("rb", buffering=0))

    def do_GET(self) -> None:
        parameters = self.server.parameters
        try:
            request = parameters.admit(self.command, self.path, self.headers.get("Authorization", ""))
            size = parameters.body_size(request, self.headers.get("Content-Length"))
            self.server.trust(self.connection)
            answer = parameters.answer(request, self.rfile.read(size))
        except RequestError as error:
            self._reply(error.status, str(error).encode())
        except OSError:  # the worker is gone
            raise
        except Exception as error:  # a defect of ours: the worker that waits must hear of it, and fail with it
            logger.exception("The parameter server failed")
            self._reply(HTTPStatus.INTERNAL_SERVER_ERROR, f"{type(error).__name__}: {error}".encode())
        else:
            self._reply(HTTPStatus.OK, answer, {ANSWER_HEADER: parameters.answer_tag(request, answer)})

    do_POST = do_GET

    def _reply(self, status: HTTPStatus, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def version_string(self) -> str:
        return "dlspark"

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug("Parameter server: " + format, *args)


def _shut(request: socket.socket) -> None:
    """Wake the thread that waits for this connection, and let it close it."""
    try:
        request.shutdown(socket.SHUT_RDWR)
    except OSError as error:  # the other side was quicker
        logger.debug("A connection was closed already: %s", error)
