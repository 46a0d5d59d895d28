"""Turns: all subjects are alive at once, and one trains at a time.

Launching and tracing happen once, and the turns interleave, so a slow minute of the machine affects all subjects. A turn is
a file that holds its start time. Frequent polling would take time from the subject that trains, and rare polling would
start a subject's workers at different times. So workers poll rarely, and a turn starts once all of them have seen its file.
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
"""Timeout for a turn, which may follow the turns of all other subjects."""

_BEGIN_SECONDS = 3 * LOOK_SECONDS


class Clock:
    """Wait for a worker's turns and report their durations. Turn 0 is the first epoch only.

    Args:
        folder: folder of the turns' files.
        epochs: epochs per later turn.
        delay_seconds: sleep in every step, to test the harness with a known delay.
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
        """Call this after each step."""
        if self._first_step is None:
            self._first_step = time.time()
        if self._delay_seconds:
            time.sleep(self._delay_seconds)
        self._last_step = time.perf_counter()

    def epoch_ended(self, epoch: int, logs: Mapping[str, Any]) -> None:
        """Write the report if this was the last epoch of a turn."""
        turn, place = self._turn(epoch)
        now = time.perf_counter()
        # Without reported steps (Elephas' driver reports rounds), the whole epoch counts as steps.
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
        """Wait for the end of all turns, so that ending does not disturb other subjects."""
        wait(Path(self._folder, "end"))

    def _turn(self, epoch: int) -> tuple[int, int]:
        """Return the turn of an epoch, and the epoch's index in it."""
        return (0, 0) if epoch == 0 else (1 + (epoch - 1) // self._epochs, (epoch - 1) % self._epochs)


def give(path: Path) -> None:
    """Start a turn after `_BEGIN_SECONDS`."""
    put(path, repr(time.time() + _BEGIN_SECONDS))


def wait(path: Path) -> None:
    """Wait until the file exists and the time in it has passed.

    Raises:
        TimeoutError: the file did not appear within `WAIT_SECONDS`.
    """
    deadline = time.monotonic() + WAIT_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"Expected the turn {path.name!r} within {WAIT_SECONDS:.0f} s; got none. Use fewer subjects or epochs."
            )
        time.sleep(LOOK_SECONDS)
    time.sleep(max(0.0, float(path.read_text()) - time.time()))


def put(path: Path, text: str) -> None:
    """Write a file atomically."""
    temporary = path.with_name(f".{uuid.uuid4().hex}")
    temporary.write_text(text)
    os.replace(temporary, path)
