"""Keras divides the sum of a masked loss by the valid elements of this process' rows only.

``reduce_weighted_values`` weighs valid elements by total / valid before it takes the mean, both counted in this process. The
mean over several workers divides by the valid elements of all. ``losses.loss.apply_mask`` makes the weights; there is no
public hook between a loss' values and their mean. Needed until Keras sums numerator and denominator over the processes of
a distribution (it scales by the number of replicas instead, in ``scale_loss_for_distribution``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

MEANS = ("mean", "sum_over_batch_size")


@contextlib.contextmanager
def masked_means(factor: Callable[[Any], Any]) -> Iterator[None]:
    """Multiply the weights of masked losses inside the block.

    Args:
        factor: takes the number of valid elements here, a scalar tensor; returns the factor, or None to change nothing.
    """
    import keras
    from keras.src.losses import loss as module

    original = module.apply_mask

    def apply_mask(sample_weight: Any, mask: Any, dtype: Any, reduction: Any) -> Any:
        weights = original(sample_weight, mask, dtype=dtype, reduction=reduction)
        if mask is None or reduction not in MEANS:
            return weights
        scale = factor(keras.ops.sum(keras.ops.cast(mask, "float32")))
        return weights if scale is None else weights * keras.ops.cast(scale, weights.dtype)

    module.apply_mask = apply_mask
    try:
        yield
    finally:
        module.apply_mask = original
