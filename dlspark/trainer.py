"""Trainer: validate, prepare the inputs, build one job, launch it with restarts, give the weights back."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import Any

from dlspark._require import choice, whole_number
from dlspark.backend import Backend
from dlspark.data import ShardedRows
from dlspark.driver import EventLog, as_rows, checks, runs, take_model
from dlspark.errors import ConfigError, WorkerError
from dlspark.job import (
    IDENTITY_FILE,
    MODEL_FILE,
    PAYLOAD_FILE,
    FitResult,
    GivenModel,
    JobSettings,
    TrainJob,
    Verbosity,
    load_job,
)
from dlspark.registry import load_backend
from dlspark.storage import Checkpoints, Store, lease
from dlspark.timeouts import Timeouts
from dlspark.wire import messages
from dlspark.worker import (
    build,
    check_exact,
    check_mergeable,
    give_back,
    load_trained,
    pickled_payload,
    save_initial_weights,
    save_model,
    weight_shapes,
    weights_of,
)

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.5


class Trainer:
    """Trains Keras 3 models on the workers of a backend.

    Args:
        backend: name of an installed backend (``available_backends()`` lists them).
        num_workers: the world size. Nothing else changes with it: ``batch_size`` is global and learning rates are never
            scaled.
        options: the backend's options by name, or an instance of its ``options_type``.
        store: folder or URI for this trainer's runs, which all workers must reach. A run keeps its checkpoints and events
            there; calling the same ``fit`` again resumes it. None uses a temporary folder, and nothing can be resumed.
        max_restarts: how often a run is restarted from its last checkpoint after a worker has failed.
        timeouts: `Timeouts`, or seconds by name: the bounds of every wait.
        checkpoint_steps: save a checkpoint every so many steps, in addition to the end of each epoch.

    Raises:
        ConfigError: an unknown backend, option or timeout, or an invalid number.
        MissingDependencyError: the backend is not installed.
    """

    def __init__(
        self,
        backend: str = "local",
        *,
        num_workers: int = 1,
        options: Mapping[str, Any] | Any | None = None,
        store: str | PathLike[str] | None = None,
        max_restarts: int = 0,
        timeouts: Mapping[str, float] | Timeouts | None = None,
        checkpoint_steps: int | None = None,
    ) -> None:
        num_workers = whole_number("num_workers", num_workers)
        max_restarts = whole_number("max_restarts", max_restarts, least=0)
        if checkpoint_steps is not None:
            checkpoint_steps = whole_number("checkpoint_steps", checkpoint_steps)
            if store is None and not max_restarts:
                raise ConfigError("checkpoint_steps needs a store to keep checkpoints in, or max_restarts to use them.")
        self.num_workers = num_workers
        self.store = store
        self.max_restarts = max_restarts
        self.timeouts = Timeouts.of(timeouts)
        self.checkpoint_steps = checkpoint_steps
        self._backend: Backend = load_backend(backend).from_options(options)
        most = self._backend.capabilities.max_workers
        if most is not None and num_workers > most:
            raise ConfigError(
                f"Expected num_workers of at most {most} for backend {backend!r}; got num_workers={num_workers}. Set "
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
        callbacks: Sequence[Any] | None = (),
        class_weight: Mapping[int, float] | None = None,
        verbose: Verbosity = "auto",
        resume: bool = True,
    ) -> FitResult:
        """Train the model on the workers.

        Validates everything, writes data and model to the run's folder, builds one job, launches it (again after a
        failure, if restarts are allowed), and copies the trained weights into the caller's model. On success the model
        holds the trained weights and the optimizer's state; on any failure it is bit-identical to before. Custom classes
        must be registered with ``keras.saving.register_keras_serializable``. A model that Keras cannot save (a Lambda
        layer, a subclass without a config) must be given as a builder.

        Args:
            model_or_builder: a compiled Keras model, or a function without arguments that returns one. A builder runs
                here and on every worker.
            data: a part of an ``ImageDataset``, ``(x, y)`` or ``(x, y, sample_weight)`` of NumPy arrays (x and y may be
                dicts or tuples of arrays), or a Spark DataFrame whose last column is the label. Arrays and DataFrames
                are written to the store first, a DataFrame by its executors. y is None for a model that needs no labels:
                one with its own ``train_step``, or compiled without a loss.
            validation_data: of the same kinds; evaluated after every epoch over all its rows.
            epochs: passes over the data.
            batch_size: the most rows that one step takes, over all workers. Steps are ceil(rows / batch_size).
            seed: of shuffling, dropout and augmentation. Dropout and augmentation draw differently on every rank.
            callbacks: Keras callbacks, or None. Workers run copies of them. ModelCheckpoint, CSVLogger, TensorBoard and
                callbacks with the attribute ``rank_zero_only = True`` run on rank 0 only; others run on every rank. Their
                logs are over all rows.
            class_weight: weight of the loss by class index; 1 for the others. Not together with sample weights.
            verbose: 0 silent, 1 live display, 2 plain lines, "auto" 1 on a terminal and 2 elsewhere.
            resume: resume the unfinished run of the same ``fit`` in the trainer's store, or give back the result and weights
                of a finished one with a warning. False begins a new run beside it.

        Raises:
            ConfigError, DataError: something cannot work. Raised before any job starts; also if another unfinished run in
                the store could be resumed.
            StoreError: the store cannot be read or written.
            MissingDependencyError: the backend lacks a package; the message has the command that installs it.
            WorkerError: a worker failed more often than ``max_restarts`` allows.
            RunInterruptedError: the process received SIGTERM. With a store, the run can be resumed.
        """
        started = time.perf_counter()
        epochs = whole_number("epochs", epochs)
        batch_size = whole_number("batch_size", batch_size)
        seed = checks.seed(seed, self.num_workers)
        choice("verbose", verbose, ("auto", 0, 1, 2))
        resume = checks.flag("resume", resume)
        callbacks = checks.callbacks(callbacks, self.num_workers)
        builder, model = take_model(model_or_builder, seed)
        if self.num_workers > 1:
            check_mergeable(model)
            checks.batch_norm(model, self._backend.name, synchronous=self._backend.capabilities.synchronous_gradients)
        checks.rows("data", data, model, batch_size, self.num_workers)
        if validation_data is not None:
            checks.rows("validation_data", validation_data, model, batch_size, self.num_workers)
            checks.validation(data, validation_data)
        class_weight, data = checks.class_weight(class_weight, model, data)
        payload = pickled_payload(builder, callbacks, model)

        import keras

        settings = JobSettings(
            num_workers=self.num_workers,
            epochs=epochs,
            batch_size=batch_size,
            seed=seed,
            class_weight=class_weight,
            keras_backend=keras.backend.backend(),
            verbose=verbose,
            from_builder=builder is not None,
            dtype_policy=keras.config.dtype_policy().name,
            timeouts=self.timeouts,
            checkpoints=self._backend.capabilities.resumable and (self.store is not None or self.max_restarts > 0),
            checkpoint_steps=self.checkpoint_steps,
            keep_events=self.store is not None,
        )

        def identity() -> runs.Identity:
            backend = self._backend
            return runs.identity(settings, backend.name, backend.options, model, data, validation_data, callbacks)

        with self._run_folder(identity, resume=resume) as (store, resumed):
            done = runs.finished(store) if resumed else None
            if done is not None:
                if not model.built:
                    build(model, load_job(store.uri).train)
                trained = load_trained(store)
                _check_shapes(model, trained)
                return _with_weights(done, model, trained)
            self._backend.check(settings, store.uri)
            store.write_bytes(PAYLOAD_FILE, payload)
            if resumed:
                job = _resumed_job(settings, store, model)
            else:
                exchanges = self.num_workers > 1 and self._backend.capabilities.synchronous_gradients
                job = _new_job(settings, store, model, data, validation_data, exchanges=exchanges)
            job.save()
            preparation_seconds = time.perf_counter() - started
            result = self._launch_with_restarts(job, store, model)
            trained = load_trained(store)
            result = dataclasses.replace(
                result,
                time_to_first_step_seconds=result.time_to_first_step_seconds + preparation_seconds,
                resumed_from=job.resume_from,
            )
            _check_shapes(model, trained)
            if self.store is not None:
                runs.finish(store, result)
        return _with_weights(result, model, trained)  # last: whatever fails before leaves the model as it was

    def _launch_with_restarts(self, job: TrainJob, store: Store, model: Any) -> FitResult:
        """Run the job, and run it again from its last checkpoint after a failure, at most ``max_restarts`` times."""
        restarts = 0
        while True:
            try:
                return dataclasses.replace(self._backend.fit(job), restarts=restarts)
            except WorkerError as error:
                if restarts >= self.max_restarts or not error.retryable:
                    raise
                restarts += 1
                latest = Checkpoints(store).latest(weight_shapes(model))
                logger.warning(
                    "%s\nRestart %d of %d, from %s.",
                    str(error).splitlines()[0],
                    restarts,
                    self.max_restarts,
                    f"checkpoint {latest}" if latest else "the beginning",
                )
            finally:
                self._backend.close()
            job = dataclasses.replace(job, resume_from=latest)
            if job.keep_events:
                with EventLog(store) as events:
                    events.add(messages.Restarted(rank=None, number=restarts, from_=latest))
            job.save()
            self._wait_until_possible(job)

    def _wait_until_possible(self, job: TrainJob) -> None:
        """Wait until the cluster has replaced the executors that it lost."""
        deadline = time.monotonic() + self.timeouts.launch_seconds
        while True:
            try:
                return self._backend.check(job, job.uri)
            except ConfigError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(_POLL_SECONDS)

    @contextmanager
    def _run_folder(self, identity: Callable[[], runs.Identity], *, resume: bool) -> Iterator[tuple[Store, bool]]:
        """Yield the run's folder, in the user's store or a temporary one, and whether its run is resumed."""
        if self.store is None:
            with tempfile.TemporaryDirectory(prefix="dlspark-") as folder:
                yield Store(folder), False
            return
        store, mine = Store(self.store), identity()
        found = runs.find(store, mine) if resume else None
        run = found or runs.new(store)
        try:
            with lease(run):
                if found is None:
                    run.write_json(IDENTITY_FILE, mine)
                yield run, found is not None
        except BaseException:
            runs.forget_if_refused(run)
            raise


def _check_shapes(model: Any, trained: Mapping[str, Any]) -> None:
    if [tuple(w.shape) for w in weights_of(trained)] != [tuple(v.shape) for v in model.weights]:
        raise ConfigError(
            "Expected the model to keep its shapes during fit; got trained weights of other shapes. Do not change the model "
            "while it trains."
        )


def _with_weights(result: FitResult, model: Any, trained: Mapping[str, Any]) -> FitResult:
    """The result with the trained model: the caller's, which takes the weights and the state of its optimizers."""
    give_back(model, trained)
    return dataclasses.replace(result, weights=model.get_weights(), model=model)


