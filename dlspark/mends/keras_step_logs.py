"""Keras has no public hook to merge the logs of a custom ``train_step`` over workers.

Keras 3 decides in the private ``Trainer._get_metrics_result_or_logs`` whether ``fit`` reports the metrics of the model or
the logs of the last step. If their keys differ, each rank would report its own logs. Needed until Keras has a public hook
(keras-team/keras#20585 describes what happened to the strategies that used to reduce such logs).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

METHOD = "_get_metrics_result_or_logs"


def targets(model: Any, average: Callable[[dict[str, Any]], dict[str, Any]]) -> list[tuple[Any, str, Callable[..., Any]]]:
    """The attributes to replace on ``model`` as (owner, name, function); empty if Keras no longer has the method.

    Args:
        model: a Keras model.
        average: takes the logs of the last step of a pass, returns their means over the workers.
    """
    original = getattr(model, METHOD, None)
    if original is None:
        return []

    def result_or_logs(logs: Any) -> Any:
        result = original(logs)
        return average(logs) if result is logs and isinstance(logs, dict) and logs else result

    return [(model, METHOD, result_or_logs)]
