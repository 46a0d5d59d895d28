"""Trainer: checks what it is given, puts a job into the store, asks the backend, and gives the weights back."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import Any

import cloudpickle

from dlspark._require import choice, whole_number
from dlspark.backend import Backend
from dlspark.data import ShardedRows
from dlspark.driver import EventLog, as_rows, checks, pickled_payload, runs, save_model, take_model
from dlspark.errors import ConfigError, WorkerError
from dlspark.job import JOB_FILE, PAYLOAD_FILE, FitResult, TrainJob, Verbosity, load_job, versions
from dlspark.registry import load_backend
from dlspark.storage import Checkpoints, Store, checksum, lease
from dlspark.timeouts import Timeouts
from dlspark.wire import messages
from dlspark.worker import build, check_mergeable, give_back, load_trained, weight_shapes

logger = logging.getLogger(__name__)


class Trainer:
    """Trains Keras 3 models on the workers of a backend.

    Args:
        backend: name of an installed backend (``available_backends()`` lists them).
        num_workers: the world size. Nothing else has to change with it: ``batch_size`` is global and learning rates are
            never scaled.
        options: the backend's options by name, or an instance of its ``options_type``.
        store: folder or URI for this trainer's runs, which all workers must reach. A run keeps its checkpoints and events
            there, and goes on from them when the same fit is called again. None means a temporary folder, and nothing to
            resume from.
        max_restarts: how often a fit starts again, from its last checkpoint, after a worker has failed.
        timeouts: `Timeouts`, or seconds by name: the bounds of every wait.
        checkpoint_steps: leave a checkpoint every so many steps too, not at the ends of epochs alone.

    Raises:
        ConfigError: an unknown backend, option or timeout, or a number that is not one.
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
            resume: go on with the run of the trainer's store that was begun by the same fit and did not finish. False begins
                a new run beside the older ones.

        Raises:
            ConfigError, DataError: something cannot work; found before any job starts. Also when this very run has finished
                already, and when another run waits to be resumed.
            StoreError: the store cannot be read or written.
            MissingDependencyError: the backend lacks a package; the message has the command that installs it.
            WorkerError: a worker failed, more often than ``max_restarts`` allows.
            RunInterruptedError: SIGTERM came. The run can be resumed, if the trainer has a store.
        """
        started = time.perf_counter()
        epochs = whole_number("epochs", epochs)
        batch_size = whole_number("batch_size", batch_size)
        seed = whole_number("seed", seed, least=0)
        choice("verbose", verbose, ("auto", 0, 1, 2))
        checks.callbacks(callbacks, self.num_workers)
        builder, model = take_model(model_or_builder, seed)
        if self.num_workers > 1:
            check_mergeable(model)
        checks.rows("data", data, model, batch_size, self.num_workers)
        if validation_data is not None:
            checks.rows("validation_data", validation_data, model, batch_size, self.num_workers)
        checks.class_weight(class_weight, model)

        import keras

        job = TrainJob(
            uri="",
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
            timeouts=self.timeouts,
            checkpoints=self._backend.capabilities.resumable and (self.store is not None or self.max_restarts > 0),
            checkpoint_steps=self.checkpoint_steps,
            keep_events=self.store is not None,
        )
        with self._run(lambda: self._identity(job, model, data, validation_data, callbacks), resume=resume) as (
            store,
            resumed,
        ):
            job = dataclasses.replace(job, uri=store.uri)
            payload = pickled_payload(builder, model, callbacks)  # first: it needs no session
            self._backend.check(job)
            if resumed:
                job = self._as_it_was(job, store, model)
            else:
                job = dataclasses.replace(
                    job,
                    train=as_rows("data", data, store, "train", model),
                    validation=None
                    if validation_data is None
                    else as_rows("validation_data", validation_data, store, "val", model),
                )
                for name, rows in (("data", job.train), ("validation_data", job.validation)):
                    if rows is not None:
                        checks.rows(name, rows, model, batch_size, self.num_workers)
            if not model.built:
                build(model, job)
                payload = pickled_payload(builder, model, callbacks)
            if builder is None and not resumed:
                save_model(store, model)
            store.write_bytes(PAYLOAD_FILE, payload)
            store.write_bytes(JOB_FILE, cloudpickle.dumps(job))
            preparation_seconds = time.perf_counter() - started
            result = self._fit_with_restarts(job, store, model)
            weights, optimizer_state = load_trained(store)
            if [tuple(w.shape) for w in weights] != [tuple(v.shape) for v in model.weights]:
                raise ConfigError("The trained weights do not fit the model: it was changed while it was being trained.")
            result = dataclasses.replace(
                result,
                time_to_first_step_seconds=result.time_to_first_step_seconds + preparation_seconds,
                resumed_from=job.resume_from,
            )
            if self.store is not None:
                runs.finish(store, result)
        give_back(model, weights, optimizer_state)  # last: whatever fails before leaves the model as it was
        return dataclasses.replace(result, weights=model.get_weights(), model=model)

    def _fit_with_restarts(self, job: TrainJob, store: Store, model: Any) -> FitResult:
        """Ask the backend, and ask again after a failure, from the last checkpoint, as often as is allowed."""
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
            store.write_bytes(JOB_FILE, cloudpickle.dumps(job))
            self._wait_until_possible(job)

    def _wait_until_possible(self, job: TrainJob) -> None:
        """Let the cluster replace what it has lost."""
        deadline = time.monotonic() + self.timeouts.launch_seconds
        while True:
            try:
                return self._backend.check(job)
            except ConfigError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(_POLL_SECONDS)

    def _identity(
        self, job: TrainJob, model: Any, data: Any, validation_data: Any, callbacks: Sequence[Any]
    ) -> runs.Identity:
        """What a run must have in common with one that did not finish, to go on with it."""
        return {
            "backend": self._backend.name,
            "options": dataclasses.asdict(self._backend.options),
            "workers": job.num_workers,
            "epochs": job.epochs,
            "batch_size": job.batch_size,
            "seed": job.seed,
            "class_weight": None if job.class_weight is None else {str(k): float(v) for k, v in job.class_weight.items()},
            "keras_backend": job.keras_backend,
            "dtype_policy": job.dtype_policy,
            "callbacks": runs.identity_of_callbacks(callbacks),
            "model": runs.identity_of_model(model),
            "initial_weights": checksum(model.get_weights()),
            "data": runs.identity_of_data(data),
            "validation_data": runs.identity_of_data(validation_data),
            "versions": versions(),
        }

    def _as_it_was(self, job: TrainJob, store: Store, model: Any) -> TrainJob:
        """The job of the run that is resumed, with its data, and with how this fit wants it to be run.

        Raises:
            DataError: none of its checkpoints fits the model.
        """
        latest = Checkpoints(store).latest(weight_shapes(model))
        before = load_job(store.uri)
        if latest:
            logger.warning("Resuming the run in %s from checkpoint %s.", store.uri, latest)
        return dataclasses.replace(job, train=before.train, validation=before.validation, resume_from=latest)

    @contextmanager
    def _run(self, identity: Callable[[], runs.Identity], *, resume: bool) -> Iterator[tuple[Store, bool]]:
        """(a run's folder, whether it was there): in the user's store, where it stays, or a temporary one, which goes."""
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
                    run.write_json(runs.IDENTITY_FILE, mine)
                yield run, found is not None
        except BaseException:
            runs.forget_if_refused(run)
            raise


_POLL_SECONDS = 0.5
_NOT_YET = ShardedRows(uri="", files=(), rows_per_file=(), x="x", y="y")
