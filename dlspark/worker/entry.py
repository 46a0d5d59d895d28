"""run_worker(): the function that every engine runs in every worker, around the training loop."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from dlspark.data import ShardedRows
from dlspark.errors import ConfigError, RunInterruptedError
from dlspark.job import INITIAL_WEIGHTS_FILE, TrainJob, WorkerResult, load_job, versions
from dlspark.storage import Checkpoints, Store
from dlspark.wire import Endpoint, Reporter, failed, messages
from dlspark.worker.callbacks import Start
from dlspark.worker.device import describe_device, worker_report
from dlspark.worker.exactness import check_mergeable
from dlspark.worker.given_model import load_given
from dlspark.worker.heartbeat import Pulse
from dlspark.worker.loop import train
from dlspark.worker.model_state import load_arrays, restore, save_trained, set_arrays, set_weights
from dlspark.worker.payload import Payload, load_payload
from dlspark.worker.process import dtype_policy, environment, random_states
from dlspark.worker.session import WorkerSession
from dlspark.worker.status import WorkerStatus


def run_worker(job_uri: str, endpoint: Endpoint, session: WorkerSession) -> WorkerResult:
    """Train this worker's part of the job and, on rank 0, leave the trained variables in the store.

    Args:
        job_uri: the run's folder in the store, with job, payload and model.
        endpoint: the driver's.
        session: what the engine gives this worker.

    Raises:
        Exception: any error here, after a report to the driver with its traceback.
    """
    status = WorkerStatus()
    with reporting(endpoint, session.rank, status) as reporter:
        job = load_job(job_uri)
        with worker_environment(job, session.rank):
            return _run(job, load_payload(job), reporter, session, status)


@contextmanager
def worker_environment(job: TrainJob, rank: int) -> Iterator[None]:
    """Set KERAS_BACKEND, and the rank as DLSPARK_RANK. Environment and random states are restored after the block."""
    with environment(KERAS_BACKEND=job.keras_backend, DLSPARK_RANK=str(rank)), random_states():
        yield


@contextmanager
def reporting(endpoint: Endpoint, rank: int, status: WorkerStatus) -> Iterator[Reporter]:
    """A connection to the driver that sends heartbeats during the block, and reports an error in it before raising it.

    Args:
        endpoint: the driver's.
        rank: this worker.
        status: updated by ``train``; part of every heartbeat and of the report of a failure.
    """
    reporter = endpoint.connect(rank)
    try:
        reporter.send(messages.Connected(rank=rank, pid=os.getpid(), host=socket.gethostname()))
        with Pulse(reporter, endpoint, rank, status):
            yield reporter
    except RunInterruptedError:
        reporter.send(messages.Interrupted(rank=rank))
        raise
    except BaseException as error:
        step = None if status.epoch is None else status.step
        reporter.send(failed(rank, error, epoch=status.epoch, step=step, waits=status.cause_may_be_elsewhere))
        raise
    finally:
        reporter.close()


def _run(job: TrainJob, payload: Payload, reporter: Reporter, session: WorkerSession, status: WorkerStatus) -> WorkerResult:
    started = time.perf_counter()
    import keras

    device = describe_device(session)
    reporter.send(messages.Started(rank=session.rank, pid=os.getpid(), host=socket.gethostname(), device=device))
    if keras.backend.backend() != job.keras_backend:
        raise ConfigError(
            f"The job needs the Keras backend {job.keras_backend!r}; this process on {socket.gethostname()} has already "
            f"loaded Keras with {keras.backend.backend()!r}. Start a new Spark session."
        )
    keras.utils.set_random_seed(job.seed + session.rank)
    model = load_model(job, payload)
    if session.exchanges:
        session.sum, session.broadcast = status.noting(session.sum), status.noting(session.broadcast)  # type: ignore[method-assign]
        check_mergeable(model)
        set_weights(model, session.broadcast(model.get_weights()))
        if model.jit_compile and not session.compiles:
            text = "jit_compile is off: this engine's collective cannot be compiled"
            reporter.send(messages.Note(rank=session.rank, text=text))
            model.jit_compile = False
    trained = train(
        job,
        model,
        session,
        reporter,
        callbacks=payload.callbacks_for(model),
        epochs=range(job.epochs),
        status=status,
        start=resumed(job, model),
        checkpoints=Checkpoints(Store(job.uri)) if job.checkpoints else None,
    )
    if session.rank == 0:
        save_trained(Store(job.uri), model)
    report = worker_report(session.rank, device=device, trained=trained, seconds=time.perf_counter() - started)
    reporter.send(messages.Done(rank=session.rank, seconds=report.seconds, rows=report.rows))
    return WorkerResult(report=report, history=trained.history, epoch_seconds=trained.epoch_seconds, versions=versions())


def resumed(job: TrainJob, model: Any) -> Start:
    """Where the job starts. If it resumes from a checkpoint, its variables are restored into ``model``.

    Raises:
        DataError: the checkpoint is incomplete or belongs to another model.
    """
    if job.resume_from is None:
        return Start()
    checkpoints = Checkpoints(Store(job.uri))
    start = Start(checkpoints.position(job.resume_from), checkpoints.load(job.resume_from))
    restore(model, start.arrays)
    return start


def load_model(job: TrainJob, payload: Payload) -> Any:
    """The job's compiled model with the driver's weights, from its file or from the user's builder."""
    import keras

    if job.from_builder:
        with dtype_policy(job.dtype_policy):
            model = payload.builder()
        if not model.built:
            build(model, job.train)
        set_arrays(model, load_arrays(Store(job.uri), INITIAL_WEIGHTS_FILE))
        return model
    if job.given is None:
        raise ConfigError("Expected the job of a model; got one without it, of an older version. Begin a new run.")
    with keras.saving.custom_object_scope(dict(payload.custom_objects)):
        return load_given(Store(job.uri), job.given)


def build(model: Any, rows: ShardedRows) -> None:
    """Create the variables of a model that builds itself on its first input."""
    import keras

    with rows.open() as reader:
        x, _, _ = keras.utils.unpack_x_y_sample_weight(reader.batch(np.arange(1)))
    model(keras.tree.map_structure(keras.ops.convert_to_tensor, x), training=False)
