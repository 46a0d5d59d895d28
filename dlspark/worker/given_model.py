"""Save the caller's model for the workers, and load it: with what its file holds, and with what it does not.

A ``.keras`` file is not the whole model. It lacks trainable flags other than a layer's own, the dtype policy of the model
itself, the state of the optimizer's exclusions, and weights that a layer merges on saving (LoRA). So the rest is carried
beside it, the driver loads what the workers will load, and compares. What differs is refused by name.
"""

from __future__ import annotations

import copy
import json
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from dlspark.errors import ConfigError
from dlspark.job import INITIAL_WEIGHTS_FILE, MODEL_FILE, GivenModel
from dlspark.mends import keras_layers, keras_optimizer_state
from dlspark.mends.keras_compiled_metrics import compiled_metrics, metrics_in_effect
from dlspark.storage import Store
from dlspark.worker.attributes import difference, foreign
from dlspark.worker.model_parts import optimizers_of
from dlspark.worker.model_state import (
    load_arrays,
    numbered,
    optimizer_arrays,
    save_arrays,
    seed_variables,
    set_arrays,
    storable,
)
from dlspark.worker.process import dtype_policy, random_states

_REGISTER = (
    "Write @keras.saving.register_keras_serializable(package='mine') above your classes and functions, or give fit a "
    "function that builds and compiles the model."
)
_BUILDER = "Give fit a function that builds and compiles the model."


def save_model(store: Store, model: Any) -> GivenModel:
    """Save the model to the store, from which workers load it; returns what the file does not hold.

    Raises:
        ConfigError: workers could not load it, or would load another model. The message names what differs.
    """
    given = _given(model)
    with store.open_writer(MODEL_FILE) as path, random_states(), _refused():
        model.save(path)
        _all_registered(path)
        loaded = _loaded(path, given)
        arrays = optimizer_arrays(model) if given.optimizer_built else {}
        # Most files hold all weights; those of LoRA do not.
        if not _equal(model.weights, loaded.weights):
            arrays |= numbered("w", model.weights)
        seeds = _seeds_that_draw(model)
        if len(seeds) == len(_seeds_that_draw(loaded)) == len(seed_variables(loaded)) and not _equal(
            seeds, seed_variables(loaded)
        ):
            arrays |= numbered("s", seeds)
        save_arrays(store, INITIAL_WEIGHTS_FILE, arrays)
        _complete(loaded, given, load_arrays(store, INITIAL_WEIGHTS_FILE))
    found = _difference(model, loaded, given)
    if found:
        raise ConfigError(f"Workers would train another model than the one given: {found}. {_BUILDER}")
    return given


def load_given(store: Store, given: GivenModel) -> Any:
    """The compiled model that `save_model` saved."""
    model = _loaded(store.local_file(MODEL_FILE), given)
    _complete(model, given, load_arrays(store, INITIAL_WEIGHTS_FILE))
    return model


def _given(model: Any) -> GivenModel:
    import keras

    compiled = dict(model.get_compile_config() or {})
    metrics, weighted_metrics = metrics_in_effect(model)
    # As they are now: compile may have wrapped the optimizer, the caller may have replaced it, and a compile without loss or
    # metrics keeps those of an earlier one.
    now = {"optimizer": model.optimizer, "loss": model.loss, "metrics": metrics, "weighted_metrics": weighted_metrics}
    for name, value in now.items():
        if name in compiled:
            compiled[name] = keras.saving.serialize_keras_object(value)
    policy = model.dtype_policy.name
    # Keras' configuration lacks this argument, and compile would wrap the optimizer again.
    scales = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    if policy == "mixed_float16" and not scales and type(model).compile is keras.Model.compile:
        compiled["auto_scale_loss"] = False
    return GivenModel(
        dtype_policy=policy,
        layers_trainable=tuple(bool(layer.trainable) for layer in keras_layers.flatten(model)),
        variables_trainable=tuple(bool(variable.trainable) for variable in model.weights),
        compiled=compiled,
        optimizer_built=bool(model.optimizer.built),
        iterations=tuple(int(_iteration(each)) for each in optimizers_of(model)),
        undecayed=tuple(keras_optimizer_state.exclusions(each, model.weights) for each in optimizers_of(model)),
    )


