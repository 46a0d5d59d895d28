"""Keras' lists, dicts and sets of layers and variables are pickled, and cannot be unpickled.

A layer's attribute that is a list becomes a ``TrackedList``, which unpickling fills before it has its attribute ``tracker``
(Keras 3, keras/src/utils/tracking.py). Needed until these classes have a ``__reduce__``.
"""

from __future__ import annotations

from typing import Any


def as_plain(value: Any) -> Any:
    """How to pickle a tracked collection as a plain one; None for any other value."""
    if type(value).__module__ != "keras.src.utils.tracking":
        return None
    plain = next((kind for kind in (list, dict, set) if isinstance(value, kind)), None)
    return plain and (plain, (plain(value),))
