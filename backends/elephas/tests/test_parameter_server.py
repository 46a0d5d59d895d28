"""The parameter server: it serves its own workers, and a stranger gets nothing, changes nothing and stops nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import hmac
import os
import pickle
import resource
import secrets
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from dlspark import Trainer, WorkerError
from dlspark.plugin import Frames, SocketEndpoint, messages
from dlspark.wire import MAX_STRANGERS
from dlspark_elephas.exchange import ParameterClient, encoded

pytestmark = pytest.mark.timeout(60)
WEIGHTS = [np.arange(6, dtype=np.float32).reshape(2, 3), np.array(5, np.int64), np.array(2.0, np.float32)]
DELTA = [np.ones((2, 3), np.float32), np.array(-1, np.int64), np.array(0.5, np.float32)]
UPDATE = messages.encode(messages.SubtractFromWeights(rank=0))
NONCE_BYTES = 32


@pytest.fixture
def server() -> Iterator[Any]:
    from dlspark_elephas.parameter_server import ParameterServer

    server = ParameterServer("127.0.0.1", WEIGHTS)
    server.start()
    yield server
    server.stop()


@contextlib.contextmanager
def client(server: Any, rank: int = 0, **changes: Any) -> Iterator[ParameterClient]:
    with ParameterClient(dataclasses.replace(server.address, **changes), rank, WEIGHTS) as found:
        yield found


def bytes_of_worker(secret: bytes, nonce: bytes, *payloads: bytes) -> bytes:
    """The bytes that a worker sends: its answer to ``nonce``, and a frame for each payload."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        frames = Frames(ours, secret, nonce, server=False)
        for payload in payloads:
            frames.send(payload)
        ours.shutdown(socket.SHUT_WR)
        return hmac.digest(secret, nonce, "sha256") + b"".join(iter(lambda: theirs.recv(1 << 16), b""))


def answer_to(address: SocketEndpoint, *payloads: bytes, data: bytes | None = None) -> bytes:
    """What the server sends after its nonce, in answer to a worker's ``payloads`` or to a stranger's bytes ``data``."""
    answer = b""
    with socket.create_connection((address.host, address.port), timeout=10) as sock:
        nonce = sock.recv(NONCE_BYTES, socket.MSG_WAITALL)
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):  # it closed before it had read everything
            sock.sendall(bytes_of_worker(address.secret, nonce, *payloads) if data is None else data)
            with contextlib.suppress(OSError):  # the connection is closed already
                sock.shutdown(socket.SHUT_WR)
            while part := sock.recv(1 << 16):
                answer += part
    return answer


def is_closed(address: SocketEndpoint) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex((address.host, address.port)) != 0


def minus(times: int) -> list[Any]:
    """WEIGHTS after ``times`` updates by DELTA."""
    return [np.asarray(w - times * d, w.dtype) for w, d in zip(WEIGHTS, DELTA, strict=True)]


def assert_equal(left: list[Any], right: list[Any]) -> None:
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a, b)
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_two_workers_exchange_and_both_deltas_count_in_full(server: Any) -> None:
    with client(server, 0) as first, client(server, 1) as second:
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
        with client(server, rank) as own:
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
        with ParameterClient(server.address, 0, weights) as own:
            own.update_parameters([np.array([0.5, 0.5], ml_dtypes.bfloat16), np.array([0.25], np.float16)])
            left = own.get_parameters()
    finally:
        server.stop()
    assert_equal(left, [np.array([1, 2], ml_dtypes.bfloat16), np.array([0.25], np.float16)])


def strange_bytes(secret: bytes) -> dict[str, bytes]:
    """What a stranger may send without ``secret``, but with a record of what a worker sent on another connection."""
    nonce, body = secrets.token_bytes(NONCE_BYTES), encoded(DELTA)
    recorded = bytes_of_worker(secret, nonce, UPDATE, body)
    return {
        "wrong secret": bytes_of_worker(secrets.token_bytes(32), nonce, UPDATE, body),
        "replay": recorded,
        "replay of the frames": recorded[32:],
        "2 GiB": bytes(32) + struct.pack(">Q", 2 << 30) + os.urandom(1 << 20),
        "garbage": os.urandom(100_000),
        "a pickle": pickle.dumps(WEIGHTS).ljust(100, b"."),
        "http": b"GET /parameters HTTP/1.1\r\n" + b"a: b\r\n" * 1_000_000,
    }


