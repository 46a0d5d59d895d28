"""The arithmetic of batch_moments.py in one process. test_gradient_sync.py has it on several ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from dlspark.worker.batch_moments import BatchMoments
from dlspark.worker.session import WorkerSession

pytestmark = pytest.mark.timeout(60)


def moments(x: Any, mask: Any = None, axes: tuple[int, ...] = (0, 1)) -> Any:
    session = WorkerSession()
    return BatchMoments(session, session.sum, lambda: tf.constant(float(len(x)))).of(0, axes, no_local, x, mask)


def no_local(*_: Any) -> Any:
    raise AssertionError("inside a step, statistics are of all workers")


def test_a_mean_far_from_zero_costs_no_digits() -> None:
    x = (np.random.default_rng(0).normal(size=(64, 9, 3)) + 10_000).astype(np.float32)
    mean, variance = moments(tf.constant(x))
    np.testing.assert_allclose(mean, x.astype(np.float64).mean((0, 1)), rtol=1e-6)
    np.testing.assert_allclose(variance, x.astype(np.float64).var((0, 1)), rtol=1e-4)  # E[x²] - E[x]² is off by 10


def test_masked_values_do_not_count_even_if_they_are_not_finite() -> None:
    x = tf.constant([[[1.0, 10.0], [np.nan, np.inf], [3.0, 30.0]]])
    with tf.GradientTape() as tape:
        tape.watch(x)
        mean, variance = moments(x, mask=tf.constant([[True, False, True]]))
        total = tf.reduce_sum(variance)
    np.testing.assert_allclose(mean, [2, 20])
    np.testing.assert_allclose(variance, [1, 100])
    np.testing.assert_allclose(tape.gradient(total, x), [[[-1, -10], [0, 0], [1, 10]]])


def test_nothing_to_count_gives_zeros() -> None:
    mean, variance = moments(tf.zeros((0, 4, 2)))
    assert (mean.numpy() == 0).all()
    assert (variance.numpy() == 0).all()


def test_outside_a_step_nothing_is_exchanged() -> None:
    session = WorkerSession()
    outside = BatchMoments(session, no_local, lambda: None)
    assert outside.of(0, (0,), lambda inputs, mask: (inputs, mask), 1, 2) == (1, 2)
