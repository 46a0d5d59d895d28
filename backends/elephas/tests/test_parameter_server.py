"""The parameter server: it serves its own workers, and a stranger gets nothing, changes nothing and stops nothing."""

from __future__ import annotations

import dataclasses
import os
import pickle
import resource
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from dlspark import Trainer, WorkerError
from dlspark_elephas.exchange import ParameterClient, Request, ServerAddress, digest_of, encoded

pytestmark = pytest.mark.timeout(60)
WEIGHTS = [np.arange(6, dtype=np.float32).reshape(2, 3), np.array(5, np.int64), np.array(2.0, np.float32)]
DELTA = [np.ones((2, 3), np.float32), np.array(-1, np.int64), np.array(0.5, np.float32)]


@pytest.fixture
def server() -> Iterator[Any]:
    from dlspark_elephas.parameter_server import ParameterServer

    server = ParameterServer("127.0.0.1", WEIGHTS)
    server.start()
    yield server
    server.stop()


def client(server: Any, rank: int = 0, **changes: Any) -> ParameterClient:
    return ParameterClient(dataclasses.replace(server.address, **changes), rank, WEIGHTS)


def signed(secret: bytes, method: str, path: str, body: bytes = b"", number: int = 1) -> str:
    return Request(method, path, secrets.token_hex(16), 0, number, digest_of(body)).authorization(secret)


def head(method: str, path: str, authorization: str = "", **headers: Any) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, f"Authorization: {authorization}", "", ""]).encode()


def answer_to(address: ServerAddress, data: bytes) -> bytes:
    """All that the server says to ``data`` before it closes the connection, in bounded time."""
    answer = b""
    with socket.create_connection((address.host, address.port), timeout=10) as sock:
        try:
            sock.sendall(data)
            while part := sock.recv(1 << 16):
                answer += part
        except (ConnectionResetError, BrokenPipeError):  # it closed before it had read all
            pass
    return answer


def status(answer: bytes) -> int | None:
    return int(answer.split()[1]) if answer.startswith(b"HTTP/") else None


def is_closed(address: ServerAddress) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex((address.host, address.port)) != 0


def minus(times: int) -> list[Any]:
    """WEIGHTS after so many DELTAs."""
    return [np.asarray(w - times * d, w.dtype) for w, d in zip(WEIGHTS, DELTA, strict=True)]


def assert_equal(left: list[Any], right: list[Any]) -> None:
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a, b)
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_two_workers_exchange_and_both_deltas_count_in_full(server: Any) -> None:
    first, second = client(server, 0), client(server, 1)
    assert_equal(first.get_parameters(), WEIGHTS)
    first.update_parameters(DELTA)
    second.update_parameters(DELTA)
    first.update_parameters(DELTA)
    assert_equal(second.get_parameters(), minus(3))


