"""The arrays that an evaluation takes: what must hold of them, and columns of values as texts."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dlspark.errors import ConfigError, DataError
from dlspark.evaluation.bootstrap import Floats

MOST_VALUES = 30
"""The most values of a column by which scores are told apart."""

_SUM_TOLERANCE = 0.02  # rows of probabilities in bfloat16 add up to 1 to about 1 %


def bands(values: Any, width: float) -> NDArray[Any]:
    """Numbers as texts such as ``"20 to below 40"``, from multiples of ``width``; ``"(unknown)"`` where there is none.

    Raises:
        ConfigError: ``width`` is not above 0.
        DataError: the values are no numbers.
    """
    if not width > 0:
        raise ConfigError(f"Expected bands of a width above 0: received {width!r}.")
    try:
        numbers = np.array([np.nan if _is_empty(value) else value for value in np.asarray(values).tolist()], np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"Expected numbers to put into bands: {error}. Leave the width out.") from error
    lower = np.floor(numbers / width) * width
    texts = [f"{low:g} to below {low + width:g}" if np.isfinite(low) else "(unknown)" for low in lower.tolist()]
    return np.array(texts, object)


def class_indices(name: str, values: Any, num_classes: int) -> NDArray[np.int64]:
    """``values`` as integers; refuses what is no index of a class."""
    found = np.asarray(values)
    whole = found.dtype.kind in "iu" or (found.dtype.kind == "f" and bool(np.all(found == np.floor(found))))
    if found.ndim != 1 or not whole:
        raise DataError(f"Expected {name} as class indices of shape (rows,): received {found.dtype} of shape {found.shape}.")
    if found.size and not 0 <= found.min() <= found.max() < num_classes:
        raise DataError(
            f"Expected {name} from 0 to {num_classes - 1}, for {num_classes} classes: received {found.min():g} to "
            f"{found.max():g}."
        )
    return found.astype(np.int64)


def checked_probabilities(values: Any, rows: int, num_classes: int) -> Floats:
    """``values`` as float64; refuses rows that do not come near adding up to 1."""
    found = np.asarray(values, np.float64)
    if found.shape != (rows, num_classes):
        raise DataError(f"Expected probabilities of shape ({rows}, {num_classes}): received {found.shape}.")
    sums = found.sum(axis=1, keepdims=True)
    if not (np.all(found >= 0) and np.all(np.abs(sums - 1) <= _SUM_TOLERANCE)):
        raise DataError(
            "Expected probabilities, from 0 up and adding up to 1 in every row: received "
            f"{found.min():.4g} to {found.max():.4g}, and sums of {sums.min():.4g} to {sums.max():.4g}. Give the model a "
            "softmax as its last layer, or predicted classes instead."
        )
    return found


def unit_numbers(groups: Any) -> NDArray[np.int64]:
    """The groups as numbers from 0; what is empty gets a number of its own."""
    numbers: dict[Any, int] = {}
    keys = [(row, None) if _is_empty(group) else group for row, group in enumerate(np.asarray(groups).tolist())]
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int64)


def _is_empty(value: Any) -> bool:
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def value_texts(name: str, values: Any) -> NDArray[Any]:
    """A column's values as texts, ``"(unknown)"`` where there is none; refuses more than `MOST_VALUES` different ones."""
    found = np.asarray(values)
    texts = [
        "(unknown)" if _is_empty(value) else f"{value:g}" if isinstance(value, float) else str(value)
        for value in found.tolist()
    ]
    different = len(set(texts))
    if different > MOST_VALUES:
        raise DataError(
            f"Expected at most {MOST_VALUES} different values to tell scores apart by: {name!r} has {different:,}. Put "
            "numbers into bands, such as age:20."
        )
    column = np.empty(len(texts), object)
    column[:] = texts
    return column


def in_order(texts: NDArray[Any]) -> list[str]:
    """The different texts, numbers in them by their size, what is in parentheses last."""

    def key(text: str) -> tuple[Any, ...]:
        parts = re.split(r"(\d+(?:\.\d+)?)", text)
        return text.startswith("("), [float(part) if i % 2 else part for i, part in enumerate(parts)]

    return sorted(set(texts.tolist()), key=key)
