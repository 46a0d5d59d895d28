"""Checks of data given to Trainer.fit: its kinds, its rows, and its shapes against the model's inputs."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from dlspark.data import place
from dlspark.errors import DataError

logger = logging.getLogger(__name__)


def is_dataframe(data: Any) -> bool:
    """Whether ``data`` is a Spark DataFrame, classic or Connect. Does not import pyspark."""
    return any(cls.__name__ == "DataFrame" and cls.__module__.startswith("pyspark.sql") for cls in type(data).__mro__)


def arrays(name: str, data: Any) -> int:
    """Check ``(x, y)`` or ``(x, y, sample_weight)`` of arrays; returns the number of rows."""
    if not isinstance(data, tuple | list) or not 2 <= len(data) <= 3:
        raise DataError(
            f"Expected {name} as a part of an ImageDataset, a tuple (x, y) of NumPy arrays or a Spark DataFrame; got "
            f"{_kind(data)}. {_instead(data)}"
        )
    every: dict[str, Any] = {}
    for part, value in zip(("x", "y", "sample_weight"), data, strict=False):
        if value is None and part != "x":
            continue
        found = dict(leaves(name, part, value))
        if not found:
            raise DataError(f"Expected at least one array as {part} of {name}; got an empty {type(value).__name__}.")
        for where, leaf in found.items():
            _array(name, where, leaf)
        every |= found
    counts = {where: len(leaf) for where, leaf in every.items()}
    if len(set(counts.values())) != 1:
        several = any(isinstance(value, tuple | list) for value in data)
        hint = " A list or tuple holds several arrays of rows; np.asarray(…) or np.stack(…) makes one array." * several
        raise DataError(
            f"Expected equally many rows in all arrays of {name}; got {sorted(set(counts.values()))}: "
            f"{_shortened(f'{where} has {count}' for where, count in counts.items())}.{hint}"
        )
    for where, leaf in every.items():
        if not where.startswith("y"):
            _finite(name, where, leaf)
    return next(iter(counts.values()))


def leaves(name: str, where: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The leaves of a structure and their places, such as "x/left"."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            if not isinstance(key, str) or not key.isprintable():
                raise DataError(f"Expected printable text as keys of {where} in {name}; got {key!r}. Rename the key.")
            yield from leaves(name, place(where, key), part)
    elif isinstance(value, tuple | list):
        for number, part in enumerate(value):
            yield from leaves(name, place(where, number), part)
    else:
        yield where, value


def structure(value: Any) -> str:
    """The structure of nested arrays in words: "{'a': array, 'b': (array, array)}"."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key!r}: {structure(value[key])}' for key in sorted(value, key=str))}}}"
    if isinstance(value, tuple | list):
        return f"({_shortened(map(structure, value))})" if len(value) != 1 else f"({structure(value[0])},)"
    return "None" if value is None else "array"


def inputs(name: str, x: Any, model: Any) -> None:
    """Compare the structure and the shapes of rows with the model's inputs, if they are known."""
    import keras

    expected = getattr(model, "inputs", None)
    if not expected:
        return  # a subclassed model has no known shapes
    wanted = model.input if isinstance(getattr(model, "input", None), dict) else list(expected)
    given = _by_name(name, x, wanted)
    found = keras.tree.flatten(given)
    if len(found) != len(expected):
        raise DataError(
            f"Expected {len(expected)} inputs per row in {name}, as the model takes; got {len(found)}. Give x with the "
            f"structure {structure(wanted if len(expected) > 1 else expected[0])}."
        )
    for leaf, tensor in zip(found, expected, strict=True):
        want, have = tuple(tensor.shape[1:]), tuple(leaf.shape[1:])
        adjusted = have[:-1] if len(have) == len(want) + 1 and have[-1] == 1 else have
        adjusted = (*have, 1) if len(have) == len(want) - 1 and want[-1] == 1 else adjusted  # Keras does both itself
        if len(want) != len(adjusted) or any(w not in (None, h) for w, h in zip(want, adjusted, strict=True)):
            raise DataError(
                f"Expected rows of shape {want} in {name} for the model's input {tensor.name!r}; got {have}. "
                "Prepare the data in the model's size, or build the model for the size of the data."
            )


