"""Compare an object with its copy by attributes, because its configuration may lack some of them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from types import CodeType, FunctionType
from typing import Any

import numpy as np

_FRAMEWORKS = ("keras", "tensorflow", "builtins", "numpy", "collections")
# Set by compile, fit, evaluate and predict, and different in a model that was used.
_RUNTIME = frozenset({
    "name", "built", "compiled", "history", "optimizer", "loss", "train_function", "test_function", "predict_function",
    "stop_training", "stop_evaluating", "stop_predicting",
})  # fmt: skip


def difference(mine: Any, other: Any, seen: frozenset[int] = frozenset()) -> str | None:
    """The first attribute that ``other``, a copy of ``mine``, lacks or has with another value; None if there is none.

    Objects of Keras in it, such as layers, are left out. Of a Keras object, only the user's objects in it count.
    """
    if id(mine) in seen:
        return None
    seen |= {id(mine)}
    for name, value in vars(mine).items():
        if name in _RUNTIME or name.startswith("_self_"):
            continue
        there = name in vars(other)
        if not name.startswith("_") and callable(getattr(type(mine), name, None)):  # a method replaced on this object alone
            if not there:
                return f"a {name} of its own, which its file lacks"
            continue
        if foreign(mine) and name not in _framework_names(type(mine).__mro__):
            if there and (found := _difference_of(value, vars(other)[name], seen)):
                return f"{name}{found}"
            if not there and _plain(value):
                return f"{name}={value!r}, in its file nothing: its get_config lacks it"
        elif there and foreign(value) and (found := _difference_of(value, vars(other)[name], seen)):
            return f"{name}{found}"
    return None


def foreign(value: Any) -> bool:
    """Whether an object's class is neither Keras' nor Python's."""
    return type(value).__module__.partition(".")[0] not in _FRAMEWORKS


def _difference_of(mine: Any, other: Any, seen: frozenset[int]) -> str | None:
    import keras

    compared_elsewhere = (keras.Layer, keras.Variable, keras.optimizers.Optimizer, keras.Metric, keras.KerasTensor)
    if mine is other or isinstance(mine, compared_elsewhere):
        return None
    if isinstance(mine, FunctionType):
        same = isinstance(other, FunctionType) and (mine.__module__, mine.__qualname__) == (
            other.__module__,
            other.__qualname__,
        )
    elif hasattr(mine, "numpy") and (hasattr(other, "numpy") or isinstance(other, int | float)):  # no symbolic tensor
        same = np.array_equal(np.asarray(mine), np.asarray(other))
    elif _plain(mine):
        same = _same(mine, other)
    elif isinstance(mine, Mapping) and isinstance(other, Mapping):
        found = (_difference_of(value, other[key], seen) for key, value in mine.items() if key in other)
        return next((f"[…]{each}" for each in found if each), None)
    elif isinstance(mine, list | tuple) and isinstance(other, list | tuple):
        found = (_difference_of(a, b, seen) for a, b in zip(mine, other, strict=False))
        return next((f"[…]{each}" for each in found if each), None)
    elif foreign(mine) and type(mine) is type(other) and hasattr(mine, "__dict__"):
        inner = difference(mine, other, seen)
        return f".{inner}" if inner else None
    else:
        return None
    return None if same else f"={mine!r}, in its file {other!r}: its get_config lacks it"


@functools.cache
def _framework_names(bases: tuple[type, ...]) -> frozenset[str]:
    """The private names that the frameworks' classes among ``bases`` use."""
    functions = (
        inspect.unwrap(function)
        for base in bases
        if base.__module__.partition(".")[0] in _FRAMEWORKS
        for value in vars(base).values()
        for function in ([value.fget, value.fset] if isinstance(value, property) else [getattr(value, "__func__", value)])
        if function is not None
    )
    names = (name for function in functions if hasattr(function, "__code__") for name in _names(function.__code__))
    return frozenset(name for name in names if name.startswith("_"))


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):  # getattr(self, "_name", …)
            yield constant
        elif isinstance(constant, CodeType):
            yield from _names(constant)


def _plain(value: Any) -> bool:
    if isinstance(value, list | tuple | set | frozenset):
        return all(_plain(each) for each in value)
    if isinstance(value, Mapping):
        return all(_plain(each) for each in value.values())
    return value is None or isinstance(value, bool | int | float | complex | str | bytes | np.ndarray | np.generic)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b) or (a != a and b != b)  # NaN
