"""The guard: a small process beside each worker that ends it when it cannot end itself.

A worker obeys the driver in a thread of its own. One that is stopped (SIGSTOP), or whose C code never lets go of the
interpreter, cannot; its guard can, on any host and under any engine. It is connected to the driver as workers are, and
ends the worker's process when the driver says stop or is gone, after a moment in which the worker may still do so itself.
When the worker has ended, it tells the driver what it saw: whether the kernel was out of memory.

This file runs as a program of its own, ``python -c``, with the standard library only: starting takes 50 ms and 10 MB.
"""

import hashlib
import hmac
import json
import os
import select
import signal
import socket
import struct
import sys
import time

GRACE_SECONDS = 2.0
POLL_SECONDS = 0.5
DYING_SECONDS = 5.0  # a process that the kernel kills may take a while to give all its memory back
TIMEOUT_SECONDS = 30.0


def main() -> None:
    """Read the settings from stdin, which stays open for as long as the worker wants to be guarded."""
    settings = json.loads(sys.stdin.readline())
    worker = settings["pid"]
    secret = bytes.fromhex(settings["secret"])
    sock = socket.create_connection((settings["host"], settings["port"]), timeout=TIMEOUT_SECONDS)
    # As in dlspark.wire.client: a host that is gone sends nothing, not even the end of the stream.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    nonce = read(sock, 32)
    sock.sendall(hmac.digest(secret, nonce, hashlib.sha256))
    send(sock, secret, nonce, 0, {"kind": "guard", "rank": settings["rank"], "pid": worker})
    told, kills = wait(sock, worker)
    if told == "released":
        return
    if told == "stop":
        deadline = time.monotonic() + GRACE_SECONDS
        while os.getppid() == worker and time.monotonic() < deadline:
            time.sleep(0.05)
        if os.getppid() == worker:
            os.kill(worker, signal.SIGKILL)
            return
    # Of a worker that was killed, the driver may have heard already, and say stop: why it died is news all the same.
    report = {"kind": "ended", "rank": settings["rank"], "pid": worker}
    report["out_of_memory"] = kills != out_of_memory_kills()
    try:
        send(sock, secret, nonce, 1, report)
        sock.shutdown(socket.SHUT_WR)
    except OSError:
        return  # the driver is gone


def wait(sock: socket.socket, worker: int) -> tuple[str, list[int]]:
    """(what ended the waiting, `out_of_memory_kills` a moment before).

    What: "ended" (the worker), "stop" (the driver, or its end) or "released" (by the worker).
    """
    seen = [(time.monotonic(), out_of_memory_kills())]
    while True:
        ready, _, _ = select.select([sock, sys.stdin], [], [], POLL_SECONDS)
        now = time.monotonic()
        seen.append((now, out_of_memory_kills()))
        while seen[1][0] < now - DYING_SECONDS:
            del seen[0]
        if sys.stdin in ready:
            # The pipe closes when the worker releases the guard and when it dies. Only the former writes a line first.
            return "released" if sys.stdin.readline() else "ended", seen[0][1]
        if os.getppid() != worker:
            return "ended", seen[0][1]
        if sock in ready:
            return "stop", seen[0][1]  # a frame means nothing else, and neither does the end of the stream


def out_of_memory_kills() -> list[int]:
    """How many processes the kernel has killed for memory, in this container and on this host, as far as it tells."""
    counts = []
    for path in ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control", "/proc/vmstat"):
        try:
            with open(path) as lines:
                counts += [int(line.split()[1]) for line in lines if line.startswith("oom_kill ")]
        except (OSError, ValueError):
            continue
    return counts


def send(sock: socket.socket, secret: bytes, nonce: bytes, number: int, message: dict) -> None:  # type: ignore[type-arg]
    """Send one frame; see dlspark.wire.framing, which this program cannot import."""
    payload = json.dumps(message).encode()
    tag = hmac.digest(secret, nonce + b"worker" + struct.pack(">Q", number) + payload, "sha256")
    sock.sendall(struct.pack(">I", len(payload)) + tag + payload)


def read(sock: socket.socket, size: int) -> bytes:
    """Exactly ``size`` bytes."""
    parts = b""
    while len(parts) < size:
        part = sock.recv(size - len(parts))
        if not part:
            raise ConnectionError("the driver closed the connection")
        parts += part
    return parts


if __name__ == "__main__":
    main()
