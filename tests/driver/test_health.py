"""What the driver concludes from what it hears: tested on the Watch alone, without processes."""

from __future__ import annotations

import time
from typing import Any

from dlspark.driver.health import Watch
from dlspark.timeouts import Timeouts


def heartbeat(rank: int, moves: int, **fields: Any) -> dict[str, Any]:
    place = {"epoch": 1, "step": 3, "phase": "step", "host": "here", "memory_bytes": 0}
    return {"kind": "heartbeat", "rank": rank, "connection": rank, "moves": moves, **place, **fields}


def test_the_rank_that_holds_up_the_others_is_blamed_though_another_one_was_heard_of_first() -> None:
    watch = Watch(2, Timeouts(step_seconds=60, heartbeat_seconds=100))
    watch.note(heartbeat(0, moves=7))
    between = time.monotonic()
    watch.note(heartbeat(1, moves=7))
    watch.note(heartbeat(0, moves=7, waits=True))
    watch.note(heartbeat(1, moves=7, waits=False))
    assert watch.verdict(between + 59) is None
    failure = watch.verdict(between + 60)
    assert failure is not None
    assert failure.rank == 1
    assert "made no progress for 60 s (timeouts: step_seconds)" in failure.message
