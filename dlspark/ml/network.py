"""Networks for predictions in executors: shipped as a .keras file, and loaded once in each Python worker."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cloudpickle
import numpy as np
from numpy.typing import NDArray

from dlspark.errors import ConfigError, did_you_mean
from dlspark.mends import tensorflow_context
from dlspark.mends.tensorflow_start_up import without_noise
from dlspark.model_files import check_model_file, load_model
from dlspark.worker import WorkerSession, describe_device, environment, own_threads

if TYPE_CHECKING:
    import keras
    from pyspark import Broadcast, SparkContext

Predict = Callable[[NDArray[Any]], NDArray[np.float32]]
"""From inputs of shape (rows, …) to float32 of shape (rows, values); outputs of more axes are flattened, row-major."""

_KEPT = 4  # networks that a Python worker keeps: a task of an ensemble uses several
_kept: OrderedDict[tuple[str, int], Predict] = OrderedDict()


@dataclass(frozen=True, eq=False)
class Network:
    """A network as the bytes of its ``.keras`` file. It has one input and one output.

    Attributes:
        data: the file.
        input_shape: of one row; None for a variable size.
    """

    data: bytes = field(repr=False)
    input_shape: tuple[int | None, ...]
    _shipped: dict[str, Any] = field(default_factory=dict, repr=False)

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of ``data`` in hexadecimal."""
        return hashlib.sha256(self.data).hexdigest()

    @classmethod
    def of(cls, model: Any, output: Any = None) -> Network:
        """The network of a model, captured now; later changes of the model have no effect.

        Args:
            model: a `Network`, a Keras model, a `FitResult`, or the path or URI of a ``.keras`` file. Its compilation and
                the state of its optimizer are left out.
            output: a tensor inside the model, used as the output.

        Raises:
            ConfigError: another type; a model without one input and one output that Keras knows; a model or a file that
                `dlspark.model_files.load_model` rejects: with Lambda layers, or with unregistered classes.
            DataError: the file does not exist.
        """
        if isinstance(model, Network):
            return model
        if isinstance(model, (str, os.PathLike)):
            model = load_model(model, compiled=False)
        import keras

        trained = getattr(model, "model", None)  # a FitResult's
        if not isinstance(model, keras.Model) and isinstance(trained, keras.Model):
            model = trained
        return cls._saved(predicting(model, output))

    @classmethod
    def from_bytes(cls, data: bytes) -> Network:
        """The network of the content of a ``.keras`` file, checked as by `dlspark.model_files.load_model`."""
        return cls(data, _input_shape(_load(data)))

    def model(self) -> keras.Model:
        """A new, uncompiled Keras model of this network."""
        return _load(self.data)

    def cut(self, layer: str) -> Network:
        """The part of this network up to the output of a layer.

        Raises:
            ConfigError: an unknown layer, or one with several outputs.
        """
        model = self.model()
        return self.of(model, output_of(model, layer))

    @classmethod
    def _saved(cls, model: keras.Model) -> Network:
        import keras

        with tempfile.TemporaryDirectory(prefix="dlspark-") as folder:
            path = Path(folder, "network.keras")
            model.save(path)
            # Reject here what executors would reject: Lambda layers and unregistered classes.
            check_model_file(path, model.name, registered=keras.saving.get_custom_objects())
            data = path.read_bytes()
        return cls(data, _input_shape(model))

    def shipped(self, context: SparkContext) -> Broadcast[Predict]:
        """A broadcast whose value in an executor is the network's `Predict`. Each Spark context has one."""
        application = context.applicationId
        if application not in self._shipped:
            self._shipped.clear()
            self._shipped[application] = context.broadcast(_Shipment(self))
        return self._shipped[application]


class _Shipment:
    """Unpickles to a `Predict`, so that a Python worker does not also keep the bytes of the file."""

    def __init__(self, network: Network) -> None:
        self._network = network

    def __reduce__(self) -> tuple[Any, ...]:
        import keras

        objects = cloudpickle.dumps(dict(keras.saving.get_custom_objects()))
        return _arrived, (self._network.digest, self._network.data, keras.backend.backend(), objects)


