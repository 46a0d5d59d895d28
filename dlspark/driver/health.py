"""Watch: what the driver knows of every rank, and what it concludes: who is dead, who is stuck, who is slow."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from dlspark.errors import WorkerError
from dlspark.timeouts import Timeouts
from dlspark.wire import HEARTBEAT_SECONDS, Report

# A rank is called slow when its own work takes this many times that of the others, over at least these seconds and steps.
SLOW_RATIO = 3.0
SLOW_SECONDS = 5.0
SLOW_STEPS = 5


@dataclass
class Failure:
    """Why a run failed: the first thing that went wrong, as far as one can know.

    Attributes:
        rank: None when no rank could be named.
        host: where it ran.
        message: what happened, where in the training.
        remote_traceback: the worker's traceback, or where the ranks stood.
        complete: False while more may become known, such as why a process ended.
        retryable: trying again may help.
        epoch: from 0; None before the first.
        step: steps of it that had ended.
    """

    rank: int | None
    host: str | None
    message: str
    remote_traceback: str = ""
    complete: bool = True
    retryable: bool = True
    epoch: int | None = None
    step: int | None = None

    def add(self, other: Failure) -> None:
        """Take over what ``other`` knows of the same death."""
        if not self.complete and other.rank == self.rank and other.complete:
            self.message, self.complete = other.message, True

    def as_error(self, backend: str) -> WorkerError:
        """The error that the caller of ``fit`` gets."""
        return WorkerError(
            f"Training on backend {backend!r} failed: {self.message}",
            rank=self.rank,
            host=self.host,
            remote_traceback=self.remote_traceback,
            epoch=self.epoch,
            step=self.step,
            retryable=self.retryable,
        )


@dataclass
class _Rank:
    """One worker as it was last heard of. Times are those of ``time.monotonic``, on the driver."""

    connection: int
    heard_at: float
    moved_at: float
    host: str | None = None
    pid: int | None = None
    moves: int = 0
    stepped: bool = False
    left: bool = False
    left_at: float = 0.0
    lost: bool = False
    position: dict[str, Any] = field(default_factory=dict)
    memory_bytes: int = 0
    own_seconds: float = 0.0
    steps: int = 0

    def where(self) -> str:
        """Its place in the training, in words."""
        if "epoch" not in self.position:
            return "before the first step"
        return f"epoch {self.position['epoch'] + 1}, after step {self.position['step']}"


class Watch:
    """Takes in reports and judges by them and by the clock. Not thread-safe: the monitor calls it under its lock.

    Args:
        num_workers: how many ranks there are.
        timeouts: how long each phase may take.
    """

    def __init__(self, num_workers: int, timeouts: Timeouts) -> None:
        self._num_workers = num_workers
        self._timeouts = timeouts
        self._ranks: dict[int, _Rank] = {}
        self._launched_at = time.monotonic()
        self._launched = False
        self._first_at: float | None = None  # when the first rank of this launch connected
        self._back: set[int] = set()  # ranks that have worked in an earlier launch
        self._warned: set[int] = set()

    def launching(self) -> None:
        """The engine launches all workers, perhaps anew: nobody is expected to be connected."""
        self._launched_at, self._launched, self._first_at = time.monotonic(), True, None
        self._back |= set(self._ranks)
        self._ranks = {number: rank for number, rank in self._ranks.items() if not rank.left}

    def returned(self) -> None:
        """The engine has returned."""
        self._launched = False

    def forgive(self, seconds: float) -> None:
        """Do not hold it against the workers that the driver has not looked for so long."""
        self._launched_at += seconds
        self._first_at = None if self._first_at is None else self._first_at + seconds
        for rank in self._ranks.values():
            rank.heard_at += seconds
            rank.moved_at += seconds
            rank.left_at += seconds

    def note(self, report: Report) -> Failure | None:
        """Take in a report; the failure that it tells of, if it does."""
        number, kind, now = report["rank"], report["kind"], time.monotonic()
        rank = self._ranks.get(number)
        if kind == "guard" or report.get("connection", -1) < 0:
            return None  # not of a worker: of a guard, or of the driver itself
        if kind == "ended":
            return self._death(number, rank, report)
        if rank is None or report["connection"] > rank.connection:
            rank = self._ranks[number] = _Rank(report["connection"], now, now)
            self._first_at = self._first_at or now
        elif report["connection"] < rank.connection:
            return None  # of a connection that this rank has replaced
        rank.heard_at = now
        rank.host, rank.pid = report.get("host", rank.host), report.get("pid", rank.pid)
        if kind == "heartbeat":
            self._note_heartbeat(rank, report, now)
        elif kind in ("step", "epoch"):
            rank.moved_at, rank.stepped = now, True
            rank.position.update({name: report[name] for name in ("epoch", "step") if name in report})
        elif kind in ("left", "interrupted"):
            rank.left, rank.left_at = True, now
        elif kind == "failed":
            rank.left = True
            return _told(report)
        elif kind == "lost" and not rank.left:
            rank.lost = True
            return self._death(number, rank, report)
        return None

    def _note_heartbeat(self, rank: _Rank, report: Report, now: float) -> None:
        if report["moves"] != rank.moves:
            rank.moves, rank.moved_at = report["moves"], now
            rank.stepped = rank.stepped or bool(report.get("step"))
        rank.position = {name: report[name] for name in ("epoch", "step", "phase", "stack", "waits") if name in report}
        rank.memory_bytes = report["memory_bytes"]
        rank.own_seconds, rank.steps = report.get("own_seconds", 0.0), report.get("steps", 0)

    def _death(self, number: int, rank: _Rank | None, report: Report) -> Failure | None:
        """What is known of a process that has ended without a word, by the end of its connection or by its guard."""
        if rank is not None and rank.left and report["kind"] == "ended":
            return None
        where = rank.where() if rank else "before it connected"
        message = f"rank {number} on {rank.host if rank else 'an unknown host'}, {where}: its process"
        message += f" (pid {report.get('pid') or (rank.pid if rank else None)}) ended without a word"
        if report["kind"] == "lost":
            message += "; it was killed, or crashed in native code"
        elif report["out_of_memory"]:
            message = f"out of memory: {message}, as the kernel killed a process for memory there"
            message += f". It held {rank.memory_bytes / (1 << 30):.1f} GiB" if rank and rank.memory_bytes else ""
        else:
            message += ": killed by a signal (not by the kernel for memory), or crashed in native code"
        return Failure(number, rank.host if rank else None, message, complete=report["kind"] == "ended", **_place(rank))

    def verdict(self, now: float) -> Failure | None:
        """The failure that the clock shows, if it shows one."""
        limits = self._timeouts
        missing = [number for number in range(self._num_workers) if number not in self._ranks]
        if missing and now - self._launched_at > limits.launch_seconds:
            ranks = ", ".join(map(str, missing))
            return Failure(
                missing[0],
                None,
                f"rank {ranks} did not start within {limits.launch_seconds:g} s (timeouts: launch_seconds). Executors may "
                "be lost or busy with other jobs, or may not reach the driver; their logs say more.",
            )
        silent = [number for number in missing if number in self._back]
        if silent and self._first_at and now - self._first_at > limits.heartbeat_seconds:
            return Failure(
                silent[0],
                None,
                f"rank {', '.join(map(str, silent))} worked before, and did not come back within "
                f"{limits.heartbeat_seconds:g} s of the others (timeouts: heartbeat_seconds): its process is stopped, "
                "or its host is gone",
            )
        present = {number: rank for number, rank in self._ranks.items() if not rank.left and not rank.lost}
        if self._launched and not missing and not present:
            idle = now - max(rank.left_at for rank in self._ranks.values())
            if idle > limits.end_seconds:
                return Failure(
                    None,
                    None,
                    f"all ranks have ended their work, and the engine has not returned for {limits.end_seconds:g} s "
                    "(timeouts: end_seconds): a worker's process is stopped, or hangs at its end",
                )
        for number, rank in present.items():
            if now - rank.heard_at > limits.heartbeat_seconds:
                return self._stuck(
                    number,
                    f"gave no sign of life for {limits.heartbeat_seconds:g} s (timeouts: heartbeat_seconds): its process is "
                    "stopped, or its host is gone or overloaded",
                )
        late = self._late(present, now)
        if not late:
            return None
        # Heartbeats tell of moves, so ranks that stopped together are late one after the other, whoever holds them up.
        number = _culprit(self._late(present, now + 2 * HEARTBEAT_SECONDS))
        name = "step_seconds" if present[number].stepped else "first_step_seconds"
        return self._stuck(number, f"made no progress for {getattr(limits, name):g} s (timeouts: {name})")

    def _late(self, present: dict[int, _Rank], now: float) -> dict[int, _Rank]:
        limits = self._timeouts
        return {
            number: rank
            for number, rank in present.items()
            if now - rank.moved_at > (limits.step_seconds if rank.stepped else limits.first_step_seconds)
        }

    def _stuck(self, number: int, what: str) -> Failure:
        rank = self._ranks[number]
        stands = [
            f"Rank {other}: {each.where()}, {each.position.get('phase', 'loading')}\n{each.position.get('stack', '')}"
            for other, each in sorted(self._ranks.items(), key=lambda item: item[0] != number)
        ]
        message = f"rank {number} on {rank.host}, {rank.where()}, {what}. Where the ranks stood when last heard:"
        return Failure(number, rank.host, message, "\n".join(stands), **_place(rank))

    def warnings(self) -> list[str]:
        """What is new and worth a warning: ranks for which the others wait."""
        ranks = {n: r for n, r in self._ranks.items() if not r.left and not r.lost and r.steps >= SLOW_STEPS}
        if len(ranks) < max(2, self._num_workers):
            return []
        pace = {number: rank.own_seconds / rank.steps for number, rank in ranks.items()}
        slowest = max(pace, key=lambda number: pace[number])
        others = sorted(value for number, value in pace.items() if number != slowest)
        usual = others[len(others) // 2]
        rank = ranks[slowest]
        if slowest in self._warned or rank.own_seconds < SLOW_SECONDS or pace[slowest] < SLOW_RATIO * usual:
            return []
        self._warned.add(slowest)
        return [
            f"rank {slowest} on {rank.host} takes {pace[slowest]:.2g} s of its own for a step, the others {usual:.2g} s: "
            "all wait for it. Its host may be busy or slower."
        ]


def _culprit(late: dict[int, _Rank]) -> int:
    """The rank for which the others wait: the one furthest behind; of several, one that does not itself wait in a sum."""

    def order(item: tuple[int, _Rank]) -> tuple[int, int, bool, bool]:
        position = item[1].position
        waits = position.get("waits", False)
        return position.get("epoch", -1), position.get("step", -1), waits, position.get("phase") == "step"

    return min(late.items(), key=order)[0]


def _place(rank: _Rank | None) -> dict[str, Any]:
    position: dict[str, Any] = rank.position if rank else {}
    return {"epoch": position.get("epoch"), "step": position.get("step")}


def _told(report: Report) -> Failure:
    """The failure that a worker has reported itself."""
    where = f"rank {report['rank']} on {report['host']}"
    if "epoch" in report:
        where += f", epoch {report['epoch'] + 1}, after step {report['step']}"
    memory = "out of memory: " if _is_about_memory(report["error"], (report["message"],)) else ""
    return Failure(
        report["rank"],
        report["host"],
        f"{memory}{report['error']} on {where}: {report['message']}",
        report["traceback"],
        retryable=report["retryable"],
        epoch=report.get("epoch"),
        step=report.get("step"),
    )


def _is_about_memory(error: str, messages: Iterable[str]) -> bool:
    """Whether an exception says that memory ran out; each framework has a way of its own."""
    if error in ("MemoryError", "ResourceExhaustedError", "OutOfMemoryError"):
        return True
    return any("RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower() for text in messages)
