"""Failure: why a run failed, for the error of ``fit``."""

from __future__ import annotations

from dataclasses import dataclass

from dlspark.errors import WorkerError
from dlspark.wire import messages


@dataclass
class Failure:
    """Why a run failed: the first failure, which causes the others.

    Attributes:
        rank: the rank that failed; None if unknown.
        host: where it ran.
        message: what happened, and at which step.
        remote_traceback: the worker's traceback, or the stacks of all ranks.
        complete: False if another report may still name the cause.
        retryable: a restart may succeed.
        epoch: from 0; None before the first.
        step: complete steps of that epoch.
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
        """Merge details from another report of this failure."""
        if not self.complete and other.rank == self.rank and other.complete:
            self.message, self.complete = other.message, True

    def as_error(self, backend: str) -> WorkerError:
        """The error for the caller of ``fit``."""
        return WorkerError(
            f"Training on backend {backend!r} failed: {self.message}",
            rank=self.rank,
            host=self.host,
            remote_traceback=self.remote_traceback,
            epoch=self.epoch,
            step=self.step,
            retryable=self.retryable,
        )


def reported(message: messages.Failed) -> Failure:
    """The failure that a worker has reported itself."""
    where = f"rank {message.rank} on {message.host}"
    if message.epoch is not None:
        where += f", epoch {message.epoch + 1}, after step {message.step}"
    memory = "out of memory: " if _is_about_memory(message) else ""
    return Failure(
        message.rank,
        message.host,
        f"{memory}{message.error} on {where}: {message.message}",
        message.traceback,
        retryable=message.retryable,
        epoch=message.epoch,
        step=message.step,
    )


def _is_about_memory(failed: messages.Failed) -> bool:
    """Whether an exception means that memory ran out. Each framework words it differently."""
    if failed.error in ("MemoryError", "ResourceExhaustedError", "OutOfMemoryError"):
        return True
    return "RESOURCE_EXHAUSTED" in failed.message or "out of memory" in failed.message.lower()
