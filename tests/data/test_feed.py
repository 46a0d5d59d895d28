"""The feed over real shards: every row exactly once, for any number of workers."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlspark.data.feed import Feed
from dlspark.data.shard_writer import write_rows
from dlspark.data.sharding import fewest_rows
from dlspark.data.shards import ShardedRows
from dlspark.storage.store import Store

ROWS = 2000


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> dict[int, ShardedRows]:
    """A dataset for each row count; the id of a row identifies it."""
    found: dict[int, ShardedRows] = {}
    folder = tmp_path_factory.mktemp("numbered")

    class Made(dict[int, ShardedRows]):
        def __missing__(self, rows: int) -> ShardedRows:
            ids = np.arange(rows, dtype=np.int64) * 3 + 1
            images = (ids[:, None] % 251).astype(np.uint8)
            # The id is fed like any other column, so that the test sees which rows are fed. A shard has about 30 rows.
            x = {"image": images, "id": ids}
            self[rows] = write_rows(Store(folder / str(rows)), "rows", x, ids, shard_bytes=512)
            return self[rows]

    found = Made()
    return found


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, ROWS),
    batch_size=st.integers(1, ROWS + 50),
    epoch=st.integers(0, 3),
    world_size=st.sampled_from([1, 2, 3, 5]),
)
def test_every_row_once_an_epoch(
    numbered: dict[int, ShardedRows], rows: int, batch_size: int, epoch: int, world_size: int
) -> None:
    source = numbered[rows]
    if fewest_rows(rows, batch_size, world_size) < 1:
        return  # refused before launch: see test_bad_input
    seen: Counter[int] = Counter()
    orders = []
    for rank in range(world_size):
        with Feed(source, batch_size=batch_size, rank=rank, world_size=world_size, seed=7) as feed:
            feed.epoch = epoch
            batches = list(feed)
            assert len(batches) == -(-rows // batch_size)
            for x, y in batches:
                assert len(y) >= 1
                assert (x["image"][:, 0] == y % 251).all()
                seen.update(x["id"].tolist())
            orders.append([len(y) for _, y in batches])
    assert seen == Counter({int(i) * 3 + 1: 1 for i in range(rows)})
    steps = np.sum(orders, axis=0)
    assert steps.max() - steps.min() <= 1
    assert steps.max() <= batch_size


def test_no_tuner_is_waited_for_at_the_end_of_an_epoch(numbered: dict[int, ShardedRows]) -> None:
    pytest.importorskip("tensorflow")
    with Feed(numbered[10], batch_size=4) as feed:
        assert feed.dataset().options().autotune.enabled is False


def test_batches_are_those_of_one_worker(numbered: dict[int, ShardedRows]) -> None:
    batches = list(numbered[10].batches(4, seed=7, epoch=1))
    assert [len(y) for _, y in batches] == [3, 3, 4]
    assert sorted(np.concatenate([y for _, y in batches]).tolist()) == [3 * i + 1 for i in range(10)]
    assert any((y != other).any() for (_, y), (_, other) in zip(batches, numbered[10].batches(4, seed=7), strict=True))
