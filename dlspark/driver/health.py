"""Watch: detects dead, stuck and slow workers from their messages and the clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dlspark.driver.failure import Failure, reported
from dlspark.driver.stops import Place, lone_stop
from dlspark.timeouts import Timeouts
from dlspark.wire import HEARTBEAT_SECONDS, messages

# A rank is slow if its own work takes this many times that of the others, over at least these seconds and steps.
SLOW_RATIO = 3.0
SLOW_SECONDS = 5.0
SLOW_STEPS = 5
# A sum that breaks is noticed by the ranks that wait in it, perhaps before the driver hears of the rank that broke it.
CAUSE_SECONDS = 1.0


@dataclass
class _Rank:
    """The last known state of one worker. Times are those of the driver's clock."""

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
    epoch: int | None = None
    step: int = 0
    phase: str = "loading"
    waits: bool = False
    stack: str = ""
    memory_bytes: int = 0
    own_seconds: float = 0.0
    steps: int = 0
    stops: dict[Place, str] = field(default_factory=dict)  # where a callback stopped it, and how

    def begun(self) -> Place:
        """The last step that it has begun."""
        return -1 if self.epoch is None else self.epoch, self.step if self.phase == "step" else self.step - 1

    def where(self) -> str:
        """Its epoch and step, in words."""
        return "before the first step" if self.epoch is None else f"epoch {self.epoch + 1}, after step {self.step}"


