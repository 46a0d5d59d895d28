"""What only Python can carry to the workers, pickled by value into the store: callbacks, builder and custom objects.

A callback may refer to the model that is trained, or to its layers, variables, optimizers and metrics. The pickle has such
a reference by position, and in a worker it becomes the same part of the worker's model.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping, Sequence, Set
from types import MappingProxyType
from typing import Any

import cloudpickle

from dlspark.errors import ConfigError
from dlspark.job import PAYLOAD_FILE, TrainJob
from dlspark.mends import keras_tracked
from dlspark.mends.keras_compiled_metrics import compiled_metrics
from dlspark.storage import Store
from dlspark.worker.model_parts import optimizers_of, parts_of


class Payload:
    """The user's builder and custom objects, and the callbacks once there is a model.

    Attributes:
        builder: the function that builds the model, or None.
        custom_objects: Keras' registered custom objects by name.
    """

    def __init__(self, pickled: bytes) -> None:
        # Two pickles of one pickler, so that they may share objects; the second one needs the model.
        self._unpickler = _Unpickler(io.BytesIO(pickled))
        self.builder, self.custom_objects = self._unpickler.load()

    def callbacks_for(self, model: Any) -> tuple[Any, ...]:
        """The callbacks, which refer to the parts of ``model``. Can be called once."""
        self._unpickler.parts = parts_of(model)
        callbacks: tuple[Any, ...] = self._unpickler.load()
        return callbacks


def load_payload(job: TrainJob) -> Payload:
    """The job's payload. It may import Keras: call it where the Keras backend has been chosen."""
    return Payload(Store(job.uri).read_bytes(PAYLOAD_FILE))


def pickled_payload(builder: Callable[[], Any] | None, callbacks: Sequence[Any], model: Any) -> bytes:
    """Pickle the payload of a run; ``model`` is the built model that is trained.

    Raises:
        ConfigError: an object cannot be pickled; the message names it.
    """
    import keras

    custom_objects = dict(keras.saving.get_custom_objects())
    try:
        return _pickled(model, (builder, custom_objects), tuple(callbacks))
    except Exception as error:  # pickling runs the object's own code: anything may be raised
        parts = [("The builder", builder), *((f"Callback {type(c).__name__}", c) for c in callbacks)]
        name = next((name for name, part in parts if not _pickles(model, part)), "A registered custom object")
        if isinstance(error, ConfigError):
            raise ConfigError(f"{name} cannot be sent to workers: {error}") from error
        raise ConfigError(
            f"{name} cannot be sent to workers: {type(error).__name__}: {error}. Do not store locks, files, sessions or "
            "other models in it; open them where it runs (in on_train_begin, or inside the builder)."
        ) from error


def _pickled(model: Any, first: Any, callbacks: Any) -> bytes:
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(first)
    positions: dict[int, tuple[Any, ...]] = {}
    for position, part in parts_of(model).items():
        positions[id(part)] = (*positions.get(id(part), ()), position)
    pickler.positions = positions
    built = [*model.variables, *model.metrics_variables, *compiled_metrics(model)]
    pickler.model_has = {id(part) for part in built} | {id(v) for each in optimizers_of(model) for v in each.variables}
    pickler.dump(callbacks)
    return file.getvalue()


def _pickles(model: Any, value: Any) -> bool:
    try:
        _pickled(model, None, value)
    except Exception:  # as above; the first error of all is the one that is raised
        return False
    return True


class _Pickler(cloudpickle.Pickler):
    """Pickles the parts of a model by their ``positions``."""

    positions: Mapping[int, tuple[Any, ...]] = MappingProxyType({})
    model_has: Set[int] = frozenset()

    def persistent_id(self, value: Any) -> tuple[Any, ...] | None:
        position = self.positions.get(id(value))
        if position is None and id(value) in self.model_has:
            raise ConfigError(
                f"the {type(value).__name__} {value.name!r} belongs to the model that is trained, and workers cannot find "
                "it in theirs. Take it from self.model, in on_train_begin or later."
            )
        if position is None and type(value).__module__ != "builtins" and _is_layer(value):
            shared = next((variable for variable in value.variables if id(variable) in self.positions), None)
            if shared is not None:  # it would become a copy, which nobody trains
                raise ConfigError(
                    f"the {type(value).__name__} {value.name!r} shares the variable {shared.path} with the model that is "
                    "trained. Build it from self.model, in on_train_begin."
                )
        return position

    def reducer_override(self, value: Any) -> Any:
        # Keras' lists and dicts of layers or variables cannot be pickled without the model that tracks them.
        return keras_tracked.as_plain(value) or super().reducer_override(value)


def _is_layer(value: Any) -> bool:
    import keras

    return isinstance(value, keras.layers.Layer)


class _Unpickler(pickle.Unpickler):
    parts: Mapping[tuple[str, int], Any] = MappingProxyType({})

    def persistent_load(self, positions: Any) -> Any:
        found = {id(part): part for part in map(self.parts.get, positions) if part is not None}
        if not found:
            kind, number = positions[0]
            raise ConfigError(f"Expected a model with the {kind} {number}, to which a callback refers; it has none.")
        if len(found) > 1:  # a file does not keep that layers share one regularizer
            places = ", ".join(kind for kind, _ in positions)
            raise ConfigError(
                f"Expected one object for each part of the model to which a callback refers; {places} are one, and several "
                "in a worker's model. Give each its own, or change them through self.model."
            )
        return next(iter(found.values()))
