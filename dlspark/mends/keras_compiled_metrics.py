"""Keras lists the metrics of ``compile`` only after the first batch has built them.

``Model.metrics`` has a container whose public ``metrics`` is empty until then, but metrics that cannot be merged over
workers must be rejected before any work starts. The arguments of ``compile`` are in the container's private attributes.
Needed until Keras lists unbuilt metrics (``CompileMetrics.metrics`` returns [] while ``built`` is False).
"""

from __future__ import annotations

from typing import Any


def compiled_metrics(model: Any) -> list[Any]:
    """The metric objects of ``model``, built or not, without the names and functions that Keras wraps."""
    import keras

    found = []
    for metric in model.metrics:
        parts = getattr(metric, "metrics", None)
        if parts is None:
            found.append(metric)
            continue
        found += list(parts)
        if not metric.built:
            given = [getattr(metric, "_user_metrics", None), getattr(metric, "_user_weighted_metrics", None)]
            found += [leaf for leaf in keras.tree.flatten(given) if isinstance(leaf, keras.metrics.Metric)]
    return found


def metrics_in_effect(model: Any) -> tuple[Any, Any]:
    """The metrics and weighted metrics as they were given to ``compile``, perhaps to an earlier one.

    A later ``compile`` without metrics keeps them, and its configuration has none.
    """
    for metric in model.metrics:
        if hasattr(metric, "metrics"):
            return getattr(metric, "_user_metrics", None), getattr(metric, "_user_weighted_metrics", None)
    return None, None
