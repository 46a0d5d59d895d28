"""The batches of one worker, as a finite dataset of known cardinality per pass, for every Keras backend."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from dlspark.data.sharding import epoch_order, num_steps, step_range
from dlspark.data.shards import RowReader, ShardedRows

PREFETCH_BATCHES = 2


class Feed:
    """Reads this worker's part of every step from memory-mapped shards.

    A context manager; it keeps the files mapped until it is closed.

    Args:
        rows: the rows to read.
        batch_size: the most rows of a step, *global*.
        rank: this worker.
        world_size: the number of workers that share each step.
        seed: determines the order; None keeps the order of the rows, as validation does.

    Attributes:
        epoch: the epoch that determines the order of the next pass; the training loop sets it before each pass.
        steps: the number of steps in a pass.
        began_at: when the latest pass began to read, by ``time.perf_counter``.
        ready_at: when the batch of each step of that pass was read. The worker waited for a batch that was read after the
            end of the step before it.
    """

    def __init__(
        self, rows: ShardedRows, *, batch_size: int, rank: int = 0, world_size: int = 1, seed: int | None = None
    ) -> None:
        self._reader: RowReader = rows.open()
        self._rows = rows.rows
        self._batch_size = batch_size
        self._rank = rank
        self._world_size = world_size
        self._seed = seed
        self.steps = num_steps(rows.rows, batch_size)
        self.epoch = 0
        self._first_step = 0
        self.began_at = 0.0
        self.ready_at = [0.0] * self.steps

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.close()

    def part_rows(self, step: int) -> int:
        """The number of this worker's rows in ``step``."""
        start, stop = step_range(self._rows, self._batch_size, step, self._rank, self._world_size)
        return stop - start

    def batch(self, step: int, order: np.ndarray[Any, Any] | None) -> tuple[Any, ...]:
        """The rows of one step as ``(x, y)`` or ``(x, y, sample_weight)``; each leaf has shape (rows, …)."""
        if step == self._first_step:
            self.began_at = time.perf_counter()
        start, stop = step_range(self._rows, self._batch_size, step, self._rank, self._world_size)
        found = self._reader.batch(np.arange(start, stop) if order is None else order[start:stop])
        self.ready_at[step] = time.perf_counter()
        return found

    def first_row(self) -> tuple[Any, ...]:
        """The first row of the data as a batch of one, the same on every rank."""
        return self._reader.batch(np.arange(1))

    def order(self) -> np.ndarray[Any, Any] | None:
        """The order of the rows in ``self.epoch``; None keeps their own order."""
        return None if self._seed is None else epoch_order(self._rows, self._seed, self.epoch)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return self.batches()

    def batches(self, first_step: int = 0) -> Iterator[tuple[Any, ...]]:
        """This worker's batches of one pass, from ``first_step`` on."""
        order = self.order()
        for step in range(first_step, self.steps):
            yield self.batch(step, order)

    def dataset(self, first_step: int = 0) -> Any:
        """The batches for ``Model.fit``: a ``tf.data.Dataset`` under TensorFlow, a ``keras.utils.PyDataset`` elsewhere.

        Args:
            first_step: the first step of every pass; above 0 to resume within an epoch.
        """
        import keras

        self._first_step = first_step
        make = _tensorflow_dataset if keras.backend.backend() == "tensorflow" else _py_dataset
        return make(self, first_step)


def _tensorflow_dataset(feed: Feed, first_step: int) -> Any:
    import keras
    import tensorflow as tf

    def signature(leaf: np.ndarray[Any, Any]) -> Any:
        # The batch dimension is open: steps differ by a row and share one trace.
        return tf.TensorSpec(shape=(None, *leaf.shape[1:]), dtype=leaf.dtype)

    spec = keras.tree.map_structure(signature, feed.batch(0, None))
    dataset = tf.data.Dataset.from_generator(lambda: feed.batches(first_step), output_signature=spec)
    dataset = dataset.apply(tf.data.experimental.assert_cardinality(feed.steps - first_step)).prefetch(PREFETCH_BATCHES)
    options = tf.data.Options()
    # There is nothing to tune. At the end of an epoch the iterator joins the tuner's thread, which sleeps up to 60 s and
    # sometimes misses the signal to stop: an epoch of 0.3 s took 15 s (TensorFlow 2.19).
    options.autotune.enabled = False
    return dataset.with_options(options)


def _py_dataset(feed: Feed, first_step: int) -> Any:
    import keras

    class Batches(keras.utils.PyDataset):
        """Steps by number; one thread of Keras reads ahead."""

        def __init__(self) -> None:
            super().__init__(workers=1, max_queue_size=PREFETCH_BATCHES)
            self._order: tuple[int, np.ndarray[Any, Any] | None] | None = None

        def __len__(self) -> int:
            return feed.steps - first_step

        def __getitem__(self, step: int) -> tuple[Any, ...]:
            if self._order is None or self._order[0] != feed.epoch:
                self._order = (feed.epoch, feed.order())
            return feed.batch(first_step + step, self._order[1])

    return Batches()
