"""The parts of a model, in an order that is the same on the driver and in every worker."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dlspark.mends import keras_layers
from dlspark.mends.keras_compiled_metrics import given_metrics


def optimizers_of(model: Any) -> list[Any]:
    """The optimizers of ``model``, without those that another one wraps."""
    import keras

    found: dict[int, Any] = {}
    for value in [getattr(model, "optimizer", None), *(value for _, value in sorted(vars(model).items()))]:
        leaves = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
        for leaf in leaves:
            if isinstance(leaf, keras.optimizers.Optimizer):
                found.setdefault(id(leaf), leaf)
    inner = {id(getattr(optimizer, "inner_optimizer", None)) for optimizer in found.values()}
    return [optimizer for key, optimizer in found.items() if key not in inner]


def parts_of(model: Any) -> dict[tuple[str, int], Any]:
    """Everything in a model that a callback may refer to, by kind and position.

    A position does not depend on whether the model has been trained, or a metric or optimizer built.
    """
    import keras

    layers, metrics = keras_layers.flatten(model), given_metrics(model)
    optimizers = [
        inner for each in optimizers_of(model) for inner in (each, getattr(each, "inner_optimizer", None)) if inner
    ]
    losses = [loss for loss in keras.tree.flatten(model.loss) if isinstance(loss, keras.Loss)]
    kinds = {"layer": layers, "variable": model.weights, "optimizer": optimizers, "metric": metrics, "loss": losses}
    helpers = {
        f"{name} of {kind} {i}": [helper]
        for kind in ("layer", "optimizer", "metric", "loss")
        for i, owner in enumerate(kinds[kind])
        for name, helper in _helpers(owner)
    }
    kinds |= {
        **{f"variable of optimizer {i}": each.variables for i, each in enumerate(optimizers)},
        **{f"variable of metric {i}": each.variables for i, each in enumerate(metrics)},
        **{f"seed of layer {i}": _seeds(each) for i, each in enumerate(layers)},
    }
    return {(kind, i): part for kind, parts in (helpers | kinds).items() for i, part in enumerate(parts)}


def _helpers(owner: Any, above: tuple[int, ...] = ()) -> Iterator[tuple[str, Any]]:
    """What an object of Keras has besides: schedules, regularizers, initializers, constraints; by the attributes' names."""
    import keras

    others = (keras.Layer, keras.Metric, keras.optimizers.Optimizer, keras.DTypePolicy, type)
    for name, value in sorted(vars(owner).items()):
        listed = enumerate(value) if isinstance(value, list | tuple) else [(None, value)]
        for key, each in value.items() if isinstance(value, dict) else listed:
            if not hasattr(each, "get_config") or not hasattr(each, "__dict__") or isinstance(each, others):
                continue
            if id(each) not in above:
                path = name if key is None else f"{name}[{key!r}]"
                yield path, each
                yield from ((f"{path}.{inner}", helper) for inner, helper in _helpers(each, (*above, id(each))))


def _seeds(layer: Any) -> list[Any]:
    import keras

    seeds = [each for each in vars(layer).values() if isinstance(each, keras.random.SeedGenerator)]
    return [part for seed in seeds for part in (seed, seed.state)]
