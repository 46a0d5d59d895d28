"""The state of a training as arrays: weights, optimizer, seeds, and the local state of each rank within an epoch."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dlspark.errors import DataError
from dlspark.job import INITIAL_WEIGHTS_FILE, WEIGHTS_FILE
from dlspark.mends.keras_optimizer_state import variables_of
from dlspark.storage import Store, differing
from dlspark.worker.agreement import merge_of, states_of
from dlspark.worker.model_parts import optimizers_of
from dlspark.worker.session import WorkerSession

logger = logging.getLogger(__name__)

_SHARED = re.compile("[wos][0-9]+")
Arrays = dict[str, NDArray[Any]]


def set_weights(model: Any, weights: Sequence[Any]) -> None:
    """Assign ``weights`` in the order of ``model.weights``, without the optimizer's state."""
    for variable, value in zip(model.weights, weights, strict=True):
        variable.assign(value)


def vary_random_layers(model: Any, rank: int) -> None:
    """Let dropout and augmentation draw differently on every rank. Rank 0 keeps the model's own seeds."""
    for variable in seed_variables(model):
        if rank:
            state = np.array(variable)
            state[0] += rank
            variable.assign(state)


def save_trained(store: Store, model: Any) -> None:
    """Write weights and the state of all optimizers atomically to one npz file."""
    save_arrays(store, WEIGHTS_FILE, {**numbered("w", model.weights), **optimizer_arrays(model)})


def load_trained(store: Store) -> Arrays:
    """What `save_trained` wrote."""
    return load_arrays(store, WEIGHTS_FILE)


def save_initial_weights(store: Store, model: Any) -> None:
    """Write the weights that a builder's model starts with, which each worker's copy of it takes."""
    save_arrays(store, INITIAL_WEIGHTS_FILE, numbered("w", model.weights))


def save_arrays(store: Store, file: str, values: Mapping[str, Any]) -> None:
    """Write variables or arrays by name, in dtypes that npz supports."""
    arrays = {name: storable(value) for name, value in values.items()}
    with store.open_writer(file, size=sum(array.nbytes for array in arrays.values())) as path:
        np.savez(path, **arrays)


def load_arrays(store: Store, file: str) -> Arrays:
    """What `save_arrays` wrote."""
    with np.load(store.local_file(file), allow_pickle=False) as found:
        return {name: found[name] for name in found.files}


