"""F22: strangers at the driver's port are dropped unheard, cost nothing, and change nothing in the training.

The port is the one of a real run: its workers reach it through a relay of this test, which records what passes.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from dlspark import Trainer
from dlspark.wire import messages
from dlspark.wire.client import SocketEndpoint
from dlspark.wire.server import HANDSHAKE_SECONDS, MAX_STRANGERS, ReportServer

pytestmark = pytest.mark.timeout(120)

DROPPED_WITHIN_SECONDS = 1.0
MOST_GROWTH_BYTES = 50 << 20
SLACK_SECONDS = 2.0  # for a machine that does other things
IDLE = 200
NONCE_BYTES = TAG_BYTES = 32
LENGTH_BYTES = 8


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


class Relay:
    """A TCP relay in front of a server: what workers send and get, connection by connection, is recorded."""

    def __init__(self, host: str, port: int) -> None:
        self.to_driver: list[bytearray] = []
        self.to_worker: list[bytearray] = []
        self._target = (host, port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._threads.append(threading.Thread(target=self._forward, args=(client,), daemon=True))
            self._threads[-1].start()

    def _forward(self, client: socket.socket) -> None:
        sent, got = bytearray(), bytearray()
        with client, contextlib.suppress(OSError), socket.create_connection(self._target) as driver:
            self.to_driver.append(sent)
            self.to_worker.append(got)
            while True:
                for source in select.select([client, driver], [], [])[0]:
                    data = source.recv(1 << 16)
                    if not data:
                        return
                    (sent if source is client else got).extend(data)
                    (driver if source is client else client).sendall(data)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(10)


def dropped_after(sock: socket.socket, *, at_most: float) -> float:
    """Seconds until the other side has closed this connection; sends whatever it sends to nobody."""
    started = time.monotonic()
    sock.settimeout(at_most + SLACK_SECONDS)
    with contextlib.suppress(ConnectionResetError):
        while sock.recv(1 << 16):
            pass
    return time.monotonic() - started


def attack(address: tuple[str, int], data: bytes) -> None:
    """One stranger who sends ``data`` and is dropped."""
    with socket.create_connection(address, timeout=5) as stranger:
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):  # dropped before all of it was sent
            stranger.sendall(data)
        assert dropped_after(stranger, at_most=DROPPED_WITHIN_SECONDS) < DROPPED_WITHIN_SECONDS


def noises(marker: Path) -> dict[str, bytes]:
    return {
        "http": b"POST /parameters HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n",
        "garbage": np.random.default_rng(0).bytes(8 << 20),
        "zeros": bytes(NONCE_BYTES + LENGTH_BYTES + TAG_BYTES),
        "pickle": pickle.dumps(Payload(marker)).ljust(64, b"."),
        "2 GiB header": struct.pack(">Q", (2 << 30) - 1) + bytes(64),
        "2 GiB header after a handshake": bytes(NONCE_BYTES) + struct.pack(">Q", (2 << 30) - 1) + bytes(64),
    }


def attack_in_every_way(address: tuple[str, int], recorded: bytes, marker: Path) -> None:
    """Noise, replays, and connections that do nothing; asserts that all are dropped in time and cost little memory."""
    process = psutil.Process()
    before, peak = process.memory_info().rss, 0
    idle = [socket.create_connection(address, timeout=5) for _ in range(IDLE)]
    opened = time.monotonic()
    try:
        for data in noises(marker).values():
            attack(address, data)
            peak = max(peak, process.memory_info().rss)
        assert len(recorded) > TAG_BYTES + LENGTH_BYTES + TAG_BYTES  # a handshake and a frame at least
        attack(address, recorded)  # all that a worker has said
        attack(address, recorded[:TAG_BYTES])  # its handshake
        attack(address, recorded[TAG_BYTES:])  # its frames, without a handshake
        peak = max(peak, process.memory_info().rss)
        assert len(report_threads()) < MAX_STRANGERS + 10  # workers, and the thread that accepts
        for sock in idle:
            dropped_after(sock, at_most=HANDSHAKE_SECONDS)
        assert time.monotonic() - opened < HANDSHAKE_SECONDS + SLACK_SECONDS
        peak = max(peak, process.memory_info().rss)
    finally:
        for sock in idle:
            sock.close()
    assert peak - before < MOST_GROWTH_BYTES
    assert not marker.exists()


def report_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("dlspark-report")]


# The port of a real run --------------------------------------------------------------------------------------------------


class Watched:
    """The report servers that runs open here, each behind a relay."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.servers: list[tuple[ReportServer, Relay]] = []
        self.address: tuple[str, int] = ("", 0)
        original = ReportServer.__init__

        def init(server: ReportServer, *args: Any, **kwargs: Any) -> None:
            original(server, *args, **kwargs)
            self.address = (server.endpoint.host, server.endpoint.port)
            relay = Relay(*self.address)
            server.endpoint = SocketEndpoint("127.0.0.1", relay.port, server.endpoint.secret)
            self.servers.append((server, relay))

        monkeypatch.setattr(ReportServer, "__init__", init)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    watched = Watched(monkeypatch)
    yield watched
    for _, relay in watched.servers:
        relay.close()


