"""run_worker(): the only training loop. Every engine runs it, in every worker, around Keras' own ``fit``."""

from __future__ import annotations

import io
import os
import platform
import resource
import socket
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import cloudpickle
import numpy as np
from numpy.typing import NDArray

from dlspark._process import environment, random_states
from dlspark.attach import attached, check_mergeable
from dlspark.channel import Endpoint, Reporter, failure_fields
from dlspark.data.feed import Feed
from dlspark.data.sharding import step_range
from dlspark.errors import ConfigError
from dlspark.job import JOB_FILE, MODEL_FILE, PAYLOAD_FILE, WEIGHTS_FILE, TrainJob, WorkerReport, WorkerResult
from dlspark.session import WorkerSession
from dlspark.store import Store

__all__ = [
    "Payload",
    "Trained",
    "WorkerSession",
    "describe_device",
    "load_job",
    "load_model",
    "load_payload",
    "load_trained",
    "own_threads",
    "reporting",
    "run_worker",
    "save_trained",
    "train",
    "versions",
    "worker_environment",
    "worker_report",
]

STEP_REPORT_SECONDS = 0.25
_VERSIONS_OF = ("dlspark", "keras", "tensorflow", "jax", "torch", "numpy", "pyspark")


@dataclass(frozen=True)
class Payload:
    """What only Python can carry, pickled by value into the store: the user's callbacks, builder and custom objects."""

    callbacks: tuple[Any, ...] = ()
    builder: Any = None
    custom_objects: dict[str, Any] | None = None
    initial_weights: tuple[NDArray[Any], ...] = ()
    optimizer_built: bool = False


@dataclass(frozen=True)
class Trained:
    """What `train` did here.

    Attributes:
        history: metric → one float per epoch.
        epoch_seconds: of each epoch, with its validation.
        rows: training rows seen by this worker.
        input_seconds: spent waiting for them.
    """

    history: dict[str, list[float]]
    epoch_seconds: list[float]
    rows: int
    input_seconds: float


def run_worker(job_uri: str, endpoint: Endpoint, session: WorkerSession) -> WorkerResult:
    """Train this worker's part of the job and, on rank 0, leave the trained variables in the store.

    Args:
        job_uri: the run's folder in the store, where the driver has put job, payload and model.
        endpoint: where to report.
        session: what the engine gives this worker.

    Raises:
        Exception: whatever went wrong here, after it was reported to the driver with its traceback.
    """
    position: dict[str, int] = {}
    with reporting(endpoint, session.rank, position) as reporter:
        job = load_job(job_uri)
        with worker_environment(job, session.rank):
            return _run(job, load_payload(job), reporter, session, position)


@contextmanager
def worker_environment(job: TrainJob, rank: int) -> Iterator[None]:
    """What a worker's code sees: KERAS_BACKEND, and its rank as DLSPARK_RANK. Everything is put back after the block."""
    with environment(KERAS_BACKEND=job.keras_backend, DLSPARK_RANK=str(rank)), random_states():
        yield


@contextmanager
def reporting(endpoint: Endpoint, rank: int, position: dict[str, int]) -> Iterator[Reporter]:
    """A connection to the driver, which hears of whatever goes wrong inside the block before it is raised.

    Args:
        endpoint: where to report.
        rank: this worker.
        position: "epoch" and "step", kept up to date by ``train``; part of the report of a failure.
    """
    reporter = endpoint.connect(rank)
    try:
        yield reporter
    except BaseException as error:
        reporter.send("failed", host=socket.gethostname(), **position, **failure_fields(error))
        raise
    finally:
        reporter.close()


