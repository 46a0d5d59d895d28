"""Keras weighs the loss of each output by the static batch size, which is None in a traced step.

``CompileLoss.call`` updates the mean ``<output>_loss`` with ``sample_weight=y_pred.shape[0]``. With None, every step has the
same weight in the mean, and a worker cannot say which share of the step its part is. The means are in the private
``Model._compile_loss``. Needed until Keras weighs them by ``ops.shape(y_pred)[0]``, as it weighs the total loss.
"""

from __future__ import annotations

from typing import Any


def output_losses(model: Any) -> list[Any]:
    """The means of the losses of several outputs; empty until the losses are built, and for one output."""
    return list(getattr(getattr(model, "_compile_loss", None), "metrics", ()))