class Watch:
    """Detects failures from messages and the clock. Not thread-safe: the monitor calls it under its lock.

    Args:
        num_workers: the world size.
        timeouts: the limit of each phase.
        clock: returns the time in seconds.
    """

    def __init__(self, num_workers: int, timeouts: Timeouts, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._num_workers = num_workers
        self._timeouts = timeouts
        self._clock = clock
        self._ranks: dict[int, _Rank] = {}
        self._launched_at = clock()
        self._launched = False
        self._first_at: float | None = None  # when the first rank of this launch connected
        self._back: set[int] = set()  # ranks that worked in an earlier launch
        self._warned: set[int] = set()
        self._broken: tuple[float, Failure] | None = None  # a sum that broke: when, and as whom it was reported

    def launching(self) -> None:
        """The engine launches all workers, perhaps again: none is expected to be connected yet."""
        self._launched_at, self._launched, self._first_at = self._clock(), True, None
        self._back |= set(self._ranks)
        self._ranks = {number: rank for number, rank in self._ranks.items() if not rank.left}

    def returned(self) -> None:
        """The engine has returned."""
        self._launched = False

    def forgive(self, seconds: float) -> None:
        """Extend all time limits by ``seconds``, in which the driver did not read messages."""
        self._launched_at += seconds
        self._first_at = None if self._first_at is None else self._first_at + seconds
        self._broken = self._broken and (self._broken[0] + seconds, self._broken[1])
        for rank in self._ranks.values():
            rank.heard_at += seconds
            rank.moved_at += seconds
            rank.left_at += seconds

    def note(self, message: messages.FromWorker) -> Failure | None:
        """Process a message; returns the failure that it reports, if any."""
        rank, now = self._ranks.get(message.rank), self._clock()
        if message.connection is None or isinstance(message, messages.GuardConnected):
            return None  # not from a worker
        if isinstance(message, messages.ProcessEnded):
            return self._death(rank, message)
        if rank is None or message.connection > rank.connection:
            rank = self._ranks[message.rank] = _Rank(message.connection, now, now)
            self._first_at = self._first_at or now
        elif message.connection < rank.connection:
            return None  # this rank has replaced the connection
        rank.heard_at = now
        match message:
            case messages.Connected() | messages.Started():
                rank.host, rank.pid = message.host, message.pid
            case messages.Heartbeat():
                _note_heartbeat(rank, message, now)
            case messages.StepEnded():
                rank.moved_at, rank.stepped = now, True
                rank.epoch, rank.step = message.epoch, message.step
            case messages.EpochEnded():
                rank.moved_at, rank.stepped, rank.epoch = now, True, message.epoch
            case messages.Stopped():
                rank.stops[message.epoch, message.step] = message.cause
            case messages.Left() | messages.Interrupted():
                rank.left, rank.left_at = True, now
            case messages.Failed():
                rank.left, rank.left_at, rank.host = True, now, message.host
                if not message.waits:
                    return reported(message)
                if (alone := self._alone()) is not None:
                    return alone  # whose sum broke as the other rank ended
                self._broken = self._broken or (now, reported(message))
            case messages.Lost() if not rank.left:
                rank.lost = True
                return self._death(rank, message)
        return None

    def _death(self, rank: _Rank | None, message: messages.Lost | messages.ProcessEnded) -> Failure | None:
        """The failure of a process that has ended without a report: its connection has ended, or its guard says so."""
        ended = message if isinstance(message, messages.ProcessEnded) else None
        if rank is not None and rank.left and ended:
            return None
        host = rank.host if rank else None
        pid = ended.pid if ended else rank and rank.pid
        where = rank.where() if rank else "before it connected"
        text = f"rank {message.rank} on {host if rank else 'an unknown host'}, {where}: its process (pid {pid}) ended "
        text += "without a word"
        if ended is None:
            text += "; it was killed, or crashed in native code"
        elif ended.out_of_memory:
            text = f"out of memory: {text}, as the kernel killed a process for memory there"
            text += f". It held {rank.memory_bytes / (1 << 30):.1f} GiB" if rank and rank.memory_bytes else ""
        else:
            text += ": killed by a signal (not by the kernel for memory), or crashed in native code"
        return Failure(message.rank, host, text, complete=ended is not None, **_place(rank))

    def _alone(self) -> Failure | None:
        """The failure of ranks that have stopped training while others continue."""
        found = lone_stop(
            {number: rank.stops for number, rank in self._ranks.items()},
            {number: rank.begun() for number, rank in self._ranks.items()},
        )
        if found is None:
            return None
        number, (epoch, step) = min(found.stopped), found.place
        host = self._ranks[number].host
        # A restart would stop at the same place.
        return Failure(number, host, str(found), retryable=False, epoch=epoch, step=step)

    def verdict(self) -> Failure | None:
        """The failure of a rank that stopped alone, of a time limit, or of a sum that no other rank explains."""
        limits, now = self._timeouts, self._clock()
        if (alone := self._alone()) is not None:
            return alone
        if self._broken and now - self._broken[0] > CAUSE_SECONDS:
            return self._broken[1]
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
        # Ranks that stopped together pass the limit within two heartbeats of each other, in any order.
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
            f"Rank {other}: {each.where()}, {each.phase}\n{each.stack}"
            for other, each in sorted(self._ranks.items(), key=lambda item: item[0] != number)
        ]
        message = f"rank {number} on {rank.host}, {rank.where()}, {what}. Where the ranks stood when last heard:"
        return Failure(number, rank.host, message, "\n".join(stands), **_place(rank))

    def warnings(self) -> list[str]:
        """New warnings about ranks for which the others wait."""
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
            f"rank {slowest} on {rank.host} needs {pace[slowest]:.2g} s for its part of a step, the others {usual:.2g} s: "
            "all wait for it. Its host may be busy or slower."
        ]


def _culprit(late: dict[int, _Rank]) -> int:
    """The rank for which the others wait: the one furthest behind, and among equals one that does not wait in a sum."""

    def order(number: int) -> tuple[int, int, bool, bool]:
        rank = late[number]
        return -1 if rank.epoch is None else rank.epoch, rank.step, rank.waits, rank.phase == "step"

    return min(late, key=order)


def _note_heartbeat(rank: _Rank, message: messages.Heartbeat, now: float) -> None:
    if message.moves != rank.moves:
        rank.moves, rank.moved_at = message.moves, now
        rank.stepped = rank.stepped or message.step > 0
    rank.epoch, rank.step, rank.phase = message.epoch, message.step, message.phase
    rank.waits, rank.stack, rank.memory_bytes = message.waits, message.stack, message.memory_bytes
    rank.own_seconds, rank.steps = message.own_seconds, message.steps


def _place(rank: _Rank | None) -> dict[str, Any]:
    return {} if rank is None or rank.epoch is None else {"epoch": rank.epoch, "step": rank.step}