def _run(
    job: TrainJob, payload: Payload, reporter: Reporter, session: WorkerSession, position: dict[str, int]
) -> WorkerResult:
    started = time.perf_counter()
    import keras

    device = describe_device(session)
    reporter.send("started", pid=os.getpid(), host=socket.gethostname(), device=device)
    if keras.backend.backend() != job.keras_backend:
        raise ConfigError(
            f"The job needs the Keras backend {job.keras_backend!r}; this process on {socket.gethostname()} has already "
            f"loaded Keras with {keras.backend.backend()!r}. Start a new Spark session."
        )
    keras.utils.set_random_seed(job.seed + session.rank)
    model = load_model(job, payload)
    if session.exchanges:
        check_mergeable(model)
        set_weights(model, session.broadcast(model.get_weights()))
        if model.jit_compile and not session.compiles:
            reporter.send("note", text="jit_compile is off: this engine's collective cannot be compiled")
            model.jit_compile = False
    trained = train(job, model, session, reporter, callbacks=payload.callbacks, epochs=range(job.epochs), position=position)
    if session.rank == 0:
        save_trained(Store(job.uri), model)
    report = worker_report(session.rank, device=device, trained=trained, seconds=time.perf_counter() - started)
    reporter.send("done", seconds=report.seconds, rows=report.rows)
    return WorkerResult(report=report, history=trained.history, epoch_seconds=trained.epoch_seconds, versions=versions())


def train(
    job: TrainJob,
    model: Any,
    session: WorkerSession,
    reporter: Reporter,
    *,
    callbacks: Sequence[Any],
    epochs: range,
    position: dict[str, int] | None = None,
) -> Trained:
    """Run Keras' ``fit`` on this worker's part of ``epochs``."""
    position = {} if position is None else position
    vary_random_layers(model, session.rank)
    with Feed(job.train, batch_size=job.batch_size, rank=session.rank, world_size=session.world_size, seed=job.seed) as feed:
        validation = None
        if job.validation is not None:
            validation = Feed(job.validation, batch_size=job.batch_size, rank=session.rank, world_size=session.world_size)
        try:
            last_rows = {
                "train": feed.part_rows(feed.steps - 1),
                "test": validation.part_rows(validation.steps - 1) if validation else 0,
            }
            build_before_tracing(model, feed)
            progress = _progress_callback(job, feed, session, reporter, position)
            with attached(model, session, last_rows.__getitem__) as passes:
                history = model.fit(
                    feed.dataset(),
                    validation_data=None if validation is None else validation.dataset(),
                    initial_epoch=epochs.start,
                    epochs=epochs.stop,
                    shuffle=False,  # the feed has shuffled over all workers
                    class_weight=None if job.class_weight is None else dict(job.class_weight),
                    callbacks=[passes, progress, *_callbacks_of_rank(callbacks, session.rank)],
                    verbose=0,
                ).history
        finally:
            if validation is not None:
                validation.__exit__(None, None, None)
    return Trained(
        history={name: [float(value) for value in values] for name, values in history.items()},
        epoch_seconds=progress.epoch_seconds,
        rows=progress.rows_seen,
        input_seconds=progress.input_seconds,
    )


def _progress_callback(
    job: TrainJob, feed: Feed, session: WorkerSession, reporter: Reporter, position: dict[str, int]
) -> Any:
    import keras

    class Progress(keras.callbacks.Callback):
        """Tells the feed which epoch it is and the driver how far this rank has come."""

        def __init__(self) -> None:
            super().__init__()
            self.epoch_seconds: list[float] = []
            self.rows_seen = 0
            self.input_seconds = 0.0
            self._reported = self._epoch_started = self._step_ended = 0.0

        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            feed.epoch = epoch
            position.update(epoch=epoch, step=0)
            self._epoch_started = time.perf_counter()

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            step = min(batch, feed.steps - 1)  # with steps_per_execution the last call may name a step past the end
            self.rows_seen += sum(feed.part_rows(each) for each in range(position["step"], step + 1))
            first = position["step"] == 0
            # Of several steps in one execution only the first one's batch can be told to have come late.
            free_since = max(self._step_ended, feed.began_at)
            self.input_seconds += max(0.0, feed.ready_at[position["step"]] - free_since)
            position["step"] = step + 1
            now = self._step_ended = time.perf_counter()
            if first or now - self._reported > STEP_REPORT_SECONDS or step == feed.steps - 1:
                self._reported = now
                _, rows = step_range(job.train.rows, job.batch_size, step)
                loss = (logs or {}).get("loss")
                reporter.send(
                    "step",
                    epoch=position["epoch"],
                    step=step + 1,
                    steps=feed.steps,
                    rows=rows,
                    loss=None if loss is None else float(loss),
                )

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self.epoch_seconds.append(time.perf_counter() - self._epoch_started)
            values = {name: float(value) for name, value in (logs or {}).items()}
            reporter.send("epoch", epoch=epoch, logs=values, seconds=self.epoch_seconds[-1])

    return Progress()