def waiting_callback(folder: Path) -> Any:
    """Waits on every rank after the first epoch, until there is a file; says that it does by another file."""
    import keras

    class Wait(keras.callbacks.Callback):  # type: ignore[misc] # of this function's own, so that it is pickled by value
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            if epoch == 0:
                (folder / f"waiting-{os.environ['DLSPARK_RANK']}").touch()
                deadline = time.monotonic() + 60
                while not (folder / "go-on").exists() and time.monotonic() < deadline:
                    time.sleep(0.02)

    return Wait()


@pytest.mark.spark
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_strangers_change_nothing_in_a_mirrored_run(spark: Any, watched: Watched, tmp_path: Path) -> None:
    pytest.importorskip("dlspark_mirrored")
    from dlspark.testing import toys

    def fit(folder: Path) -> Any:
        trainer = Trainer("mirrored", num_workers=2)
        data = toys.separable(203)
        return trainer.fit(
            toys.dense_classifier(), data, epochs=3, batch_size=32, seed=3, callbacks=[waiting_callback(folder)], verbose=0
        )

    quiet = tmp_path / "quiet"
    quiet.mkdir()
    (quiet / "go-on").touch()
    undisturbed = fit(quiet)

    loud = tmp_path / "loud"
    loud.mkdir()
    wrong: list[BaseException] = []

    def disturb() -> None:
        try:
            deadline = time.monotonic() + 90
            while len(list(loud.glob("waiting-*"))) < 2:
                assert time.monotonic() < deadline, "the workers do not wait"
                time.sleep(0.05)
            _, relay = watched.servers[-1]
            recorded = max(relay.to_driver, key=len)
            assert b'"rank"' in recorded
            attack_in_every_way(watched.address, bytes(recorded), tmp_path / "payload-ran")
        except BaseException as error:
            wrong.append(error)
        finally:
            (loud / "go-on").touch()

    strangers = threading.Thread(target=disturb)
    strangers.start()
    disturbed = fit(loud)
    strangers.join(10)
    if wrong:
        raise wrong[0]
    assert disturbed.history == undisturbed.history
    for old, new in zip(undisturbed.weights, disturbed.weights, strict=True):
        np.testing.assert_array_equal(old, new)
    assert [worker.rows for worker in disturbed.workers] == [worker.rows for worker in undisturbed.workers]
    assert report_threads() == []
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(watched.address, timeout=5)


# A server alone ------------------------------------------------------------------------------------------------------------


class Inbox:
    """Steps in the order of their arrival, with a way to wait for them."""

    def __init__(self) -> None:
        self._steps: list[tuple[int, int]] = []
        self._arrived = threading.Condition()

    def __call__(self, message: messages.FromWorker) -> None:
        with self._arrived:
            if isinstance(message, messages.StepEnded):
                self._steps.append((message.rank, message.step))
            self._arrived.notify_all()

    def steps(self) -> list[tuple[int, int]]:
        with self._arrived:
            return list(self._steps)

    def wait_for_steps(self, count: int) -> list[tuple[int, int]]:
        with self._arrived:
            assert self._arrived.wait_for(lambda: len(self._steps) >= count, timeout=20)
        return self.steps()


def step_of(number: int) -> messages.StepEnded:
    return messages.StepEnded(rank=0, epoch=0, step=number, steps=9, rows=32, loss=None)


@pytest.fixture
def inbox() -> Inbox:
    return Inbox()


@pytest.fixture
def server(inbox: Inbox) -> Iterator[ReportServer]:
    server = ReportServer("127.0.0.1", inbox)
    yield server
    server.close()


@pytest.fixture
def relay(server: ReportServer) -> Iterator[Relay]:
    relay = Relay(server.endpoint.host, server.endpoint.port)
    yield relay
    relay.close()


def test_strangers_change_nothing_at_a_server_alone(
    server: ReportServer, inbox: Inbox, relay: Relay, tmp_path: Path
) -> None:
    address = (server.endpoint.host, server.endpoint.port)
    reporter = SocketEndpoint("127.0.0.1", relay.port, server.endpoint.secret).connect(0)
    reporter.send(step_of(1))
    reporter.send(step_of(2))
    inbox.wait_for_steps(2)
    attack_in_every_way(address, bytes(relay.to_driver[0]), tmp_path / "payload-ran")
    reporter.send(step_of(3))
    assert inbox.wait_for_steps(3) == [(0, 1), (0, 2), (0, 3)]
    reporter.close()


