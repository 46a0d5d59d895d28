"""Trainer: checks what it is given, puts a job into the store, asks the backend, and gives the weights back."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import Any

import cloudpickle

from dlspark import _checks
from dlspark.attach import check_mergeable
from dlspark.backend import Backend
from dlspark.data.shards import ShardedRows
from dlspark.errors import ConfigError, DataError
from dlspark.job import JOB_FILE, MODEL_FILE, PAYLOAD_FILE, FitResult, TrainJob, Verbosity
from dlspark.registry import load_backend
from dlspark.store import Store
from dlspark.worker import Payload, build, load_trained, set_weights

logger = logging.getLogger(__name__)


class Trainer:
    """Trains Keras 3 models on the workers of a backend.

    Args:
        backend: name of an installed backend (``available_backends()`` lists them).
        num_workers: the world size. Nothing else has to change with it: ``batch_size`` is global and learning rates are
            never scaled.
        options: the backend's options by name, or an instance of its ``options_type``.
        store: folder or URI for this trainer's runs, which all workers must reach. None means a temporary folder.

    Raises:
        ConfigError: an unknown backend or option, or a number of workers that is not one.
        MissingDependencyError: a backend that is not installed.
    """

    def __init__(
        self,
        backend: str = "local",
        *,
        num_workers: int = 1,
        options: Mapping[str, Any] | Any | None = None,
        store: str | PathLike[str] | None = None,
        max_restarts: int = 0,
        timeouts: Any = None,
    ) -> None:
        _checks.whole_number("num_workers", num_workers)
        if max_restarts or timeouts is not None:
            raise ConfigError("max_restarts and timeouts are not available yet. Leave them out.")
        self.num_workers = num_workers
        self.store = store
        self._backend: Backend = load_backend(backend).from_options(options)
        most = self._backend.capabilities.max_workers
        if most is not None and num_workers > most:
            raise ConfigError(
                f"Backend {backend!r} runs at most {most} worker{'s' * (most > 1)}; num_workers={num_workers} came. Set "
                f"num_workers={most}, or choose a backend that runs on Spark, such as 'mirrored'."
            )

    def fit(
        self,
        model_or_builder: Any,
        data: Any,
        *,
        validation_data: Any = None,
        epochs: int = 1,
        batch_size: int = 32,
        seed: int = 0,
        callbacks: Sequence[Any] = (),
        class_weight: Mapping[int, float] | None = None,
        verbose: Verbosity = "auto",
        resume: bool = True,
    ) -> FitResult:
        """Train, and give the trained weights to the caller's model.

        On success the model holds the trained weights and the optimizer's state. On any failure it is bit-identical to
        what it was. Custom classes must be registered with ``keras.saving.register_keras_serializable``; a model that
        Keras cannot save (a Lambda layer, a subclass without a config) is given as a builder.

        Args:
            model_or_builder: a compiled Keras model, or a function without arguments that returns one. A builder runs
                here and on every worker.
            data: a part of an ``ImageDataset``, ``(x, y)`` or ``(x, y, sample_weight)`` of NumPy arrays (x and y may be
                dicts or tuples of arrays), or a Spark DataFrame whose last column is the label. Arrays and DataFrames
                are written to the store first, a DataFrame by its executors.
            validation_data: of the same kinds; evaluated after every epoch over all its rows.
            epochs: passes over the data.
            batch_size: the most rows that one step takes, over all workers. Steps are ceil(rows / batch_size).
            seed: of shuffling, dropout and augmentation. The latter two draw differently on every rank.
            callbacks: Keras callbacks. Workers run copies of them: ModelCheckpoint, CSVLogger, TensorBoard and those with
                an attribute ``rank_zero_only = True`` on rank 0 only, others on every rank, with logs over all rows.
            class_weight: weight of the loss by class index.
            verbose: 0 silent, 1 live display, 2 plain lines, "auto" whichever fits where stderr goes.
            resume: no run is resumed yet; every fit starts from the model's weights.

        Raises:
            ConfigError, DataError: something cannot work; found before any job starts.
            WorkerError: a worker failed.
        """
        started = time.perf_counter()
        _checks.whole_number("epochs", epochs)
        _checks.whole_number("batch_size", batch_size)
        _checks.whole_number("seed", seed, least=0)
        _checks.choice("verbose", verbose, ("auto", 0, 1, 2))
        _checks.callbacks(callbacks, self.num_workers)
        builder, model = _take_model(model_or_builder, seed)
        if self.num_workers > 1:
            check_mergeable(model)
        _checks.rows("data", data, model, batch_size, self.num_workers)
        if validation_data is not None:
            _checks.rows("validation_data", validation_data, model, batch_size, self.num_workers)
        _checks.class_weight(class_weight, model)

        with self._run_store() as store:
            import keras

            job = TrainJob(
                uri=store.uri,
                num_workers=self.num_workers,
                epochs=epochs,
                batch_size=batch_size,
                seed=seed,
                train=_NOT_YET,
                class_weight=class_weight,
                keras_backend=keras.backend.backend(),
                verbose=verbose,
                from_builder=builder is not None,
                dtype_policy=keras.config.dtype_policy().name,
            )
            self._backend.check(job)
            payload = _pickled_payload(builder, model, callbacks)
            job = dataclasses.replace(
                job,
                train=_as_rows("data", data, store, "train", model),
                validation=None
                if validation_data is None
                else _as_rows("validation_data", validation_data, store, "val", model),
            )
            for name, rows in (("data", job.train), ("validation_data", job.validation)):
                if rows is not None:
                    _checks.rows(name, rows, model, batch_size, self.num_workers)
            if not model.built:
                build(model, job)
                payload = _pickled_payload(builder, model, callbacks)
            if builder is None:
                _save_model(store, model)
            store.write_bytes(PAYLOAD_FILE, payload)
            store.write_bytes(JOB_FILE, cloudpickle.dumps(job))
            preparation_seconds = time.perf_counter() - started
            try:
                result = self._backend.fit(job)
            finally:
                self._backend.close()
            weights, optimizer_state = load_trained(store)
            _give_back(model, weights, optimizer_state)
        return dataclasses.replace(
            result,
            time_to_first_step_seconds=result.time_to_first_step_seconds + preparation_seconds,
            weights=model.get_weights(),
            model=model,
        )

    @contextmanager
    def _run_store(self) -> Iterator[Store]:
        """A folder for one run: in the user's store, where it stays, or a temporary one, which goes."""
        if self.store is not None:
            yield Store(self.store).child(f"run-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:8]}")
            return
        with tempfile.TemporaryDirectory(prefix="dlspark-") as folder:
            yield Store(folder)