def load_job(job_uri: str) -> TrainJob:
    """The job that the driver put into the run's folder; a pickle, because the user's own store is trusted."""
    job = cloudpickle.loads(Store(job_uri).read_bytes(JOB_FILE))
    if not isinstance(job, TrainJob):
        raise TypeError(f"{JOB_FILE} in {job_uri} holds a {type(job).__name__}, not a TrainJob.")
    return job


def load_payload(job: TrainJob) -> Payload:
    """The job's payload. It may import Keras: call it where the Keras backend has been chosen."""
    payload = cloudpickle.loads(Store(job.uri).read_bytes(PAYLOAD_FILE))
    if not isinstance(payload, Payload):
        raise TypeError(f"{PAYLOAD_FILE} in {job.uri} holds a {type(payload).__name__}, not a Payload.")
    return payload


def load_model(job: TrainJob, payload: Payload) -> Any:
    """The job's compiled model, with the weights that the driver's has, from its file or from the user's builder."""
    import keras

    if job.from_builder:
        before = keras.config.dtype_policy()
        keras.config.set_dtype_policy(job.dtype_policy)
        try:
            model = payload.builder()
        finally:
            keras.config.set_dtype_policy(before)
        if not model.built:
            build(model, job)
        set_weights(model, payload.initial_weights)
        return model
    with keras.saving.custom_object_scope(payload.custom_objects or {}), warnings.catch_warnings():
        if not payload.optimizer_built:  # the file holds no state of the optimizer, and Keras warns that it finds none
            warnings.filterwarnings("ignore", message="Skipping variable loading for optimizer")
        return keras.saving.load_model(Store(job.uri).local_file(MODEL_FILE), safe_mode=True)


def build(model: Any, job: TrainJob) -> None:
    """Create the variables of a model that waits for its first input."""
    import keras

    with Feed(job.train, batch_size=1) as feed:
        x, _, _ = keras.utils.unpack_x_y_sample_weight(feed.batch(0, None))
    model(keras.tree.map_structure(keras.ops.convert_to_tensor, x), training=False)


def build_before_tracing(model: Any, feed: Feed) -> None:
    """Create the variables of optimizer, loss and metrics, which Keras would create inside the first step.

    A traced function that creates variables is traced twice: 39 s in place of 21 s for ResNet50 on one slow core. A model
    with a ``train_step`` of its own is left alone, because only it knows what its loss and metrics take.
    """
    import keras

    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    outputs = getattr(model, "output", None)
    if outputs is None or type(model).train_step is not keras.Model.train_step:
        return
    x, y, _ = keras.utils.unpack_x_y_sample_weight(feed.first_row())
    if any(None in t.shape[1:] for t in keras.tree.flatten(outputs)):
        return
    predicted = keras.tree.map_structure(lambda t: keras.ops.zeros((1, *t.shape[1:]), t.dtype), outputs)
    model.compute_loss(x, y, predicted)
    model.compute_metrics(x, y, predicted)
    model.reset_metrics()


def set_weights(model: Any, weights: Sequence[Any]) -> None:
    """Assign ``weights`` in the order of ``model.weights``; an optimizer's state is not touched."""
    for variable, value in zip(model.weights, weights, strict=True):
        variable.assign(value)


