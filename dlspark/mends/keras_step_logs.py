"""Logs of a custom ``train_step`` that are no metrics have no public place where they could be merged over workers.

Keras 3 decides in the private ``Trainer._get_metrics_result_or_logs`` whether ``fit`` reports the model's metrics or the
last step's logs. Where the keys differ it hands on one worker's own values, so every rank would report something else.
Needed for as long as Keras has that method and no public hook in its place (keras-team/keras#20585 tells what became of
the strategies that used to reduce such logs).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

METHOD = "_get_metrics_result_or_logs"


def targets(model: Any, average: Callable[[dict[str, Any]], dict[str, Any]]) -> list[tuple[Any, str, Callable[..., Any]]]:
    """What to set on ``model``: (owner, name, function), or nothing when Keras no longer works that way.

    Args:
        model: a Keras model.
        average: given the logs of a pass' last step, returns their means over the workers.
    """
    original = getattr(model, METHOD, None)
    if original is None:
        return []

    def result_or_logs(logs: Any) -> Any:
        result = original(logs)
        return average(logs) if result is logs and isinstance(logs, dict) and logs else result

    return [(model, METHOD, result_or_logs)]