def _arrived(digest: str, data: bytes, keras_backend: str, custom_objects: bytes) -> Predict:
    """Load the network on the device and threads that Spark gave the task. The task owns its GPUs."""
    key = (digest, tensorflow_context.generation())
    if key not in _kept:
        with environment(KERAS_BACKEND=keras_backend), without_noise():
            import keras
        if keras.backend.backend() != keras_backend:
            raise ConfigError(
                f"The driver uses the Keras backend {keras_backend!r}; this Python worker has already loaded Keras with "
                f"{keras.backend.backend()!r}. Start a new Spark session."
            )
        if not any(generation == key[1] for _, generation in _kept):
            _own_device(keras_backend)
            key = (digest, tensorflow_context.generation())
        keras.saving.get_custom_objects().update(cloudpickle.loads(custom_objects))
        _kept[key] = _compiled(_load(data))
    _kept.move_to_end(key)
    while len(_kept) > _KEPT:
        _kept.popitem(last=False)
    return _kept[key]


def _own_device(keras_backend: str) -> None:
    """Configure threads and GPU before the first network is loaded, also after a training has reset the context."""
    from pyspark import TaskContext

    _kept.clear()
    threads = TaskContext.get().cpus()
    if keras_backend == "tensorflow":
        import tensorflow as tf

        tensorflow_context.reset()  # a training in this Python worker may have set another number of threads
        own_threads(threads)
        for gpu in tf.config.list_physical_devices("GPU"):
            # A task with two stages has two Python workers on one GPU: neither may allocate all its memory.
            tf.config.experimental.set_memory_growth(gpu, True)
    elif keras_backend == "torch":
        import torch

        torch.set_num_threads(threads)
    describe_device(WorkerSession(threads=threads, needs_gpu=bool(os.environ.get("CUDA_VISIBLE_DEVICES"))))


def _compiled(model: keras.Model) -> Predict:
    import keras

    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        # predict_on_batch would trace again for the last rows of each partition; here the number of rows is variable.
        @cache
        def traced(kind: np.dtype[Any]) -> Any:
            signature = [tf.TensorSpec(model.inputs[0].shape, kind)]
            return tf.function(lambda rows: model(rows, training=False), input_signature=signature)

        predict: Callable[[Any], Any] = lambda rows: traced(rows.dtype)(tf.convert_to_tensor(rows)).numpy()  # noqa: E731
    else:
        predict = model.predict_on_batch
    return lambda rows: np.asarray(predict(rows), np.float32).reshape(len(rows), -1)


def output_of(model: keras.Model, layer: str) -> Any:
    """The output of a layer inside ``model``. For a layer that is called several times, of its first call.

    Keras has no public access to the other calls.

    Raises:
        ConfigError: an unknown layer, one with several outputs, or one that is not connected.
    """
    import keras

    names = [each.name for each in model.layers]
    if layer not in names:
        raise ConfigError(f"The model has no layer {layer!r}. {did_you_mean(layer, names)}")
    try:
        found = keras.Operation.output.fget(model.get_layer(layer))  # ``output`` of a nested model is outside of this one
    except (AttributeError, ValueError) as error:  # of Keras: not connected
        raise ConfigError(f"The model cannot be cut at layer {layer!r}: {error}") from error
    if not isinstance(found, keras.KerasTensor):
        raise ConfigError(f"Expected a layer with one output; {layer!r} has {len(found)}.")
    return found


def takes_images(input_shape: tuple[int | None, ...]) -> bool:
    """Whether rows of this shape are RGB images."""
    return len(input_shape) == 3 and input_shape[2] == 3


def _load(data: bytes) -> keras.Model:
    with tempfile.TemporaryDirectory(prefix="dlspark-") as folder:
        path = Path(folder, "network.keras")
        path.write_bytes(data)
        return load_model(path, compiled=False)


def predicting(model: Any, output: Any = None) -> keras.Model:
    """``model`` from its input to ``output``, uncompiled: the optimizer and metrics are not shipped.

    Raises:
        ConfigError: another type, or a model without one input and one output that Keras knows, for any number of rows.
    """
    import keras

    if not isinstance(model, keras.Model):
        raise ConfigError(f"Expected a Keras model, a FitResult or a .keras file as model; got a {type(model).__name__}.")
    inputs = getattr(model, "inputs", None) or []
    outputs = (getattr(model, "outputs", None) or []) if output is None else keras.tree.flatten(output)
    if len(inputs) != 1 or len(outputs) != 1:
        raise ConfigError(
            f"Expected a model with one input and one output; {model.name!r} has {len(inputs)} and {len(outputs)} that "
            "Keras knows. Build a functional or sequential model of the part that you need."
        )
    if inputs[0].shape[0] is not None:
        raise ConfigError(f"Expected a model for any number of rows; {model.name!r} takes {inputs[0].shape[0]}.")
    return keras.Model(inputs[0], outputs[0], name=model.name)


def _input_shape(model: keras.Model) -> tuple[int | None, ...]:
    return tuple(model.inputs[0].shape[1:])