def vary_random_layers(model: Any, rank: int) -> None:
    """Let dropout and augmentation draw differently on every rank. Rank 0 keeps the model's own seeds."""
    for variable in model.variables:
        if variable.name == "seed_generator_state" and rank:
            state = np.array(variable)
            state[0] += rank
            variable.assign(state)


def save_trained(store: Store, model: Any) -> None:
    """Write weights (``w0`` …) and optimizer variables (``o0`` …) as one npz file, whole or not at all."""
    arrays = {f"w{i}": _storable(v) for i, v in enumerate(model.weights)}
    arrays.update({f"o{i}": _storable(v) for i, v in enumerate(model.optimizer.variables)})
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    store.write_bytes(WEIGHTS_FILE, buffer.getvalue())


def load_trained(store: Store) -> tuple[list[NDArray[Any]], list[NDArray[Any]]]:
    """(weights, optimizer variables) that ``save_trained`` wrote."""
    with np.load(io.BytesIO(store.read_bytes(WEIGHTS_FILE)), allow_pickle=False) as file:
        count = sum(name.startswith("w") for name in file.files)
        return [file[f"w{i}"] for i in range(count)], [file[f"o{i}"] for i in range(len(file.files) - count)]


def _storable(variable: Any) -> NDArray[Any]:
    import keras

    array = keras.ops.convert_to_numpy(variable)
    # npz knows no bfloat16; float32 holds every value of it, and assigning casts back.
    return array.astype(np.float32) if "bfloat16" in str(array.dtype) else array


def own_threads(threads: int) -> None:
    """Make TensorFlow compute with ``threads`` threads. To be called before its context exists.

    Both pools count: with one core, a second inter-op thread already competes with the first.
    """
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)


def describe_device(session: WorkerSession) -> str:
    """What this process computes on, for the report.

    Raises:
        ConfigError: the cluster gave this worker a GPU that the framework cannot use.
    """
    import keras

    framework = keras.backend.backend()
    if framework == "tensorflow":
        import tensorflow as tf

        gpus = [device.name for device in tf.config.list_logical_devices("GPU")]
    elif framework == "jax":
        import jax

        gpus = [f"{d.device_kind} {d.id}" for d in jax.devices() if d.platform != "cpu"]
    else:
        import torch

        gpus = [torch.cuda.get_device_name(0)] if torch.cuda.is_available() else []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if gpus:
        return ", ".join(gpus) + (f" (CUDA_VISIBLE_DEVICES={visible})" if visible else "")
    if session.needs_gpu:
        raise ConfigError(
            f"Rank {session.rank} on {socket.gethostname()} was given the GPU addresses {visible!r} by Spark, and "
            f"{framework} sees no GPU there. Install a build with GPU support and its driver on that host, or start the "
            "session without spark.task.resource.gpu.amount to train on CPUs."
        )
    threads = session.threads or os.cpu_count()
    return f"cpu, {threads} thread{'s' if threads != 1 else ''}"


def worker_report(rank: int, *, device: str, trained: Trained | None, seconds: float) -> WorkerReport:
    """The report of this process; ``trained`` is None for one that only evaluated."""
    return WorkerReport(
        rank=rank,
        host=socket.gethostname(),
        device=device,
        rows=trained.rows if trained else 0,
        seconds=seconds,
        input_seconds=trained.input_seconds if trained else 0.0,
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def versions() -> dict[str, str]:
    """Version by package of what is installed here, and Python's."""
    found = {"python": platform.python_version()}
    for name in _VERSIONS_OF:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _callbacks_of_rank(callbacks: Sequence[Any], rank: int) -> list[Any]:
    """All callbacks on rank 0; elsewhere those that write no files, so that they decide alike on every rank."""
    import keras

    writers = (keras.callbacks.ModelCheckpoint, keras.callbacks.CSVLogger, keras.callbacks.TensorBoard)
    return [c for c in callbacks if rank == 0 or not (isinstance(c, writers) or getattr(c, "rank_zero_only", False))]
