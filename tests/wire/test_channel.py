"""The report channel delivers messages and rejects strangers, replays and oversized frames."""

from __future__ import annotations

import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator

import pytest

from dlspark.errors import WorkerError
from dlspark.wire.client import STOPPED_EXIT_CODE, Interruption, SocketEndpoint, failed
from dlspark.wire.framing import MAX_FRAME_BYTES
from dlspark.wire.messages import FromWorker, Held, Left, Lost, Started
from dlspark.wire.server import ReportServer

pytestmark = pytest.mark.timeout(60)


class Inbox:
    """Messages in the order of their arrival, with a way to wait for them."""

    def __init__(self) -> None:
        self.messages: list[FromWorker] = []
        self._arrived = threading.Condition()

    def __call__(self, message: FromWorker) -> None:
        with self._arrived:
            self.messages.append(message)
            self._arrived.notify_all()

    def wait_for(self, count: int) -> list[FromWorker]:
        with self._arrived:
            assert self._arrived.wait_for(lambda: len(self.messages) >= count, timeout=20)
            return list(self.messages)


@pytest.fixture
def inbox() -> Inbox:
    return Inbox()


@pytest.fixture
def server(inbox: Inbox) -> Iterator[ReportServer]:
    server = ReportServer("127.0.0.1", inbox)
    yield server
    server.close()


def dropped(sock: socket.socket) -> bool:
    """Whether the other side closes this connection within a few seconds."""
    sock.settimeout(10)
    try:
        while sock.recv(1 << 16):
            pass
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False
    return True


def test_reports_arrive_in_order_from_several_ranks(server: ReportServer, inbox: Inbox) -> None:
    reporters = [server.endpoint.connect(rank) for rank in range(3)]
    for calls in range(5):
        for rank, reporter in enumerate(reporters):
            reporter.send(Held(rank=rank, calls=calls))
    messages = inbox.wait_for(15)
    for rank in range(3):
        assert [m.calls for m in messages if isinstance(m, Held) and m.rank == rank] == list(range(5))
    for reporter in reporters:
        reporter.close()


def test_it_listens_on_the_chosen_address_only(server: ReportServer) -> None:
    assert server.endpoint.host == "127.0.0.1"
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.2", server.endpoint.port), timeout=5)


@pytest.mark.parametrize(
    "noise",
    [b"GET / HTTP/1.1\r\n\r\n" + b"x" * 64, b"\x80\x04\x95" + b"\0" * 64, struct.pack(">Q", 2**31) + b"\0" * 64],
    ids=["http", "pickle", "2 GiB header"],
)
def test_strangers_are_dropped_and_training_goes_on(server: ReportServer, inbox: Inbox, noise: bytes) -> None:
    reporter = server.endpoint.connect(0)
    with socket.create_connection((server.endpoint.host, server.endpoint.port), timeout=5) as stranger:
        stranger.sendall(noise)
        assert dropped(stranger)
    reporter.send(Held(rank=0, calls=1))
    messages = inbox.wait_for(1)
    reporter.close()
    assert messages == [Held(rank=0, calls=1, connection=0)]


def test_a_wrong_secret_is_dropped(server: ReportServer, inbox: Inbox) -> None:
    imposter = SocketEndpoint(server.endpoint.host, server.endpoint.port, b"x" * 32)
    script = textwrap.dedent(f"""
        import time
        from dlspark.wire.client import SocketEndpoint
        from dlspark.wire.messages import Left
        reporter = SocketEndpoint({imposter.host!r}, {imposter.port}, b"x" * 32).connect(0)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            reporter.send(Left(rank=0))
    """)
    # A dropped worker ends its process, so this one needs its own.
    run = subprocess.run([sys.executable, "-c", script], timeout=40, check=False)
    assert run.returncode == STOPPED_EXIT_CODE
    assert inbox.messages == []


def test_what_was_recorded_cannot_be_replayed(server: ReportServer, inbox: Inbox) -> None:
    """A proxy records a worker's bytes and sends them on a new connection, which is dropped."""
    recorded = bytearray()
    proxy = socket.create_server(("127.0.0.1", 0))

    def forward() -> None:
        client, _ = proxy.accept()
        with client, socket.create_connection((server.endpoint.host, server.endpoint.port)) as upstream:
            client.sendall(upstream.recv(32))
            while data := client.recv(1 << 16):
                recorded.extend(data)
                upstream.sendall(data)

    thread = threading.Thread(target=forward)
    thread.start()
    reporter = SocketEndpoint("127.0.0.1", proxy.getsockname()[1], server.endpoint.secret).connect(0)
    reporter.send(Held(rank=0, calls=1))
    inbox.wait_for(1)
    reporter.close()
    thread.join(10)
    proxy.close()
    with socket.create_connection((server.endpoint.host, server.endpoint.port), timeout=5) as thief:
        thief.sendall(recorded)
        assert dropped(thief)
    assert [type(message) for message in inbox.messages if not isinstance(message, Left)] == [Held]


