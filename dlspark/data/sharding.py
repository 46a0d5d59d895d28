"""The arithmetic of an epoch: which rows a worker sees in which step.

An epoch of n rows has S = ceil(n / batch_size) steps. Steps differ by at most one row, and so do the workers' parts of a
step: 1,003 rows in batches of 64 make sixteen steps of 62 or 63 rows, where Keras would make fifteen of 64 and one of
43. No row is padded, repeated or dropped, for any number of workers.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def num_steps(rows: int, batch_size: int) -> int:
    """Steps in one epoch, for any number of workers: ceil(rows / batch_size)."""
    return -(-rows // batch_size)


def cut(total: int, parts: int, index: int) -> tuple[int, int]:
    """The half-open range of part ``index`` of ``total`` rows cut into ``parts`` that differ by at most one row."""
    return total * index // parts, total * (index + 1) // parts


def step_range(rows: int, batch_size: int, step: int, rank: int = 0, world_size: int = 1) -> tuple[int, int]:
    """The half-open range of positions in the epoch's order that worker ``rank`` sees in ``step``.

    Over all ranks and steps these ranges cover ``range(rows)`` exactly once, in step order, then rank order.
    """
    first, last = cut(rows, num_steps(rows, batch_size), step)
    start, stop = cut(last - first, world_size, rank)
    return first + start, first + stop


def fewest_rows(rows: int, batch_size: int, world_size: int) -> int:
    """The fewest rows of any worker in any step; 0 if there are too many workers for the batch size."""
    return rows // num_steps(rows, batch_size) // world_size if rows else 0


def epoch_order(rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of an epoch: a permutation of ``range(rows)``, the same on every worker for the same seed and epoch."""
    return np.random.default_rng([seed, epoch]).permutation(rows)
