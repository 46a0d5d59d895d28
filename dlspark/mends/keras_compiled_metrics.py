"""Keras tells which metrics a model was compiled with only after the first batch has built them.

``Model.metrics`` holds a container whose public ``metrics`` is empty until then, and a metric that cannot be merged over
workers has to be refused before any work starts. What ``compile`` was given lies in the container's private attributes.
Needed until Keras lists unbuilt metrics (its ``CompileMetrics.metrics`` returns [] while ``built`` is False).
"""

from __future__ import annotations

from typing import Any


def compiled_metrics(model: Any) -> list[Any]:
    """The metric objects that ``model`` has or was compiled with; names and functions, which Keras wraps, are left out."""
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
