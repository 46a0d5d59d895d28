"""Attached models: N workers train as one process, with everything that Keras does around a step.

The workers are processes that sum through a shared list and a barrier: the arithmetic of gradient_sync.py without an
engine. The contract tests the same with real engines.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlspark import DlsparkError
from dlspark.data.shard_writer import write_rows
from dlspark.storage.store import Store
from dlspark.testing import toys

sys.path.append(str(Path(__file__).parent / "ranks"))  # the ranks' processes inherit it
import attach_cases

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

WORLD = 3
# The parts of a batch are rounded differently.
TOLERANCE = {"mixed precision": 2e-3, "mixed bfloat16 without its policy": 2e-2}
EXACT = 1e-5

Fit = Callable[..., list[attach_cases.Trained]]


@pytest.fixture(scope="module")
def fit(forks: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fit]:
    """``fit(case, world_size)`` returns the result of every rank. The processes start once."""
    store = Store(tmp_path_factory.mktemp("rows"))
    rows = write_rows(store, "train", *toys.separable(103))
    validation = write_rows(store, "val", *toys.separable(41, seed=5))
    context = multiprocessing.get_context("forkserver")
    with context.Manager() as manager, ProcessPoolExecutor(WORLD, mp_context=context) as pool:

        def fit(case: str, world_size: int, **options: Any) -> list[attach_cases.Trained]:
            shared = (world_size, manager.list([None] * WORLD), manager.Barrier(world_size), rows, validation, options)
            futures = [pool.submit(attach_cases.train, case, rank, *shared) for rank in range(world_size)]
            return [future.result(timeout=150) for future in futures]

        yield fit


def assert_equal_to_one_process(fit: Fit, case: str, world_size: int = 2, **options: Any) -> None:
    (alone,) = fit(case, 1, **options)
    together = fit(case, world_size, **options)
    tolerance = TOLERANCE.get(case, EXACT)
    for trained in together:
        for ours, theirs in zip(trained.weights, alone.weights, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)
        assert set(trained.history) == set(alone.history)
        for name, values in alone.history.items():
            np.testing.assert_allclose(trained.history[name], values, rtol=tolerance, atol=tolerance, err_msg=name)
        assert not trained.replaced, "the model is as before afterwards"
        assert all((a == b).all() for a, b in zip(trained.weights, together[0].weights, strict=True))


@pytest.mark.parametrize("case", attach_cases.GIVEN)
def test_given_models_equal_one_process(fit: Fit, case: str) -> None:
    assert_equal_to_one_process(fit, case)


@pytest.mark.parametrize("case", sorted(set(attach_cases.CASES) - attach_cases.NOT_EQUAL))
def test_equal_to_one_process(fit: Fit, case: str) -> None:
    assert_equal_to_one_process(fit, case, epochs=4 if case == "callbacks decide alike" else 2)


def test_three_workers(fit: Fit) -> None:
    assert_equal_to_one_process(fit, "momentum, clipping, regularisation", world_size=3)


def test_class_weights(fit: Fit) -> None:
    assert_equal_to_one_process(fit, "momentum, clipping, regularisation", class_weight={0: 1.0, 1: 3.0, 2: 0.2})


def test_batch_norm_statistics_are_averaged_and_frozen_weights_left_alone(fit: Fit) -> None:
    before = attach_cases.batch_norm_model().get_weights()
    ranks = fit("batch norm", 3)
    kernel, bias = ranks[0].weights[:2]
    assert (kernel == before[0]).all()
    assert (bias == before[1]).all()
    moving_mean = ranks[0].weights[4]
    assert (moving_mean != before[4]).any()
    for trained in ranks:
        assert all((a == b).all() for a, b in zip(trained.weights, ranks[0].weights, strict=True))


def test_synchronized_batch_norm_on_three_workers(fit: Fit) -> None:
    assert_equal_to_one_process(fit, "synchronized batch norm", world_size=3, class_weight={0: 1.0, 1: 3.0, 2: 0.2})


def test_a_synchronized_layer_skipped_on_one_rank_is_noticed(fit: Fit) -> None:
    with pytest.raises(Exception, match="Do not skip a layer on one worker only"):
        fit("a skipped layer", 2)


def test_weights_that_differ_are_noticed(fit: Fit) -> None:
    with pytest.raises(DlsparkError, match=r"weights on ranks \[1\] differ"):
        fit("weights that differ", 2)


def test_a_validation_that_ends_on_one_rank_is_noticed(fit: Fit) -> None:
    with pytest.raises(DlsparkError, match="set stop_evaluating on 1 of 2 ranks"):
        fit("a validation that ends", 2)