def _by_name(name: str, x: Any, wanted: Any) -> Any:
    """``x`` in the order of the model's inputs, which Keras finds by the keys of a dict.

    For a model whose inputs are a dict, Keras only warns of other keys, and takes the values in the order of their names.
    """
    if isinstance(wanted, dict):
        if not isinstance(x, Mapping):
            if list(wanted) != sorted(wanted):
                raise DataError(f"Expected x of {name} as a dict with the keys {sorted(wanted)}; got {_kind(x)}.")
            return x
        if set(x) != set(wanted):
            raise DataError(f"Expected the keys {sorted(wanted)} in x of {name}, as the model takes; got {sorted(x)}.")
        return {key: x[key] for key in wanted}
    if isinstance(x, Mapping):
        names = [getattr(tensor, "name", None) for tensor in wanted]
        missing = sorted(str(each) for each in names if each not in x)
        if missing:
            raise DataError(
                f"Expected x of {name} as an array or with the names of the model's inputs as keys, {names}; got "
                f"{sorted(x)}, without {missing}. Rename the keys."
            )
        return [x[each] for each in names]
    return x


def _array(name: str, where: str, leaf: Any) -> None:
    """Reject what is not a plain array of numbers with rows."""
    plain = type(leaf) in (np.ndarray, np.memmap)
    if plain and leaf.ndim and leaf.dtype.kind in "fiub" and leaf.dtype.itemsize <= 8 and 0 not in leaf.shape[1:]:
        return
    advice = "Give np.asarray(…) of it."
    got = _kind(leaf)
    if isinstance(leaf, np.ma.MaskedArray):
        advice = "The mask would be lost: give .filled(value), and sample_weight for rows that must not count."
    elif plain:
        got = f"{leaf.dtype} of shape {leaf.shape}"
        advice = "Give at least one number per row."
        if leaf.dtype.kind not in "fiub" or leaf.dtype.itemsize > 8:
            advice = "Cast it with .astype('float32'), index text with np.unique(…, return_inverse=True)."
    elif isinstance(leaf, bool | int | float | str | np.generic):
        advice = "Give np.asarray(…) of a list of numbers."
    elif leaf is None:
        advice = "Leave it out."
    raise DataError(f"Expected NumPy arrays of numbers in {name}, one row per example; got {got} as {where}. {advice}")


def _finite(name: str, where: str, leaf: Any) -> None:
    """Warn of NaN and infinity in inputs, which some models handle; reject them in sample weights."""
    with np.errstate(invalid="ignore", over="ignore"):
        if leaf.dtype.kind != "f" or np.isfinite(leaf.sum(dtype=np.float64)):
            return
    bad = np.flatnonzero(~np.isfinite(leaf).reshape(len(leaf), -1).all(axis=1))
    if not len(bad):
        return  # only the sum overflows
    text = f"NaN or infinity in {len(bad)} row{'s' if len(bad) > 1 else ''} of {where}, first in row {bad[0]}"
    if where.startswith("sample_weight"):
        raise DataError(f"Expected finite numbers in {name}; got {text}. Use the weight 0 for rows that must not count.")
    logger.warning("%s has %s. Unless the model handles them, its loss is NaN and the run stops.", name, text)


def _kind(value: Any) -> str:
    kind = type(value)
    builtin = kind.__module__ == "builtins"
    return kind.__name__ if builtin else f"{kind.__module__.partition('.')[0]}.{kind.__name__}"


def _instead(data: Any) -> str:
    if isinstance(data, tuple | list):
        return "Give (x, y), or (x, y, sample_weight). A model that restores its input gets (x, x)."
    if hasattr(data, "train") and hasattr(data, "validation"):
        return "Give its part .train."
    if isinstance(data, str):
        return f"Give ImageDataset.open({data!r}).train."
    return "Give the arrays of all rows, (x, y); store what does not fit into memory with prepare_images or as a DataFrame."


def _shortened(texts: Any, most: int = 6) -> str:
    texts = list(texts)
    return ", ".join(texts[:most]) + (f", … ({len(texts)} in all)" if len(texts) > most else "")
