"""Structures: names of columns nested like the input of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

Structure: TypeAlias = "str | tuple[Structure, ...] | dict[str, Structure]"
"""The name of a column, or a tuple or dict of structures."""


def place(parent: str, key: str | int) -> str:
    """The name of a part by its place: "x/left". Different places have different names, whatever the keys contain."""
    return f"{parent}/{str(key).replace('%', '%25').replace('/', '%2F')}"


def columns_of(structure: Structure | None) -> tuple[str, ...]:
    """The names of the columns in a structure, in order; none for None."""
    if structure is None or isinstance(structure, str):
        return () if structure is None else (structure,)
    parts = structure.values() if isinstance(structure, dict) else structure
    return tuple(name for part in parts for name in columns_of(part))


def restore(structure: Structure | None, arrays: Mapping[str, Any]) -> Any:
    """The structure with each name replaced by its array."""
    if structure is None or isinstance(structure, str):
        return None if structure is None else arrays[structure]
    if isinstance(structure, dict):
        return {key: restore(part, arrays) for key, part in structure.items()}
    return tuple(restore(part, arrays) for part in structure)


def with_tuples(value: Any) -> Any:
    """``value`` with its lists, at any depth, as tuples."""
    if isinstance(value, (list, tuple)):
        return tuple(with_tuples(item) for item in value)
    return {key: with_tuples(item) for key, item in value.items()} if isinstance(value, dict) else value