def _seeds_that_draw(model: Any) -> list[Any]:
    """The seeds of random layers, without those whose rate was set to 0 after they were made: their files have none."""
    idle = {
        id(seed)
        for layer in keras_layers.flatten(model)
        if getattr(layer, "rate", None) == 0
        for seed in seed_variables(layer)
    }
    return [seed for seed in seed_variables(model) if id(seed) not in idle]


def _iteration(optimizer: Any) -> Any:
    """The variable that counts steps. With accumulation, ``optimizer.iterations`` is a tensor computed from it."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    return next(variable for variable in inner.variables if variable.name == "iteration")


def _loaded(path: Path | str, given: GivenModel) -> Any:
    import keras

    with dtype_policy(given.dtype_policy):
        return keras.saving.load_model(path, compile=False, safe_mode=True)


def _complete(model: Any, given: GivenModel, arrays: Mapping[str, Any]) -> None:
    """Make a model that was just loaded equal to the one that was given, and compile it."""
    import keras

    layers = keras_layers.flatten(model)
    # From the outermost layer to the innermost: setting a flag sets those of all layers and variables inside.
    for layer, trainable in zip(layers, given.layers_trainable, strict=False):
        if layer.trainable != trainable:
            layer.trainable = trainable
    for variable, trainable in zip(model.weights, given.variables_trainable, strict=False):
        if variable.trainable != trainable:
            variable.trainable = trainable
    set_arrays(model, {name: array for name, array in arrays.items() if name[0] in "ws"})
    # Only now: some optimizers start from the weights.
    with dtype_policy(given.dtype_policy):
        model.compile_from_config(copy.deepcopy(dict(given.compiled)))  # Keras takes it apart
    if not model.compiled:  # _difference says why
        return
    built_on = arrays.get("b0")
    if built_on is not None and not np.array_equal(built_on, optimizer_arrays(model).get("b0", ())):
        # Keras has built it on what is trainable now, which has changed since the given one was built.
        model.optimizer = keras.optimizers.deserialize(copy.deepcopy(given.compiled["optimizer"]))
    for optimizer, count in zip(optimizers_of(model), given.iterations, strict=False):
        _iteration(optimizer).assign(count)
    for optimizer, excluded in zip(optimizers_of(model), given.undecayed, strict=False):
        keras_optimizer_state.exclude(optimizer, model.weights, excluded)
    set_arrays(model, {name: array for name, array in arrays.items() if name[0] in "bo"})


def _difference(model: Any, loaded: Any, given: GivenModel) -> str | None:
    """The first difference between the given model and what workers load; None if there is none."""
    ours, theirs = keras_layers.flatten(model), keras_layers.flatten(loaded)
    if [type(layer) for layer in ours] != [type(layer) for layer in theirs]:
        if _names(ours) == _names(theirs):
            again = next(a for a, b in zip(ours, theirs, strict=True) if type(a) is not type(b))
            return f"the class {type(again).__name__} was defined again after the model was built; build the model again"
        return f"it has the layers {_names(ours)}, its file {_names(theirs)}"
    for layer, other in zip(ours, theirs, strict=True):
        found = _difference_of(layer, other)
        if found:
            return f"layer {layer.name!r} has {found}"
    kinds = {"variable": (model.weights, loaded.weights), "seed": (_seeds_that_draw(model), _seeds_that_draw(loaded))}
    for kind, (mine, other) in kinds.items():
        if len(mine) != len(other):
            return f"it has {len(mine)} {kind}s, its file {len(other)}"
        for variable, same in zip(mine, other, strict=True):
            if variable.trainable != same.trainable:
                return f"{kind} {variable.path} has trainable={variable.trainable}, in its file {same.trainable}"
            if not _equal([variable], [same]):
                return f"{kind} {variable.path} has other values than in its file"
    if not loaded.compiled:
        return "its file has no optimizer, because it has a compile method of its own without compile_from_config"
    if _plain_arguments(given.compiled) != _plain_arguments(loaded.get_compile_config()):
        return "it is compiled with other arguments than its file says"
    if len(optimizers_of(model)) != len(optimizers_of(loaded)):
        return f"it has {len(optimizers_of(model))} optimizers, its file {len(optimizers_of(loaded))}"
    for optimizer, same in zip(optimizers_of(model), optimizers_of(loaded), strict=True):
        # Loading has built the copy, and some optimizers keep in attributes what they were built on.
        found = _difference_of(optimizer, same if optimizer.built else type(optimizer).from_config(optimizer.get_config()))
        if type(optimizer) is not type(same) or _config(optimizer) != _config(same):
            found = "another configuration than in its file"
        if optimizer.built and not _equal(optimizer.variables, same.variables):
            found = "another state than in its file"
        if found:
            return f"optimizer {optimizer.name!r} has {found}"
    for kind, objects_of in (("loss", _losses), ("metric", compiled_metrics)):
        for part, copied in zip(objects_of(model), objects_of(loaded), strict=False):
            found = difference(part, copied) if foreign(part) and type(part) is type(copied) else None
            if found:
                return f"{kind} {getattr(part, 'name', type(part).__name__)!r} has {found}"
    return None


def _losses(model: Any) -> list[Any]:
    import keras

    return [loss for loss in keras.tree.flatten(model.loss) if hasattr(loss, "__dict__")]


def _difference_of(mine: Any, other: Any) -> str | None:
    """The first attribute of a layer or an optimizer that its copy lacks or has with another value."""
    for name in ("trainable", "dtype_policy"):
        if getattr(mine, name, None) != getattr(other, name, None):
            return f"{name}={_told(getattr(mine, name))}, in its file {_told(getattr(other, name))}"
    return difference(mine, other)


def _config(optimizer: Any) -> Any:
    """The configuration of an optimizer without its name, which Keras counts up."""
    return {name: value for name, value in optimizer.get_config().items() if name != "name"}


def _plain_arguments(compiled: Any) -> Any:
    """The arguments of compile that a configuration has, without the optimizer and ids of objects."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): plain(each) for key, each in value.items() if key != "shared_object_id"}
        return [plain(each) for each in value] if isinstance(value, list | tuple) else value

    return plain({key: value for key, value in (compiled or {}).items() if key not in ("optimizer", "auto_scale_loss")})