_NOT_YET = ShardedRows(uri="", files=(), rows_per_file=(), x="x", y="y")


def _take_model(model_or_builder: Any, seed: int) -> tuple[Callable[[], Any] | None, Any]:
    """(builder or None, compiled model)."""
    import keras

    builder: Callable[[], Any] | None = None
    model = model_or_builder
    if not isinstance(model, keras.Model):
        if not callable(model):
            raise ConfigError(
                f"fit needs a compiled Keras model or a function that builds one; a {type(model).__name__} came."
            )
        builder = model
        keras.utils.set_random_seed(seed)
        model = model()
        if not isinstance(model, keras.Model):
            raise ConfigError(f"The builder must return a compiled Keras model; it returned a {type(model).__name__}.")
    if not model.compiled or model.optimizer is None:
        raise ConfigError("The model is not compiled. Call model.compile(optimizer=…, loss=…) before fit.")
    return builder, model


def _pickled_payload(builder: Any, model: Any, callbacks: Sequence[Any]) -> bytes:
    """The payload, pickled by value.

    Raises:
        ConfigError: something cannot be pickled; it is named.
    """
    import keras

    named = [("The builder", builder), *((f"Callback {type(c).__name__}", c) for c in callbacks)]
    for name, value in named:
        try:
            cloudpickle.dumps(value)
        except Exception as error:  # pickling runs the object's own code: anything may come out
            raise ConfigError(
                f"{name} cannot be sent to workers: {type(error).__name__}: {error}. Keep locks, files, sessions and "
                "models out of it; open them where it runs (in on_train_begin, or inside the builder)."
            ) from error
    weights = tuple(model.get_weights()) if builder is not None else ()
    payload = Payload(
        callbacks=tuple(callbacks),
        builder=builder,
        custom_objects=dict(keras.saving.get_custom_objects()),
        initial_weights=weights,
        optimizer_built=bool(model.optimizer.built),
    )
    return cloudpickle.dumps(payload)


def _save_model(store: Store, model: Any) -> None:
    import keras

    with store.open_writer(MODEL_FILE) as path:
        model.save(path)
        # Classes of the user's own may be unregistered, and Lambda layers are refused: better said here than by a worker.
        if any(not type(layer).__module__.startswith("keras.") for layer in [model, *model.layers]) or any(
            isinstance(layer, keras.layers.Lambda) for layer in model.layers
        ):
            try:
                keras.saving.load_model(path, safe_mode=True)
            except Exception as error:  # Keras raises many kinds here
                raise ConfigError(
                    f"The model cannot be sent to workers as a .keras file: {error} Register its classes with "
                    "keras.saving.register_keras_serializable, or give fit a function that builds and compiles the model."
                ) from error


def _as_rows(name: str, data: Any, store: Store, part: str, model: Any) -> ShardedRows:
    """``data`` as shards: as they are, or written to the store."""
    if isinstance(data, ShardedRows):
        return data
    if isinstance(data, tuple | list):
        from dlspark.data.shard_writer import write_rows

        return write_rows(store.child("data"), part, *data)
    if _checks.is_dataframe(data):
        from dlspark.data.from_spark import write_dataframe

        *features, label = data.columns
        if not features:
            raise DataError(f"{name} needs feature columns and, last, the label column; it has only {data.columns}.")
        _checks.dataframe_labels(name, data, model)
        columns = features[0] if len(features) == 1 else features
        return write_dataframe(store.child("data"), part, data, features=columns, label=label)
    raise DataError(
        f"{name} must be a part of an ImageDataset, a tuple (x, y) of NumPy arrays or a Spark DataFrame; "
        f"a {type(data).__name__} came."
    )


def _give_back(model: Any, weights: Sequence[Any], optimizer_state: Sequence[Any]) -> None:
    """Write what was trained into the caller's model, all or nothing as far as shapes go."""
    if [tuple(w.shape) for w in weights] != [tuple(v.shape) for v in model.weights]:
        raise ConfigError("The trained weights do not fit the model: it was changed while it was being trained.")
    set_weights(model, weights)
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    if len(optimizer_state) == len(model.optimizer.variables):
        for variable, value in zip(model.optimizer.variables, optimizer_state, strict=True):
            variable.assign(value)
    else:
        logger.warning("The optimizer's state is not taken over: it has other variables here than on the workers.")
