"""Keras optimizers have no public names for what they were built on and for what they exclude from weight decay.

Both are part of a model, and neither is in its ``.keras`` file. ``Optimizer.get_config`` lacks the arguments of
``exclude_from_weight_decay``, which must be called before ``build``, and loading a file builds the optimizer at once. Needed
until ``get_config`` has the exclusions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

Exclusions = tuple[tuple[int, ...], str | None]


def variables_of(optimizer: Any) -> list[Any]:
    """The variables on which an optimizer was built; empty if it is not built."""
    return list(getattr(optimizer, "_trainable_variables", None) or ()) if optimizer.built else []


def exclusions(optimizer: Any, variables: Sequence[Any]) -> Exclusions:
    """What an optimizer excludes from weight decay: indices into ``variables``, and a pattern of names."""
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    keys: set[Any] = getattr(optimizer, "_exclude_from_weight_decay", set())
    pattern = getattr(optimizer, "_exclude_from_weight_decay_pattern", None)
    indices = tuple(i for i, variable in enumerate(variables) if keys and optimizer._var_key(variable) in keys)
    return indices, pattern.pattern if pattern else None


def exclude(optimizer: Any, variables: Sequence[Any], excluded: Exclusions) -> None:
    """Give an optimizer, built or not, what `exclusions` returned."""
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    indices, pattern = excluded
    optimizer._exclude_from_weight_decay = {optimizer._var_key(variables[i]) for i in indices}
    optimizer._exclude_from_weight_decay_pattern = re.compile(pattern) if pattern else None
    optimizer._exclude_from_weight_decay_cache = {}