def _equal(mine: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether the variables are equal in shape, dtype and every bit."""
    if [(tuple(v.shape), v.dtype) for v in mine] != [(tuple(v.shape), v.dtype) for v in other]:
        return False
    return all(storable(a).tobytes() == storable(b).tobytes() for a, b in zip(mine, other, strict=True))


def _told(value: Any) -> Any:
    return getattr(value, "name", value)


def _names(layers: Sequence[Any]) -> str:
    return ", ".join(type(layer).__name__ for layer in layers)


@contextmanager
def _refused() -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Skipping variable loading for optimizer")
            warnings.filterwarnings("ignore", message="`compile\\(\\)` was not called as part of model loading")
            yield
    except (ConfigError, OSError):  # the disk may be full
        raise
    except Exception as error:  # Keras raises many kinds here
        reason = _reason(error)
        named = "Replace the lambda by a function with a name. " if "lambda" in reason else ""
        raise ConfigError(f"The model cannot be sent to workers as a .keras file: {reason}. {named}{_REGISTER}") from error


def _reason(error: Exception) -> str:
    """Keras' reason, without the model's configuration and the advice to load unsafely that follow it."""
    last = (str(error) or type(error).__name__).rpartition("Exception encountered: ")[2]
    return re.split(r"(?<=[.!])\s", last.strip(), maxsplit=1)[0].rstrip(".")


def _all_registered(path: Path | str) -> None:
    """Reject classes and functions that only this process can find."""
    import keras

    registered = keras.saving.get_custom_objects()
    with zipfile.ZipFile(path) as archive:
        nodes = [json.loads(archive.read("config.json"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, list):
            nodes += node
        if not isinstance(node, dict):
            continue
        nodes += node.values()
        module, name = node.get("module"), node.get("class_name")
        # Keras would import an unregistered class from its module, which workers may not have.
        foreign = module and name and module.split(".")[0] not in ("keras", "builtins")
        if foreign and node.get("registered_name") not in registered and name not in registered:
            raise ConfigError(f"{name} of {module} cannot be sent to workers: it is not registered. {_REGISTER}")
