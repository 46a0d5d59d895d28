"""run_worker(): what every engine runs in every worker, around the only training loop."""

from __future__ import annotations

import os
import platform
import resource
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import cloudpickle
from numpy.typing import NDArray

from dlspark._process import environment, random_states
from dlspark.attach import check_mergeable
from dlspark.callbacks import Start
from dlspark.channel import Endpoint, Reporter, failure_fields
from dlspark.checkpoint import Checkpoints
from dlspark.data.feed import Feed
from dlspark.errors import ConfigError, RunInterruptedError
from dlspark.job import JOB_FILE, MODEL_FILE, PAYLOAD_FILE, TrainJob, WorkerReport, WorkerResult
from dlspark.loop import Trained, train
from dlspark.pulse import Pulse
from dlspark.session import WorkerSession
from dlspark.state import load_trained, restore, save_trained, set_weights
from dlspark.store import Store

__all__ = [
    "Payload",
    "Start",
    "Trained",
    "WorkerSession",
    "describe_device",
    "load_job",
    "load_model",
    "load_payload",
    "load_trained",
    "own_threads",
    "reporting",
    "resumed",
    "run_worker",
    "save_trained",
    "set_weights",
    "train",
    "versions",
    "worker_environment",
    "worker_report",
]

_VERSIONS_OF = ("dlspark", "keras", "tensorflow", "jax", "torch", "numpy", "pyspark")


@dataclass(frozen=True)
class Payload:
    """What only Python can carry, pickled by value into the store: the user's callbacks, builder and custom objects."""

    callbacks: tuple[Any, ...] = ()
    builder: Any = None
    custom_objects: dict[str, Any] | None = None
    initial_weights: tuple[NDArray[Any], ...] = ()
    optimizer_built: bool = False


def run_worker(job_uri: str, endpoint: Endpoint, session: WorkerSession) -> WorkerResult:
    """Train this worker's part of the job and, on rank 0, leave the trained variables in the store.

    Args:
        job_uri: the run's folder in the store, where the driver has put job, payload and model.
        endpoint: where to report.
        session: what the engine gives this worker.

    Raises:
        Exception: whatever went wrong here, after it was reported to the driver with its traceback.
    """
    position: dict[str, Any] = {}
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
def reporting(endpoint: Endpoint, rank: int, position: dict[str, Any]) -> Iterator[Reporter]:
    """A connection to the driver, which hears of life in the block and of whatever goes wrong there before it is raised.

    Args:
        endpoint: where to report.
        rank: this worker.
        position: kept up to date by ``train``; part of every heartbeat and of the report of a failure.
    """
    reporter = endpoint.connect(rank)
    try:
        reporter.send("connected", pid=os.getpid(), host=socket.gethostname())
        with Pulse(reporter, endpoint, rank, position):
            yield reporter
    except RunInterruptedError:
        reporter.send("interrupted")
        raise
    except BaseException as error:
        place = {name: position[name] for name in ("epoch", "step") if name in position}
        reporter.send("failed", host=socket.gethostname(), **place, **failure_fields(error))
        raise
    finally:
        reporter.close()


def _run(
    job: TrainJob, payload: Payload, reporter: Reporter, session: WorkerSession, position: dict[str, Any]
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
    trained = train(
        job,
        model,
        session,
        reporter,
        callbacks=payload.callbacks,
        epochs=range(job.epochs),
        position=position,
        start=resumed(job, model),
        checkpoints=Checkpoints(Store(job.uri)) if job.checkpoints else None,
    )
    if session.rank == 0:
        save_trained(Store(job.uri), model)
    report = worker_report(session.rank, device=device, trained=trained, seconds=time.perf_counter() - started)
    reporter.send("done", seconds=report.seconds, rows=report.rows)
    return WorkerResult(report=report, history=trained.history, epoch_seconds=trained.epoch_seconds, versions=versions())


def resumed(job: TrainJob, model: Any) -> Start:
    """The start of the job, after ``model`` was given what the checkpoint holds that the job goes on from.

    Raises:
        DataError: the checkpoint is of another model, or not whole.
    """
    if job.resume_from is None:
        return Start()
    checkpoints = Checkpoints(Store(job.uri))
    start = Start(checkpoints.position(job.resume_from), checkpoints.load(job.resume_from))
    restore(model, start.arrays)
    return start


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
