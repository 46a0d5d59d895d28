"""Batch statistics over all workers, for ``BatchNormalization(synchronized=True)``.

Every rank sums up its part of the batch as (count, mean, variance), and one sum over the workers gathers these into a table.
From it each rank computes mean = Σ n·m / Σ n and variance = Σ n·(v + (m - mean)²) / Σ n (Chan, Golub and LeVeque, 1979).
Unlike E[x²] - E[x]², that loses no digits where the mean is large compared to the deviation.

The gradient of the sum is a sum, weighted. Let L_r be the mean loss of rank r over its n_r rows. The loss of the step is
Σ n_r·L_r / Σ n_r, and `gradient_sync` weights what rank s computes by n_s. So rank s must compute (1/n_s) Σ n_r·∂L_r/∂t for
its part of a total t.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dlspark.worker.session import WorkerSession

Sum = Callable[[Sequence[Any]], Sequence[Any]]


class BatchMoments:
    """The batch statistics of a model's layers over the workers of ``session``.

    Args:
        session: this worker's.
        exchange: its sum, for use in the middle of a step.
        rows: returns this worker's rows in the current step as a scalar tensor, or None outside a step.
    """

    def __init__(self, session: WorkerSession, exchange: Sum, rows: Callable[[], Any]) -> None:
        self._rank, self._world_size = session.rank, session.world_size
        self._exchange = exchange
        self._rows = rows

    def of(self, number: int, axes: Sequence[int], local: Callable[..., Any], inputs: Any, mask: Any) -> Any:
        """(mean, variance) of ``inputs`` over ``axes`` and all workers, where ``mask`` is true; see `keras_batch_norm`."""
        if self._rows() is None:  # a user's own call of the model, perhaps on one rank only
            return local(inputs, mask)
        import tensorflow as tf

        table = self._gathered(number, tf.stack(_own_moments(inputs, mask, axes)))
        counts, means, variances = tf.unstack(table, axis=1)
        total = tf.reduce_sum(counts, axis=0)
        mean = tf.math.divide_no_nan(tf.reduce_sum(counts * means, axis=0), total)
        squares = tf.reduce_sum(counts * (variances + tf.square(means - mean)), axis=0)
        return mean, tf.math.divide_no_nan(squares, total)

    def _gathered(self, number: int, own: Any) -> Any:
        """``own`` of every rank, of shape (world size, …), with the gradient that the module describes."""
        import tensorflow as tf

        @tf.custom_gradient
        def total(tensor: Any) -> Any:
            return self._checked_sum(tensor, 2 * number), weighted

        @tf.custom_gradient
        def weighted(upstream: Any) -> Any:
            rows = tf.cast(self._rows(), upstream.dtype)
            # Its own gradient, for second derivatives, is again a plain sum.
            return self._checked_sum(upstream * rows, 2 * number + 1) / rows, total

        before, after = self._rank, self._world_size - self._rank - 1
        return total(tf.pad(own[tf.newaxis], [[before, after], [0, 0], [0, 0]]))

    def _checked_sum(self, tensor: Any, ticket: int) -> Any:
        """The sum of ``tensor`` over the workers, which fails if other ranks are at another layer.

        A rank that skips a layer would otherwise wait forever or, if the shapes agree, get another layer's statistics.
        """
        import tensorflow as tf

        mine = tf.one_hot(self._rank, self._world_size, on_value=float(ticket), off_value=0.0, dtype=tensor.dtype)
        total, tickets = self._exchange([tensor, mine])
        message = (
            "Expected all workers to call the model's synchronized BatchNormalization layers in the same order; got the "
            "positions below, by rank. Do not skip a layer on one worker only."
        )
        same = tf.debugging.Assert(tf.reduce_all(tickets == tf.cast(ticket, tickets.dtype)), [message, tickets // 2])
        with tf.control_dependencies([] if same is None else [same]):
            return tf.identity(total)


def _own_moments(inputs: Any, mask: Any, axes: Sequence[int]) -> tuple[Any, Any, Any]:
    """(count, mean, variance) of this rank's part of the batch, each of shape (channels,). Zeros if the part is empty."""
    import tensorflow as tf

    valid = None
    if mask is None:
        size = tf.cast(tf.reduce_prod(tf.gather(tf.shape(inputs), axes)), inputs.dtype)
        (channels,) = (extent for axis, extent in enumerate(inputs.shape) if axis not in axes)
        count = tf.fill([channels], size)
    else:
        valid = tf.broadcast_to(tf.cast(mask[..., tf.newaxis], "bool"), tf.shape(inputs))
        count = tf.reduce_sum(tf.cast(valid, inputs.dtype), axes)

    def valid_or(other: Any) -> Any:
        return inputs if valid is None else tf.where(valid, inputs, other)

    def mean_of(values: Any) -> Any:
        return tf.reduce_sum(values, axes) / tf.maximum(count, 1)

    mean = mean_of(valid_or(0))
    aligned = tf.reshape(mean, [1 if axis in axes else -1 for axis in range(len(inputs.shape))])
    return count, mean, mean_of(tf.math.squared_difference(valid_or(aligned), aligned))