def set_arrays(model: Any, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Assign those of ``arrays`` that are variables of the model; its optimizers are built as they were."""
    _build_optimizers(model, arrays)
    for name, variable in _shared_variables(model).items():
        if name in arrays:
            variable.assign(arrays[name])


def weights_of(arrays: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
    """The weights among ``arrays``, in the order of ``model.weights``."""
    return [arrays[f"w{i}"] for i in range(sum(name.startswith("w") for name in arrays))]


def optimizer_arrays(model: Any) -> dict[str, Any]:
    """The variables of all optimizers (``o0`` …), and for each built one the indices of its weights (``b0`` …)."""
    return {**numbered("o", _optimizer_variables(model)), **_built_on(model)}


def _built_on(model: Any) -> dict[str, NDArray[np.int64]]:
    positions = {id(variable): i for i, variable in enumerate(model.weights)}
    return {
        f"b{i}": np.array([positions.get(id(each), -1) for each in variables_of(optimizer)], np.int64)
        for i, optimizer in enumerate(optimizers_of(model))
        if optimizer.built
    }


def _optimizer_variables(model: Any) -> list[Any]:
    return [variable for optimizer in optimizers_of(model) for variable in optimizer.variables]


def _build_optimizers(model: Any, arrays: Mapping[str, NDArray[Any]]) -> None:
    for i, optimizer in enumerate(optimizers_of(model)):
        indices = arrays.get(f"b{i}")
        if indices is not None and not optimizer.built and (indices >= 0).all():
            optimizer.build([model.weights[j] for j in indices])


def numbered(letter: str, values: Sequence[Any]) -> dict[str, Any]:
    """Values by their names in files: the letter of their group and a number."""
    return {f"{letter}{i}": value for i, value in enumerate(values)}


def storable(variable: Any) -> NDArray[Any]:
    """The value of a variable, in a dtype that npz supports."""
    import keras

    array = keras.ops.convert_to_numpy(variable)
    # npz has no bfloat16. float32 holds its values exactly, and assign() casts back.
    return array.astype(np.float32) if "bfloat16" in str(array.dtype) else array


def capture(model: Any) -> Arrays:
    """The state between two epochs: weights (``w…``), all optimizers (``o…``), seeds (``s…``).

    It is equal on all ranks except for the seeds; checkpoints have rank 0's.
    """
    return {name: storable(value) for name, value in {**_shared_variables(model), **_built_on(model)}.items()}


def capture_within_epoch(model: Any, session: WorkerSession) -> Arrays:
    """The state within an epoch: that of `capture`, and every rank's batch statistics and metrics.

    All ranks call this after the same step, because it sums over them. The result is complete on each rank.
    """
    import keras

    arrays = capture(model)
    # float64 holds float32 values and the counts of metrics exactly.
    mine = [np.asarray(storable(variable), np.float64) for variable in _local_variables(model)]
    flat = np.concatenate([array.ravel() for array in mine]) if mine else np.zeros(0)
    table = np.zeros((session.world_size if session.exchanges else 1, flat.size))
    table[session.rank if session.exchanges else 0] = flat
    if session.exchanges:
        # Every rank fills one row, so the sum gathers them. It also makes all ranks wait for each other.
        table = keras.ops.convert_to_numpy(session.sum([keras.ops.convert_to_tensor(table, "float64")])[0])
    arrays["local"] = table
    return arrays


def restore(model: Any, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Assign to ``model`` what `capture` returned. Call it before `vary_random_layers`.

    Raises:
        DataError: the model has other variables; the message names the first one.
    """
    _build_optimizers(model, arrays)
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    variables = _shared_variables(model)
    shared = {name: array for name, array in arrays.items() if name in variables or _SHARED.fullmatch(name)}
    wrong = differing(shared, {name: (variable.path, tuple(variable.shape)) for name, variable in variables.items()})
    if wrong:
        raise DataError(f"The checkpoint is of another model: {wrong}.")
    for name, variable in variables.items():
        variable.assign(shared[name])


def fits_within_epoch(model: Any, arrays: Mapping[str, NDArray[Any]]) -> bool:
    """Whether the model has as many metrics and batch statistics as `capture_within_epoch` saved."""
    return sum(_sizes(model)) == arrays["local"].shape[1]


def restore_within_epoch(model: Any, arrays: Mapping[str, NDArray[Any]], session: WorkerSession) -> None:
    """Assign this rank's part of what `capture_within_epoch` returned, after the metrics were created and reset."""
    if not fits_within_epoch(model, arrays):
        raise DataError(
            f"Expected {sum(_sizes(model))} values of metrics and batch statistics in the checkpoint; got "
            f"{arrays['local'].shape[1]}. Resume with the model that the checkpoint belongs to."
        )
    flat = arrays["local"][session.rank if session.exchanges else 0]
    parts = np.split(flat, np.cumsum(_sizes(model))[:-1])
    for variable, part in zip(_local_variables(model), parts, strict=True):
        variable.assign(part.reshape(variable.shape).astype(variable.dtype))


def _sizes(model: Any) -> list[int]:
    return [int(np.prod(variable.shape)) for variable in _local_variables(model)]


def weight_shapes(model: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Path and shape of each of the model's weights, by their names in checkpoints; empty if it is not built."""
    return (
        {f"w{i}": (variable.path, tuple(variable.shape)) for i, variable in enumerate(model.weights)} if model.built else {}
    )


def seed_variables(model_or_layer: Any) -> list[Any]:
    """The states of the random layers in ``model_or_layer``, in a fixed order."""
    return [variable for variable in model_or_layer.variables if variable.name == "seed_generator_state"]


def _shared_variables(model: Any) -> dict[str, Any]:
    groups = {"w": model.weights, "o": _optimizer_variables(model), "s": seed_variables(model)}
    return {name: value for letter, group in groups.items() for name, value in numbered(letter, group).items()}


def _local_variables(model: Any) -> list[Any]:
    """What differs between ranks until the epoch's end: batch statistics and metrics."""
    averaged = [variable for variable, layer in states_of(model) if merge_of(layer) == "mean"]
    return averaged + list(model.metrics_variables)


def give_back(model: Any, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Assign the trained variables to the caller's model, whose weights have these shapes."""
    _build_optimizers(model, arrays)
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    state = {name: tuple(value.shape) for name, value in optimizer_arrays(model).items() if name.startswith("o")}
    trained = {name: array.shape for name, array in arrays.items() if name.startswith("o")}
    if state == trained:
        set_arrays(model, arrays)
    else:
        set_weights(model, weights_of(arrays))
        names = ", ".join(optimizer.name for optimizer in optimizers_of(model))
        logger.warning(
            "The state of %s is lost: after training there were %d optimizer variables, and the model given has %d.",
            names,
            len(trained),
            len(state),
        )