def assert_strangers_are_refused(address: SocketEndpoint) -> None:
    for name, data in strange_bytes(address.secret).items():
        started = time.monotonic()
        assert answer_to(address, data=data) == b"", name
        assert time.monotonic() - started < 2, name


def test_strangers_are_refused(server: Any) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert_strangers_are_refused(server.address)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024 < 50_000_000
    assert_equal(server.weights, WEIGHTS)
    with client(server) as own:
        assert_equal(own.get_parameters(), WEIGHTS)


def test_a_replayed_update_counts_once(server: Any) -> None:
    """An attacker in the middle of a worker's own connection repeats its frames."""
    address, body = server.address, encoded(DELTA)
    with socket.create_connection((address.host, address.port), timeout=10) as sock:
        data = bytes_of_worker(address.secret, sock.recv(NONCE_BYTES, socket.MSG_WAITALL), UPDATE, body)
        sock.sendall(data)
        assert b"accepted" in sock.recv(1 << 16)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            sock.sendall(data[32:])
            answer = sock.recv(1 << 16)
    assert answer == b""
    assert_equal(server.weights, minus(1))


def test_sizes_other_than_the_weights_are_refused_before_they_are_read(server: Any) -> None:
    size = len(encoded(DELTA))
    for length in (0, 10, size - 1, size + 1, 2 << 30):
        address = server.address
        with socket.create_connection((address.host, address.port), timeout=10) as sock:
            sock.sendall(bytes_of_worker(address.secret, sock.recv(NONCE_BYTES, socket.MSG_WAITALL), UPDATE))
            sock.sendall(struct.pack(">Q", length))  # without the frame itself
            answer = b"".join(iter(lambda sock=sock: sock.recv(1 << 16), b""))  # type: ignore[misc]
        assert f"expected a frame of {size} to {size} bytes; got one of {length} bytes".encode() in answer
    assert_equal(server.weights, WEIGHTS)


def test_a_changed_body_is_refused(server: Any) -> None:
    address, body = server.address, encoded(DELTA)
    with socket.create_connection((address.host, address.port), timeout=10) as sock:
        data = bytes_of_worker(address.secret, sock.recv(NONCE_BYTES, socket.MSG_WAITALL), UPDATE, body)
        sock.sendall(data[:-1] + b"\1")
        assert b"the authentication code of a frame is wrong" in b"".join(iter(lambda: sock.recv(1 << 16), b""))
    assert b"expected" in answer_to(server.address, UPDATE, b"\xff" * len(body))
    assert_equal(server.weights, WEIGHTS)


@pytest.mark.parametrize("message", [messages.Left(rank=0), messages.Stop(reason="x"), messages.Accepted()], ids=repr)
def test_messages_of_others_are_refused(server: Any, message: messages.Message) -> None:
    assert answer_to(server.address, messages.encode(message)) == b""
    assert_equal(server.weights, WEIGHTS)


def test_a_second_attempt_is_refused_once_the_first_has_updated(server: Any) -> None:
    with client(server, 1) as first, client(server, 1) as second, client(server, 0) as other:
        first.get_parameters()
        second.get_parameters()  # no update was added yet, so Spark may restart a task
        second.update_parameters(DELTA)
        with pytest.raises(WorkerError, match=r"Rank 1 .* was refused: .* rows would count twice"):
            first.get_parameters()
        other.update_parameters(DELTA)
    with client(server, 1) as third, pytest.raises(WorkerError, match=r"Rank 1 .* rows would count twice"):
        third.update_parameters(DELTA)
    assert_equal(server.weights, minus(2))


