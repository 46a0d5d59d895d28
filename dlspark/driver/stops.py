"""Ranks that stop training while others continue, and so leave them waiting for the next sum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Place = tuple[int, int]  # an epoch, and complete steps of it


@dataclass(frozen=True)
class LoneStop:
    """Some ranks, but not all, leave out the step that follows ``place``.

    Attributes:
        place: the epoch of that step, and the complete steps before it.
        stopped: the ranks that leave it out, and what a callback did there, in words.
        continued: ranks that have begun it, or a later one.
    """

    place: Place
    stopped: dict[int, str]
    continued: list[int]

    def __str__(self) -> str:
        epoch, step = self.place
        after, next_ = f"step {step} of epoch {epoch + 1}", f"step {step + 1}"
        if epoch and not step:
            after, next_ = f"epoch {epoch}", f"epoch {epoch + 1}"
        ranks, others = (", ".join(map(str, each)) for each in (self.stopped, self.continued))
        return (
            f"rank {ranks} stopped training after {after}, and rank {others} went on to {next_}: a callback "
            f"{next(iter(self.stopped.values()))} on rank {ranks} only. Expected every rank to stop after the same step. "
            "Decide in on_epoch_end by its logs, which cover the rows of all ranks, and on every rank; the logs of a batch, "
            "clocks and files differ between ranks."
        )


def lone_stop(stops: Mapping[int, Mapping[Place, str]], begun: Mapping[int, Place]) -> LoneStop | None:
    """The first stop that not all ranks share. A rank that may yet stop after the same step gives no verdict.

    Args:
        stops: rank → where it stopped, and what a callback did.
        begun: rank → the last step that it has begun: the epoch, and the complete steps before it.
    """
    for place in sorted({place for places in stops.values() for place in places}):
        stopped = {rank: places[place] for rank, places in sorted(stops.items()) if place in places}
        continued = [rank for rank, last in sorted(begun.items()) if rank not in stopped and last >= place]
        if continued:
            return LoneStop(place, stopped, continued)
    return None
