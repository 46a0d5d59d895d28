"""Keras lists the metrics of ``compile`` only after the first batch has built them.

``Model.metrics`` has a container whose public ``metrics`` is empty until then, but metrics that cannot be merged over
workers must be rejected before any work starts. The arguments of ``compile`` are in the container's private attributes.
Needed until Keras lists unbuilt metrics (``CompileMetrics.metrics`` returns [] while ``built`` is False).
"""

from __future__ import annotations

from typing import Any

from dlspark.mends.keras_output_losses import output_losses


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


def given_metrics(model: Any) -> list[Any]:
    """The metric objects that the user has made, in an order that building and training do not change."""
    import keras

    built_by_keras = {id(each) for each in output_losses(model)}
    own = [each for each in model.metrics if not hasattr(each, "metrics") and id(each) not in built_by_keras]
    return own + [leaf for leaf in keras.tree.flatten(metrics_in_effect(model)) if isinstance(leaf, keras.metrics.Metric)]


def metrics_in_effect(model: Any) -> tuple[Any, Any]:
    """The metrics and weighted metrics as they were given to ``compile``, perhaps to an earlier one.

    A later ``compile`` without metrics keeps them, and its configuration has none.
    """
    for metric in model.metrics:
        if hasattr(metric, "metrics"):
            return getattr(metric, "_user_metrics", None), getattr(metric, "_user_weighted_metrics", None)
    return None, None
