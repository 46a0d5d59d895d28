"""Restore the state of a process: environment variables, random states and the dtype policy."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator

import numpy as np


@contextlib.contextmanager
def environment(**changes: str | None) -> Iterator[None]:
    """Set environment variables inside the block (None removes one), and restore them after it."""
    before = {name: os.environ.get(name) for name in changes}
    _apply(changes)
    try:
        yield
    finally:
        _apply(before)


@contextlib.contextmanager
def random_states() -> Iterator[None]:
    """Restore the global random states of Python and NumPy after the block."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextlib.contextmanager
def dtype_policy(name: str) -> Iterator[None]:
    """Set Keras' global dtype policy inside the block."""
    import keras

    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def _apply(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
