"""The arithmetic of an epoch, for any number of rows and workers and any batch size."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dlspark.data.sharding import cut, epoch_order, fewest_rows, num_steps, step_range

rows_ = st.integers(1, 2000)
batches = st.integers(1, 300)
worlds = st.integers(1, 9)


@given(rows_, batches, worlds)
def test_every_position_once_and_nobody_idle(rows: int, batch_size: int, world_size: int) -> None:
    steps = num_steps(rows, batch_size)
    sizes = []
    seen: list[int] = []
    for step in range(steps):
        parts = [step_range(rows, batch_size, step, rank, world_size) for rank in range(world_size)]
        sizes.append([stop - start for start, stop in parts])
        for start, stop in parts:
            seen += range(start, stop)
    assert seen == list(range(rows))
    totals = [sum(step_sizes) for step_sizes in sizes]
    assert max(totals) <= batch_size
    assert max(totals) - min(totals) <= 1
    assert all(max(step_sizes) - min(step_sizes) <= 1 for step_sizes in sizes)
    assert min(min(step_sizes) for step_sizes in sizes) == fewest_rows(rows, batch_size, world_size)


@given(st.integers(0, 500), st.integers(1, 20))
def test_cut_covers_everything(total: int, parts: int) -> None:
    ranges = [cut(total, parts, index) for index in range(parts)]
    assert ranges[0][0] == 0
    assert ranges[-1][1] == total
    assert all(before[1] == after[0] for before, after in itertools.pairwise(ranges))


def test_the_example_in_the_docs() -> None:
    sizes = [stop - start for start, stop in (step_range(1003, 64, step) for step in range(16))]
    assert set(sizes) == {62, 63}
    assert num_steps(1003, 64) == 16


def test_no_rows_means_no_part() -> None:
    assert fewest_rows(0, 8, 2) == 0


def test_order_is_a_permutation_that_depends_on_seed_and_epoch() -> None:
    order = epoch_order(100, seed=3, epoch=0)
    assert sorted(order) == list(range(100))
    assert (order == epoch_order(100, seed=3, epoch=0)).all()
    assert (order != epoch_order(100, seed=3, epoch=1)).any()
    assert (order != epoch_order(100, seed=4, epoch=0)).any()
    assert order.dtype == np.int64
