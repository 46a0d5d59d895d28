"""Keras silently ignores ``BatchNormalization(synchronized=True)`` outside a ``tf.distribute`` strategy.

The layer's private ``_moments`` calls ``ops.moments(…, synchronized=True)``, which sums over the replicas of the current
strategy (keras-team/keras#18671, keras 3.15.1). Without a strategy there is one replica, and Keras 3 does not train inside a
strategy of several hosts (keras-team/keras#20585). If the layer gets a mask, it never synchronises. ``_moments`` is the only
place between the inputs and the use of their statistics. Needed until Keras has a public hook for it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

METHOD = "_moments"


def batch_normalisations(model: Any) -> list[Any]:
    """The batch normalisation layers of ``model``, at any depth, in a fixed order."""
    import keras

    layers = model._flatten_layers(include_self=False)  # ``Model.layers`` does not look into other layers
    return [layer for layer in layers if isinstance(layer, keras.layers.BatchNormalization)]


def synchronized_layers(model: Any) -> list[Any]:
    """Those that are to synchronise. A frozen one uses its stored statistics, so there is nothing to synchronise."""
    return [layer for layer in batch_normalisations(model) if layer.synchronized and layer.trainable]


def has_own_moments(layer: Any) -> bool:
    """Whether a subclass computes the statistics in its own way, which `targets` would replace."""
    import keras

    return getattr(type(layer), METHOD) is not getattr(keras.layers.BatchNormalization, METHOD)


def targets(model: Any, moments: Callable[..., Any]) -> list[tuple[Any, str, Callable[..., Any]]]:
    """The attributes to replace on the synchronized layers of ``model`` as (owner, name, function).

    Args:
        model: a built Keras model.
        moments: called as moments(number, axes, local, inputs, mask) returns (mean, variance), each of shape (channels,).
            Here ``number`` is the layer's position among the synchronized ones, ``axes`` are those to reduce, and
            ``local(inputs, mask)`` is what Keras would do.
    """
    return [
        (layer, METHOD, partial(moments, number, layer._reduction_axes, getattr(layer, METHOD)))
        for number, layer in enumerate(synchronized_layers(model))
    ]
