"""How long a worker waits for its batches, with a fast reader and with a slow one."""

from __future__ import annotations

import time
from typing import Any

import pytest

from dlspark import Trainer
from dlspark.data.feed import Feed
from dlspark.testing.toys import dense_classifier, separable

pytestmark = [pytest.mark.slow, pytest.mark.alone]

STEPS, DELAY_SECONDS = 10, 0.1


def test_a_slow_reader_is_told_from_a_fast_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def waited() -> float:
        fit = Trainer("local").fit(dense_classifier(), separable(STEPS * 8), batch_size=8, verbose=0)
        return fit.workers[0].input_seconds

    fast = waited()
    read = Feed.batch

    def slowly(feed: Feed, step: int, order: Any) -> Any:
        time.sleep(DELAY_SECONDS)
        return read(feed, step, order)

    monkeypatch.setattr(Feed, "batch", slowly)
    # The first step traces the model. The reader works ahead meanwhile, so these batches may cost no waiting time.
    assert waited() > fast + (STEPS - 4) * DELAY_SECONDS / 2
