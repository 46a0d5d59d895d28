"""Keras has no public hook at the end of a pass of ``fit``, where the results of the workers must be merged.

Keras 3 decides in the private ``Trainer._get_metrics_result_or_logs`` whether ``fit`` and ``evaluate`` report the metrics of
the model or the logs of the last step of a custom ``train_step``. It is the only place that both call once for each pass.
Needed until Keras has a public hook (keras-team/keras#20585 describes what happened to the strategies that used to reduce
such logs).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

METHOD = "_get_metrics_result_or_logs"


def targets(model: Any, at_end: Callable[[Callable[[Any], Any], Any], Any]) -> list[tuple[Any, str, Callable[..., Any]]]:
    """The attributes to replace on ``model`` as (owner, name, function).

    Args:
        model: a Keras model.
        at_end: takes Keras' own method and the logs of the last step of a pass; returns what the pass reports.

    Raises:
        AttributeError: Keras no longer has the method.
    """
    original = getattr(model, METHOD)
    return [(model, METHOD, lambda logs: at_end(original, logs))]