def test_many_silent_ones_keep_nobody_out(server: Any) -> None:
    where = (server.address.host, server.address.port)
    silent = [socket.create_connection(where, timeout=10) for _ in range(3 * MAX_STRANGERS)]
    try:
        with client(server) as own:
            assert_equal(own.get_parameters(), WEIGHTS)
        serving = [thread for thread in threading.enumerate() if thread.name == "dlspark-parameters-connection"]
        assert 0 < len(serving) < 2 * MAX_STRANGERS
    finally:
        for sock in silent:
            sock.close()


def test_a_body_that_does_not_come_is_not_waited_for(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from dlspark_elephas import parameter_server

    monkeypatch.setattr(parameter_server, "EXCHANGE_SECONDS", 0.5)
    address = server.address
    with socket.create_connection((address.host, address.port), timeout=10) as sock:
        sock.sendall(bytes_of_worker(address.secret, sock.recv(NONCE_BYTES, socket.MSG_WAITALL), UPDATE))
        sock.sendall(struct.pack(">Q", len(encoded(DELTA))))
        started = time.monotonic()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while time.monotonic() - started < 5:
                sock.sendall(b"x")  # a byte now and then does not extend the limit
                time.sleep(0.2)
        assert time.monotonic() - started < 3


def test_a_stop_closes_what_is_open(server: Any) -> None:
    with socket.create_connection((server.address.host, server.address.port), timeout=10) as silent:
        with client(server) as own:
            own.get_parameters()
            started = time.monotonic()
            server.stop()
            server.stop()
            assert len(silent.recv(1 << 16)) == NONCE_BYTES
            assert silent.recv(1) == b""
            with pytest.raises(WorkerError, match="cannot exchange weights with the driver"):
                own.get_parameters()
        assert time.monotonic() - started < 5
    assert is_closed(server.address)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("dlspark-parameters")]
    with pytest.raises(WorkerError, match="cannot reach the driver"):
        ParameterClient(server.address, 0, WEIGHTS)


def test_an_answer_of_somebody_else_is_refused(server: Any) -> None:
    """A server that knows the protocol but not the secret."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def pose() -> None:
            sock, _ = listener.accept()
            with sock:
                nonce = bytes(NONCE_BYTES)
                sock.sendall(nonce)
                frames = Frames(sock, b"another secret", nonce, server=True)
                frames.send(messages.encode(messages.Accepted()))
                frames.send(encoded(WEIGHTS))
                sock.recv(1 << 16)

        thread = threading.Thread(target=pose)
        thread.start()
        with (
            client(server, port=listener.getsockname()[1]) as own,
            pytest.raises(WorkerError, match="the authentication code of a frame is wrong"),
        ):
            own.get_parameters()
        thread.join(10)


def test_a_defect_of_the_server_reaches_the_worker(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ArithmeticError("on purpose")

    monkeypatch.setattr(server, "answer", broken)
    with client(server) as own, pytest.raises(WorkerError, match="was refused: ArithmeticError: on purpose"):
        own.get_parameters()


def test_the_secret_is_not_in_the_repr(server: Any) -> None:
    assert repr(server.address.secret) not in repr(server.address)
    assert "secret" not in repr(server.address)


@pytest.mark.spark
@pytest.mark.timeout(120)
@pytest.mark.usefixtures("spark")
def test_strangers_do_not_reach_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attack the open port of a real run during the first exchange of its first worker."""
    from dlspark.testing import toys
    from dlspark_elephas.parameter_server import ParameterServer

    addresses: list[SocketEndpoint] = []
    worker_asks, tried = threading.Event(), threading.Event()
    answer = ParameterServer.answer

    def watched(self: Any, *args: Any) -> Any:
        addresses.append(self.address)
        worker_asks.set()
        tried.wait(60)
        return answer(self, *args)

    monkeypatch.setattr(ParameterServer, "answer", watched)
    failures: list[BaseException] = []

    def attack() -> None:
        try:
            assert worker_asks.wait(60)
            assert_strangers_are_refused(addresses[0])
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
    assert is_closed(addresses[0])