@contextlib.contextmanager
def speaking(server: ReportServer) -> Iterator[tuple[socket.socket, Any]]:
    """A connection that has proved the secret, and a function that makes its frames: what a sniffer sees of a worker."""
    import hmac

    with socket.create_connection((server.endpoint.host, server.endpoint.port), timeout=5) as sock:
        nonce = sock.recv(NONCE_BYTES, socket.MSG_WAITALL)
        sock.sendall(hmac.digest(server.endpoint.secret, nonce, "sha256"))

        def frame(number: int, sender: bytes = b"worker", *, step: int) -> bytes:
            payload = messages.encode(step_of(step))
            tag = hmac.digest(server.endpoint.secret, nonce + sender + struct.pack(">Q", number) + payload, "sha256")
            return struct.pack(">Q", len(payload)) + tag + payload

        yield sock, frame


@pytest.mark.parametrize("strange", ["the same again", "one left out", "the driver's own", "one changed", "of another run"])
def test_a_frame_out_of_place_ends_the_connection_it_came_by(server: ReportServer, inbox: Inbox, strange: str) -> None:
    """Someone in the middle, who can write into a worker's own connection, can cut it and nothing else."""
    other = ReportServer("127.0.0.1", inbox)
    with speaking(server) as (sock, frame), speaking(other) as (_, frame_of_other):
        sock.sendall(frame(0, step=1) + frame(1, step=2))
        assert inbox.wait_for_steps(2) == [(0, 1), (0, 2)]
        bad = {
            "the same again": frame(1, step=2),
            "one left out": frame(3, step=3),
            "the driver's own": frame(0, b"driver", step=3),
            "one changed": frame(2, step=3).replace(b'"step": 3', b'"step": 9'),
            "of another run": frame_of_other(2, step=3),
        }[strange]
        sock.sendall(bad + frame(2, step=4))
        assert dropped_after(sock, at_most=DROPPED_WITHIN_SECONDS) < DROPPED_WITHIN_SECONDS
    assert inbox.steps() == [(0, 1), (0, 2)]
    other.close()


def test_a_driver_of_a_strangers_gets_nothing_that_opens_the_real_one(server: ReportServer, inbox: Inbox) -> None:
    """Whoever stands at an address where workers look for their driver learns an answer to one question of theirs."""
    fake = socket.create_server(("127.0.0.1", 0))
    answers: list[bytes] = []

    def ask() -> None:
        worker, _ = fake.accept()
        with worker:
            worker.sendall(bytes(NONCE_BYTES))
            answers.append(worker.recv(TAG_BYTES, socket.MSG_WAITALL))
            done.wait(10)

    done = threading.Event()
    thread = threading.Thread(target=ask)
    thread.start()
    reporter = SocketEndpoint("127.0.0.1", fake.getsockname()[1], server.endpoint.secret).connect(0)
    reporter.close()
    done.set()
    thread.join(10)
    fake.close()
    attack((server.endpoint.host, server.endpoint.port), answers[0] + bytes(100))
    assert inbox.steps() == []


def test_many_strangers_keep_no_worker_out(server: ReportServer, inbox: Inbox) -> None:
    address = (server.endpoint.host, server.endpoint.port)
    strangers = [socket.create_connection(address, timeout=5) for _ in range(3 * MAX_STRANGERS)]
    reporter = server.endpoint.connect(0)
    reporter.send(step_of(1))
    assert inbox.wait_for_steps(1) == [(0, 1)]
    for sock in strangers[:MAX_STRANGERS]:  # who came first is gone already
        dropped_after(sock, at_most=DROPPED_WITHIN_SECONDS)
    more = [socket.create_connection(address, timeout=5) for _ in range(3 * MAX_STRANGERS)]
    reporter.send(step_of(2))  # and who has proved the secret is no stranger
    assert inbox.wait_for_steps(2) == [(0, 1), (0, 2)]
    reporter.close()
    for sock in strangers + more:
        sock.close()


def test_a_byte_now_and_then_buys_no_time(server: ReportServer) -> None:
    with socket.create_connection((server.endpoint.host, server.endpoint.port), timeout=5) as sock:
        started = time.monotonic()
        assert len(sock.recv(NONCE_BYTES, socket.MSG_WAITALL)) == NONCE_BYTES
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - started < 3 * HANDSHAKE_SECONDS:
                sock.sendall(b"x")
                if select.select([sock], [], [], 0.9)[0] and not sock.recv(1):
                    break
        assert time.monotonic() - started < HANDSHAKE_SECONDS + SLACK_SECONDS
