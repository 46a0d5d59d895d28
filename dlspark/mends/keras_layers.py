"""Keras has no public list of all layers in a model at any depth.

``Model.layers`` has the layers of one level, and of a layer inside another there is no public name at all. Needed until
``keras.Layer`` has a public counterpart of its private ``_flatten_layers``.
"""

from __future__ import annotations

from typing import Any


def flatten(model: Any) -> list[Any]:
    """The model and all layers inside it at any depth, in a fixed order."""
    return list(model._flatten_layers())
