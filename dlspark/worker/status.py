"""WorkerStatus: how far a worker's training has come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dlspark.wire import messages


@dataclass
class WorkerStatus:
    """How far a worker's training has come. The training thread writes it; the heartbeat's thread reads it.

    Attributes:
        epoch: the current epoch, from 0; None before the first.
        step: complete steps of this epoch, the same for all workers.
        phase: "loading", "step", "callbacks", "validation" or "checkpoint".
        moves: a counter that grows with any progress.
        own_seconds: time that this rank's own part of ``steps`` steps has taken, without the waits for other ranks.
        steps: how many steps ``own_seconds`` covers.
        waits: returns whether this rank has computed its part of the current step and waits for the other ranks.
        exchanging: an exchange with the other ranks has begun, and has not returned.
    """

    epoch: int | None = None
    step: int = 0
    phase: str = "loading"
    moves: int = 0
    own_seconds: float = 0.0
    steps: int = 0
    waits: Callable[[], bool] = lambda: False
    exchanging: bool = False

    def move(self, phase: str) -> None:
        """Record progress: ``phase`` begins."""
        self.phase = phase
        self.moves += 1

    def noting(self, exchange: Callable[..., Any]) -> Callable[..., Any]:
        """``exchange``, with `exchanging` set from its call to its return. An error leaves it set."""

        def noted(values: Any) -> Any:
            self.exchanging = True
            received = exchange(values)
            self.exchanging = False
            return received

        return noted

    @property
    def cause_may_be_elsewhere(self) -> bool:
        """Whether an error now may have its cause on another rank: this one waits for the others."""
        return self.exchanging or (self.phase == "step" and self.waits())

    def heartbeat(self, rank: int, *, memory_bytes: int, stack: str) -> messages.Heartbeat:
        """The heartbeat of this process, with this status.

        The training thread may change the status meanwhile. It sets ``phase`` before ``step``, and ``step`` before
        ``epoch``. They are read here in the reverse order, so that they never name a step that has not begun.
        """
        return messages.Heartbeat(
            rank=rank,
            epoch=self.epoch,
            step=self.step,
            phase=self.phase,
            moves=self.moves,
            own_seconds=self.own_seconds,
            steps=self.steps,
            waits=self.waits(),
            memory_bytes=memory_bytes,
            stack=stack,
        )
