"""What a training is made of, as arrays: weights, optimizer, seeds, and what ranks hold of their own within an epoch."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dlspark.errors import DataError
from dlspark.job import INITIAL_WEIGHTS_FILE, WEIGHTS_FILE
from dlspark.storage import Store, differing
from dlspark.worker.gradient_sync import optimizers_of
from dlspark.worker.session import WorkerSession

logger = logging.getLogger(__name__)

_SHARED = re.compile("[wos][0-9]+")
Arrays = dict[str, NDArray[Any]]


def set_weights(model: Any, weights: Sequence[Any]) -> None:
    """Assign ``weights`` in the order of ``model.weights``; an optimizer's state is not touched."""
    for variable, value in zip(model.weights, weights, strict=True):
        variable.assign(value)


def vary_random_layers(model: Any, rank: int) -> None:
    """Let dropout and augmentation draw differently on every rank. Rank 0 keeps the model's own seeds."""
    for variable in _seeds(model):
        if rank:
            state = np.array(variable)
            state[0] += rank
            variable.assign(state)


def save_trained(store: Store, model: Any) -> None:
    """Write weights (``w0`` …) and the optimizer's variables (``o0`` …) as one npz file, whole or not at all."""
    arrays = {f"w{i}": storable(v) for i, v in enumerate(model.weights)}
    arrays.update({f"o{i}": storable(v) for i, v in enumerate(model.optimizer.variables)})
    with store.open_writer(WEIGHTS_FILE, size=sum(array.nbytes for array in arrays.values())) as path:
        np.savez(path, **arrays)


def load_trained(store: Store) -> tuple[list[NDArray[Any]], list[NDArray[Any]]]:
    """(weights, optimizer variables) that ``save_trained`` wrote."""
    with np.load(store.local_file(WEIGHTS_FILE), allow_pickle=False) as file:
        count = sum(name.startswith("w") for name in file.files)
        return [file[f"w{i}"] for i in range(count)], [file[f"o{i}"] for i in range(len(file.files) - count)]


def save_initial_weights(store: Store, model: Any) -> None:
    """Write the weights that a builder's model starts with, which each worker's copy of it takes."""
    arrays = {f"w{i}": storable(v) for i, v in enumerate(model.weights)}
    with store.open_writer(INITIAL_WEIGHTS_FILE, size=sum(array.nbytes for array in arrays.values())) as path:
        np.savez(path, **arrays)


def load_initial_weights(store: Store, model: Any) -> None:
    """Give ``model`` what `save_initial_weights` wrote."""
    with np.load(store.local_file(INITIAL_WEIGHTS_FILE), allow_pickle=False) as file:
        set_weights(model, [file[f"w{i}"] for i in range(len(file.files))])


def storable(variable: Any) -> NDArray[Any]:
    """The value of a variable, in a dtype that npz knows."""
    import keras

    array = keras.ops.convert_to_numpy(variable)
    # npz knows no bfloat16; float32 holds every value of it, and assigning casts back.
    return array.astype(np.float32) if "bfloat16" in str(array.dtype) else array


def capture(model: Any) -> Arrays:
    """What a training goes on from at an epoch's end: weights (``w…``), all optimizers (``o…``), seeds (``s…``).

    Equal on all ranks but for the seeds, of which rank 0's are meant.
    """
    return {name: storable(variable) for name, variable in _shared_variables(model).items()}


def capture_within_epoch(model: Any, session: WorkerSession) -> Arrays:
    """What `capture` has and what each rank holds of its own until the epoch ends: batch statistics and metrics.

    To be called on all ranks after the same step, as it sums over them; the result is complete on each.
    """
    import keras

    arrays = capture(model)
    # float64 holds every float32, and every count that a metric may have.
    mine = [np.asarray(storable(variable), np.float64) for variable in _local_variables(model)]
    flat = np.concatenate([array.ravel() for array in mine]) if mine else np.zeros(0)
    table = np.zeros((session.world_size if session.exchanges else 1, flat.size))
    table[session.rank if session.exchanges else 0] = flat
    if session.exchanges:
        # A sum in which every rank fills one row; and nobody is here before all are.
        table = keras.ops.convert_to_numpy(session.sum([keras.ops.convert_to_tensor(table, "float64")])[0])
    arrays["local"] = table
    return arrays


def restore(model: Any, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Give ``model`` what `capture` took. Call it before random layers are varied by rank.

    Raises:
        DataError: the model has other variables; names the first one.
    """
    for optimizer in optimizers_of(model):
        if not optimizer.built and optimizer is model.optimizer:
            optimizer.build(model.trainable_variables)
    variables = _shared_variables(model)
    shared = {name: array for name, array in arrays.items() if name in variables or _SHARED.fullmatch(name)}
    wrong = differing(shared, {name: (variable.path, tuple(variable.shape)) for name, variable in variables.items()})
    if wrong:
        raise DataError(f"The checkpoint is of another model: {wrong}.")
    for name, variable in variables.items():
        variable.assign(shared[name])


def fits_within_epoch(model: Any, arrays: Mapping[str, NDArray[Any]]) -> bool:
    """Whether the model has the metrics and batch statistics that `capture_within_epoch` took."""
    return sum(_sizes(model)) == arrays["local"].shape[1]


def restore_within_epoch(model: Any, arrays: Mapping[str, NDArray[Any]], session: WorkerSession) -> None:
    """Give ``model`` this rank's part of what `capture_within_epoch` took; once the metrics exist and were reset."""
    if not fits_within_epoch(model, arrays):
        raise DataError(
            f"The checkpoint has {arrays['local'].shape[1]} values of metrics and batch statistics, the model "
            f"{sum(_sizes(model))}."
        )
    flat = arrays["local"][session.rank if session.exchanges else 0]
    parts = np.split(flat, np.cumsum(_sizes(model))[:-1])
    for variable, part in zip(_local_variables(model), parts, strict=True):
        variable.assign(part.reshape(variable.shape).astype(variable.dtype))


def _sizes(model: Any) -> list[int]:
    return [int(np.prod(variable.shape)) for variable in _local_variables(model)]


def weight_shapes(model: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Path and shape of each of the model's weights, by their names in checkpoints; empty while it is not built."""
    return (
        {f"w{i}": (variable.path, tuple(variable.shape)) for i, variable in enumerate(model.weights)} if model.built else {}
    )


def _seeds(model: Any) -> list[Any]:
    return [variable for variable in model.variables if variable.name == "seed_generator_state"]


def _shared_variables(model: Any) -> dict[str, Any]:
    optimizers = [variable for optimizer in optimizers_of(model) for variable in optimizer.variables]
    groups = {"w": model.weights, "o": optimizers, "s": _seeds(model)}
    return {f"{letter}{i}": variable for letter, group in groups.items() for i, variable in enumerate(group)}


def _local_variables(model: Any) -> list[Any]:
    """Batch statistics differ between ranks until they are averaged at the epoch's end; metrics until they are merged."""
    return [v for v in model.non_trainable_weights if "float" in v.dtype] + list(model.metrics_variables)


def give_back(model: Any, weights: Sequence[Any], optimizer_state: Sequence[Any]) -> None:
    """Write what was trained into the caller's model, whose weights have these shapes."""
    set_weights(model, weights)
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    if len(optimizer_state) == len(model.optimizer.variables):
        for variable, value in zip(model.optimizer.variables, optimizer_state, strict=True):
            variable.assign(value)
    else:
        logger.warning("The optimizer's state is not taken over: it has other variables here than on the workers.")