def _new_job(
    settings: JobSettings, store: Store, model: Any, data: Any, validation_data: Any, *, exchanges: bool
) -> TrainJob:
    """Write data and model into a new run's folder and return the job that names them."""
    limits = {"batch_size": settings.batch_size, "num_workers": settings.num_workers}
    train = as_rows("data", data, store, "train", model, **limits)
    validation = None
    if validation_data is not None:
        validation = as_rows("validation_data", validation_data, store, "val", model, **limits)
    unbuilt = not model.built
    given = _prepare_model(settings, store, model, train)
    for name, rows in (("data", data), ("validation_data", validation_data)):
        if unbuilt and rows is not None:  # only now its inputs and outputs are known
            checks.fits(name, rows, model)
    if exchanges:
        check_exact(model, train)
    return TrainJob(**vars(settings), uri=store.uri, train=train, validation=validation, given=given)


def _resumed_job(settings: JobSettings, store: Store, model: Any) -> TrainJob:
    """The job of an unfinished run: its data and model, its newest checkpoint, and these settings.

    Raises:
        DataError: none of its checkpoints fits the model.
    """
    before = load_job(store.uri)
    given = _prepare_model(settings, store, model, before.train) or before.given
    latest = Checkpoints(store).latest(weight_shapes(model))
    if latest:
        logger.warning("Resuming the run in %s from checkpoint %s.", store.uri, latest)
    return dataclasses.replace(before, **vars(settings), uri=store.uri, given=given, resume_from=latest)


def _prepare_model(settings: JobSettings, store: Store, model: Any, rows: ShardedRows) -> GivenModel | None:
    """Write the model, unless the run has it already; returns what its file does not hold."""
    if not model.built:
        build(model, rows)
    if settings.from_builder:
        save_initial_weights(store, model)
    elif not store.exists(MODEL_FILE):  # it is new, or a builder began it
        return save_model(store, model)
    return None