def test_no_update_is_lost_when_many_come_at_once(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from dlspark_elephas import parameter_server

    def slow_subtract(weights: Any, delta: Any) -> Any:
        time.sleep(0.002)
        return [w - d for w, d in zip(weights, delta, strict=True)]

    monkeypatch.setattr(parameter_server, "subtract_params", slow_subtract)

    def work(rank: int) -> None:
        own = client(server, rank)
        for _ in range(20):
            own.get_parameters()
            own.update_parameters(DELTA)

    workers = [threading.Thread(target=work, args=(rank,)) for rank in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert_equal(server.weights, minus(160))


def test_half_precision_travels() -> None:
    import ml_dtypes

    from dlspark_elephas.parameter_server import ParameterServer

    weights = [np.array([1.5, 2.5], ml_dtypes.bfloat16), np.array([0.5], np.float16)]
    server = ParameterServer("127.0.0.1", weights)
    server.start()
    try:
        own = ParameterClient(server.address, 0, weights)
        own.update_parameters([np.array([0.5, 0.5], ml_dtypes.bfloat16), np.array([0.25], np.float16)])
        left = own.get_parameters()
    finally:
        server.stop()
    assert_equal(left, [np.array([1, 2], ml_dtypes.bfloat16), np.array([0.25], np.float16)])


def strange_requests(address: ServerAddress, seen: bytes) -> dict[str, bytes]:
    """What a stranger may send who does not have the secret, and has overheard ``seen``."""
    other = secrets.token_bytes(32)
    overheard = seen.partition(b"Authorization: ")[2].strip().decode()
    return {
        "no secret": head("GET", "/parameters"),
        "wrong secret": head("GET", "/parameters", signed(other, "GET", "/parameters")),
        "update with a wrong secret": head("POST", "/update", signed(other, "POST", "/update"), Content_Length=100)
        + b"x" * 100,
        "replay": seen,
        "replay, another path": head("POST", "/update", overheard, Content_Length=0),
        "2 GiB": head("POST", "/update", signed(other, "POST", "/update"), Content_Length=2 << 30) + os.urandom(1 << 20),
        "chunks": head("POST", "/update", Transfer_Encoding="chunked") + b"FFFFFFFF\r\n" + os.urandom(1 << 20),
        "garbage": os.urandom(100_000),
        "a pickle": pickle.dumps(WEIGHTS) + b"\n\n",
        "an endless line": b"GET /" + b"a" * (1 << 22),
        "a head too long, without an end": b"GET /parameters HTTP/1.1\r\nA: " + b"a" * 9000,
        "an endless head": b"GET /parameters HTTP/1.1\r\n" + b"a: b\r\n" * 1_000_000,
    }


def assert_strangers_are_refused(address: ServerAddress, seen: bytes) -> None:
    for name, data in strange_requests(address, seen).items():
        started = time.monotonic()
        answer = answer_to(address, data)
        assert time.monotonic() - started < 2, name
        assert status(answer) in (400, 401, None), (name, answer)
        assert len(answer) < 1000, name


def test_strangers_are_refused(server: Any) -> None:
    seen = head("GET", "/parameters", signed(server.address.secret, "GET", "/parameters"))
    assert status(answer_to(server.address, seen)) == 200
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert_strangers_are_refused(server.address, seen)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024 < 50_000_000
    assert_equal(client(server).get_parameters(), WEIGHTS)


@pytest.mark.parametrize("what", ["no secret", "wrong secret", "replay", "2 GiB"])
def test_what_is_refused_by_its_head_is_told_so(server: Any, what: str) -> None:
    seen = head("GET", "/parameters", signed(server.address.secret, "GET", "/parameters"))
    answer_to(server.address, seen)
    request = strange_requests(server.address, seen)[what].partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
    assert status(answer_to(server.address, request)) == 401


def test_a_replayed_update_counts_once(server: Any) -> None:
    body = encoded(DELTA)
    data = head("POST", "/update", signed(server.address.secret, "POST", "/update", body), Content_Length=len(body)) + body
    assert status(answer_to(server.address, data)) == 200
    for _ in range(2):
        assert status(answer_to(server.address, data)) in (401, None)  # None: it closes on a body that it does not read
    assert_equal(server.weights, minus(1))


def test_lengths_other_than_the_weights_are_refused_before_they_are_read(server: Any) -> None:
    def refusal(length: int) -> int | None:
        signature = signed(server.address.secret, "POST", "/update", b"")
        return status(answer_to(server.address, head("POST", "/update", signature, Content_Length=length)))

    assert refusal(2 << 30) == 413
    assert refusal(10) == refusal(0) == 411
    assert_equal(server.weights, WEIGHTS)


def test_a_changed_body_is_refused(server: Any) -> None:
    body = encoded(DELTA)
    data = head("POST", "/update", signed(server.address.secret, "POST", "/update", body), Content_Length=len(body))
    assert status(answer_to(server.address, data + body[:-1] + b"\0")) == 400
    wrong = b"\xff" * len(body)
    data = head("POST", "/update", signed(server.address.secret, "POST", "/update", wrong), Content_Length=len(wrong))
    assert status(answer_to(server.address, data + wrong)) == 400
    assert_equal(server.weights, WEIGHTS)


def test_a_second_attempt_is_refused_once_the_first_has_updated(server: Any) -> None:
    first = client(server, 1)
    first.get_parameters()
    second = client(server, 1)  # nothing was added yet: Spark may start a task again
    second.get_parameters()
    second.update_parameters(DELTA)
    with pytest.raises(WorkerError, match=r"Rank 1 .* was refused: .* rows would count twice"):
        first.get_parameters()
    with pytest.raises(WorkerError, match="Rank 1"):
        first.update_parameters(DELTA)
    client(server, 0).update_parameters(DELTA)
    assert_equal(server.weights, minus(2))


def test_silence_is_cut_and_many_silent_ones_keep_nobody_out(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from dlspark_elephas import listener

    monkeypatch.setattr(listener, "HEAD_SECONDS", 2.0)
    where = (server.address.host, server.address.port)
    silent = [socket.create_connection(where, timeout=10) for _ in range(3 * listener.MAX_STRANGERS)]
    try:
        assert_equal(client(server).get_parameters(), WEIGHTS)
        serving = [thread for thread in threading.enumerate() if thread.name == "dlspark-parameters-request"]
        assert len(serving) < 2 * listener.MAX_STRANGERS
        started = time.monotonic()
        for sock in silent[-10:]:
            assert sock.recv(1) == b""
        assert time.monotonic() - started < 4
    finally:
        for sock in silent:
            sock.close()


def test_a_stop_closes_what_is_open(server: Any) -> None:
    with socket.create_connection((server.address.host, server.address.port), timeout=10) as silent:
        client(server).get_parameters()
        started = time.monotonic()
        server.stop()
        server.stop()
        assert silent.recv(1) == b""
    assert time.monotonic() - started < 5
    assert is_closed(server.address)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("dlspark-parameters")]
    with pytest.raises(WorkerError, match="cannot exchange weights with the driver"):
        client(server).get_parameters()


def test_an_answer_of_somebody_else_is_refused(server: Any) -> None:
    """A server that knows the protocol and not the secret."""
    body = encoded(WEIGHTS)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def pose() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.recv(1 << 16)
                tag = "0" * 64
                sock.sendall(
                    f"HTTP/1.0 200 OK\r\nContent-Length: {len(body)}\r\nX-Dlspark-Answer: {tag}\r\n\r\n".encode() + body
                )

        thread = threading.Thread(target=pose)
        thread.start()
        with pytest.raises(WorkerError, match="not the parameter server's"):
            client(server, port=listener.getsockname()[1]).get_parameters()
        thread.join(10)


def test_a_defect_of_the_server_reaches_the_worker(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ArithmeticError("on purpose")

    monkeypatch.setattr(server, "answer", broken)
    with pytest.raises(WorkerError, match="was refused: ArithmeticError: on purpose"):
        client(server).get_parameters()


def test_proxies_are_not_asked(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert_equal(client(server).get_parameters(), WEIGHTS)


def test_the_secret_is_not_in_the_repr(server: Any) -> None:
    assert repr(server.address.secret) not in repr(server.address)
    assert "secret" not in repr(server.address)


@pytest.mark.spark
@pytest.mark.timeout(120)
@pytest.mark.usefixtures("spark")
def test_strangers_do_not_reach_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the open port of a real run, while its first worker is in its first exchange."""
    from dlspark.testing import toys
    from dlspark_elephas.parameter_server import ParameterServer

    overheard: list[tuple[Any, bytes]] = []
    worker_asks, tried = threading.Event(), threading.Event()
    admit = ParameterServer.admit

    def watched(self: Any, method: str, path: str, authorization: str) -> Request:
        request = admit(self, method, path, authorization)  # raises for strangers: what follows are the workers
        overheard.append((self.address, head(method, path, authorization)))
        worker_asks.set()
        tried.wait(60)
        return request

    monkeypatch.setattr(ParameterServer, "admit", watched)
    failures: list[BaseException] = []

    def attack() -> None:
        try:
            assert worker_asks.wait(60)
            assert_strangers_are_refused(*overheard[0])
        except BaseException as error:
            failures.append(error)
        finally:
            tried.set()

    thread = threading.Thread(target=attack)
    thread.start()
    result = Trainer("elephas", num_workers=2, options={"mode": "asynchronous", "frequency": "batch"}).fit(
        toys.dense_classifier(),
        toys.separable(1003),
        validation_data=toys.separable(50, seed=9),
        epochs=3,
        batch_size=64,
        verbose=0,
        seed=3,
    )
    thread.join(30)
    assert not failures
    assert worker_asks.is_set()
    assert result.history["loss"][-1] < 0.5
    assert result.history["val_loss"][-1] < 0.5
    assert sum(worker.rows for worker in result.workers) == 3 * 1003
    assert is_closed(overheard[0][0])