def test_an_endless_frame_is_dropped_after_the_handshake(server: ReportServer, inbox: Inbox) -> None:
    import hmac

    with socket.create_connection((server.endpoint.host, server.endpoint.port), timeout=5) as sock:
        nonce = sock.recv(32)
        sock.sendall(hmac.digest(server.endpoint.secret, nonce, "sha256"))
        sock.sendall(struct.pack(">Q", MAX_FRAME_BYTES + 1))
        assert dropped(sock)


def test_a_silent_stranger_holds_nothing_up(server: ReportServer, inbox: Inbox) -> None:
    silent = socket.create_connection((server.endpoint.host, server.endpoint.port), timeout=5)
    reporter = server.endpoint.connect(0)
    reporter.send(Held(rank=0, calls=1))
    inbox.wait_for(1)
    reporter.close()
    started = time.monotonic()
    server.close()
    assert time.monotonic() - started < 20
    silent.close()


@pytest.mark.parametrize("how", ["stop", "close"])
def test_a_worker_ends_when_told_or_when_the_driver_is_gone(inbox: Inbox, how: str) -> None:
    server = ReportServer("127.0.0.1", inbox)
    endpoint = server.endpoint
    script = textwrap.dedent(f"""
        import threading
        from dlspark.wire.client import SocketEndpoint
        from dlspark.wire.messages import Started
        reporter = SocketEndpoint({endpoint.host!r}, {endpoint.port}, {endpoint.secret!r}).connect(3)
        reporter.send(Started(rank=3, pid=1, host="here", device="cpu"))
        threading.Event().wait(60)
    """)
    with subprocess.Popen([sys.executable, "-c", script]) as worker:
        inbox.wait_for(1)
        if how == "stop":
            server.stop_workers("a test")
        else:
            server.close()
        assert worker.wait(20) == STOPPED_EXIT_CODE
    server.close()


@pytest.mark.parametrize("close", [True, False], ids=["left", "lost"])
def test_the_driver_tells_an_end_from_a_death(server: ReportServer, inbox: Inbox, close: bool) -> None:
    script = textwrap.dedent(f"""
        import os
        from dlspark.wire.client import SocketEndpoint
        from dlspark.wire.messages import Started
        reporter = SocketEndpoint("127.0.0.1", {server.endpoint.port}, {server.endpoint.secret!r}).connect(1)
        reporter.send(Started(rank=1, pid=1, host="here", device="cpu"))
        if {close}:
            reporter.close()
        os._exit(0)
    """)
    subprocess.run([sys.executable, "-c", script], check=True, timeout=40)
    assert [type(message) for message in inbox.wait_for(2)] == [Started, Left if close else Lost]
    assert {(message.rank, message.connection) for message in inbox.messages} == {(1, 0)}


def test_ranks_agree_on_a_step_to_stop_after() -> None:
    """Rank 0 has finished one call more than rank 1 when both are asked; both stop after the same call."""
    ahead, behind = Interruption(), Interruption()
    assert not ahead.reached()
    held = [ahead.hold(), behind.hold()]
    assert held == [1, 0]
    stopped: list[bool] = []
    waiting = threading.Thread(target=lambda: stopped.append(behind.reached()))
    waiting.start()  # it waits for the answer and starts no call that the other rank would not join
    for interruption in (ahead, behind):
        interruption.stop_after(max(held) + 1)
    waiting.join(10)
    assert stopped == [False]
    assert [ahead.reached(), behind.reached()] == [True, True]


def test_an_unreachable_driver_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(WorkerError, match=rf"Rank 2 .* cannot reach the driver at 127.0.0.1:{port}") as caught:
        SocketEndpoint("127.0.0.1", port, b"s" * 32).connect(2)
    assert caught.value.rank == 2


def test_the_secret_is_in_no_text(server: ReportServer) -> None:
    assert str(server.endpoint.secret) not in repr(server.endpoint)


def test_close_twice_and_the_port_is_free(inbox: Inbox) -> None:
    server = ReportServer("127.0.0.1", inbox)
    port = server.endpoint.port
    server.close()
    server.close()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port), timeout=5)


def test_a_long_traceback_fits_into_a_frame() -> None:
    message = failed(0, ValueError("x" * 5_000_000))
    assert len(message.traceback) < MAX_FRAME_BYTES // 4
    assert "characters left out" in message.traceback
