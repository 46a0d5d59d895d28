"""WorkerStatus: whether an error may have its cause on another rank."""

from __future__ import annotations

from typing import Any

import pytest

from dlspark.worker.status import WorkerStatus


def test_an_exchange_that_returns_leaves_no_doubt_and_one_that_fails_does() -> None:
    status = WorkerStatus()
    seen = []

    def doubled(values: list[int]) -> list[int]:
        seen.append(status.cause_may_be_elsewhere)
        return [2 * value for value in values]

    def broken(values: Any) -> Any:
        raise ConnectionError

    assert status.noting(doubled)([1, 2]) == [2, 4]
    assert seen == [True]
    assert not status.cause_may_be_elsewhere
    with pytest.raises(ConnectionError):
        status.noting(broken)([1])
    assert status.cause_may_be_elsewhere


@pytest.mark.parametrize(
    ("phase", "waits", "expected"), [("step", True, True), ("step", False, False), ("callbacks", True, False)]
)
def test_a_step_that_waits(phase: str, waits: bool, expected: bool) -> None:
    assert WorkerStatus(phase=phase, waits=lambda: waits).cause_may_be_elsewhere == expected
