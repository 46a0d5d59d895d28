"""Taking turns: subjects that are alive at once, and train for a while when it is their turn.

Launching and tracing are paid once, and the turns of all subjects interleave, so that a slow minute of the machine meets
all of them. A turn is a file that says when it begins. Looking for a file often would take time from those whose turn it
is, and looking seldom would start the workers of one subject apart; so they look seldom, and a turn begins a moment after
all of them must have seen it.
"""

from __future__ import annotations

import json
import os
import resource
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LOOK_SECONDS = 0.05
WAIT_SECONDS = 3600.0
"""How long anybody waits for a turn: the turns of all others may come before."""

_BEGIN_SECONDS = 3 * LOOK_SECONDS


class Clock:
    """In every worker: waits for its turns, and reports how long they took. Turn 0 is the first epoch alone.

    Args:
        folder: of the turns.
        epochs: of every later turn.
        delay_seconds: slept in every step; a slow-down of a known size, to test the harness by.
    """

    def __init__(self, folder: str, *, epochs: int = 1, delay_seconds: float = 0.0) -> None:
        self._folder = folder
        self._epochs = epochs
        self._delay_seconds = delay_seconds
        self._epoch_began = self._turn_began = self._last_step = self._steps_seconds = 0.0
        self._first_step: float | None = None

    def epoch_begins(self, epoch: int) -> None:
        """Wait if this is the first epoch of a turn."""
        turn, place = self._turn(epoch)
        if place == 0:
            wait(Path(self._folder, f"go-{turn}"))
            self._turn_began, self._steps_seconds = time.perf_counter(), 0.0
        self._epoch_began = self._last_step = time.perf_counter()

    def step_ended(self) -> None:
        """To be called when the step has been computed."""
        if self._first_step is None:
            self._first_step = time.time()
        if self._delay_seconds:
            time.sleep(self._delay_seconds)
        self._last_step = time.perf_counter()

    def epoch_ended(self, epoch: int, logs: Mapping[str, Any]) -> None:
        """Report, if this was the last epoch of a turn."""
        turn, place = self._turn(epoch)
        now = time.perf_counter()
        # Where nobody sees steps (Elephas' rounds report on the driver) an epoch is all steps.
        self._steps_seconds += (self._last_step if self._last_step > self._epoch_began else now) - self._epoch_began
        epochs = self._epochs if turn else 1
        if place + 1 < epochs:
            return
        report = {
            "seconds": (now - self._turn_began) / epochs,
            "steps_seconds": self._steps_seconds / epochs,
            "first_step_at": self._first_step,
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "logs": {name: float(value) for name, value in logs.items()},
        }
        put(Path(self._folder, f"done-{turn}-{os.getpid()}.json"), json.dumps(report))

    def training_ended(self) -> None:
        """Wait: ending must not disturb those that are still measured."""
        wait(Path(self._folder, "end"))

    def _turn(self, epoch: int) -> tuple[int, int]:
        """Which turn an epoch belongs to, and its place in it."""
        return (0, 0) if epoch == 0 else (1 + (epoch - 1) // self._epochs, (epoch - 1) % self._epochs)


def give(path: Path) -> None:
    """Let a turn begin in a moment."""
    put(path, repr(time.time() + _BEGIN_SECONDS))


def wait(path: Path) -> None:
    """Until the file is there, and the time that it says has come.

    Raises:
        TimeoutError: it was not there within `WAIT_SECONDS`.
    """
    deadline = time.monotonic() + WAIT_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"Expected the turn {path.name!r} within {WAIT_SECONDS:.0f} s: it did not come.")
        time.sleep(LOOK_SECONDS)
    time.sleep(max(0.0, float(path.read_text()) - time.time()))


def put(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all."""
    temporary = path.with_name(f".{uuid.uuid4().hex}")
    temporary.write_text(text)
    os.replace(temporary, path)
