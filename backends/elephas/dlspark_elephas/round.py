"""RoundWorker: one worker's part of one round, inside a Spark task."""

from __future__ import annotations

import dataclasses
import os
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dlspark.plugin import (
    Endpoint,
    Feed,
    Reporter,
    TrainJob,
    WorkerReport,
    WorkerSession,
    WorkerStatus,
    describe_device,
    load_job,
    load_model,
    load_payload,
    messages,
    moving,
    num_steps,
    own_gpus,
    own_threads,
    reporting,
    seed_variables,
    tensorflow_context,
    train,
    worker_environment,
    worker_report,
)


@dataclass(frozen=True)
class Outcome:
    """The result of a worker's round, besides its weights; ``logs`` is what its ``fit`` reported, empty for validation."""

    rank: int
    metric_states: list[NDArray[Any]]
    report: WorkerReport
    logs: dict[str, float] = field(default_factory=dict)


@dataclass
class _Loaded:
    """A job's model, which this Python worker keeps between rounds, with the initial seeds of its random layers."""

    job: TrainJob
    model: Any
    device: str
    seeds: list[NDArray[Any]]


# At most one model, by (job URI, generation of TensorFlow's context).
_loaded: dict[tuple[str, int], _Loaded] = {}


class RoundWorker:
    """Replaces Elephas' SparkWorker: the same outcome, with dlspark's loop and feed.

    Args:
        parameters: a broadcast of the initial state.
        config: arguments of `round_part`.
    """

    def __init__(self, parameters: Any, config: dict[str, Any]) -> None:
        self._parameters = parameters
        self._config = config

    def train(self, ranks: Iterable[int]) -> Iterator[list[Any]]:
        """Train the part of the only rank in ``ranks``; yields Elephas' pair of [weights before minus after, outcome]."""
        (rank,) = ranks
        state = self._parameters.value
        with round_part(rank, **self._config) as part:
            set_state(part.model, state)
            outcome = part.train()
            # Elephas averages over workers; this factor makes it the average over rows.
            share = outcome.report.rows * part.job.num_workers / part.job.train.rows
            # asarray: the difference of two 0-d arrays is a NumPy scalar, which silently ignores Elephas' in-place sums.
            delta = [np.asarray((b - a) * share) for b, a in zip(state, state_of(part.model), strict=True)]
        yield [delta, outcome]


@dataclass(frozen=True)
class RoundPart:
    """One worker's part of one round, its model loaded."""

    job: TrainJob
    model: Any
    epoch: int
    _session: WorkerSession
    _device: str
    _reporter: Reporter
    _status: WorkerStatus
    _started: float

    def train(self, callbacks: Sequence[Any] = ()) -> Outcome:
        """Train the model on this worker's rows of the epoch."""
        trained = train(
            dataclasses.replace(self.job, validation=None),
            self.model,
            self._session,
            _StepsOnly(self._reporter),
            callbacks=callbacks,
            epochs=range(self.epoch, self.epoch + 1),
            status=self._status,
        )
        rank = self._session.rank
        report = worker_report(rank, device=self._device, trained=trained, seconds=time.perf_counter() - self._started)
        logs = {name: values[-1] for name, values in trained.history.items()}
        return Outcome(rank, _metric_states(self.model), report, logs)


@contextmanager
def round_part(
    rank: int, *, job_uri: str, epoch: int, endpoint: Endpoint, threads: int, needs_gpu: bool
) -> Iterator[RoundPart]:
    """The part of ``rank`` in the round ``epoch``. Errors in the block are reported to the driver."""
    status = WorkerStatus()
    job = load_job(job_uri)
    session = WorkerSession(rank, job.num_workers, threads=threads, needs_gpu=needs_gpu, exchanges=False)
    with reporting(endpoint, rank, status) as reporter, worker_environment(job, rank), own_gpus():
        started = time.perf_counter()
        loaded = _load(job, session)
        if not epoch:
            host, device = socket.gethostname(), loaded.device
            reporter.send(messages.Started(rank=rank, pid=os.getpid(), host=host, device=device))
        for variable, seed in zip(seed_variables(loaded.model), loaded.seeds, strict=True):
            # The draws depend on the round, and not on the process that runs it.
            variable.assign(np.array([seed[0] + 7919 * epoch, 0], seed.dtype))
        yield RoundPart(job, loaded.model, epoch, session, loaded.device, reporter, status, started)


def evaluate_part(rank: int, state: Any, *, job_uri: str, epoch: int, endpoint: Endpoint) -> Outcome:
    """Evaluate ``rank``'s part of the validation rows; ``state`` is a broadcast of the averaged state."""
    from pyspark import TaskContext

    job = load_job(job_uri)
    if job.validation is None:
        raise ValueError("The job has no validation rows.")
    status = WorkerStatus(epoch=epoch, step=num_steps(job.train.rows, job.batch_size))
    with reporting(endpoint, rank, status), worker_environment(job, rank), own_gpus() as gpus:
        started = time.perf_counter()
        # If another process trained this part, the model is loaded here, for the device of this task.
        threads = TaskContext.get().cpus()
        session = WorkerSession(rank, job.num_workers, threads=threads, needs_gpu=bool(gpus), exchanges=False)
        loaded = _load(job, session)
        set_state(loaded.model, state.value)
        with Feed(job.validation, batch_size=job.batch_size, rank=rank, world_size=job.num_workers) as feed:
            loaded.model.evaluate(feed.dataset(), verbose=0, callbacks=[moving(status)])
    report = worker_report(rank, device=loaded.device, trained=None, seconds=time.perf_counter() - started)
    return Outcome(rank, _metric_states(loaded.model), report)


def state_of(model: Any) -> list[NDArray[Any]]:
    """The values of all weights and optimizer variables."""
    import keras

    return [keras.ops.convert_to_numpy(variable) for variable in _state_variables(model)]


def set_state(model: Any, values: Sequence[NDArray[Any]]) -> None:
    """Assign what ``state_of`` returned; averages of integers are rounded to integers."""
    for variable, value in zip(_state_variables(model), values, strict=True):
        variable.assign(value if "float" in variable.dtype else np.rint(value).astype(variable.dtype))


def _state_variables(model: Any) -> list[Any]:
    return [*model.weights, *model.optimizer.variables]


def _metric_states(model: Any) -> list[NDArray[Any]]:
    return [np.array(variable) for variable in model.metrics_variables]


def _load(job: TrainJob, session: WorkerSession) -> _Loaded:
    """The job's model, from this process's memory or from the store."""
    kept = _loaded.get((job.uri, tensorflow_context.generation()))
    if kept is not None:
        return kept
    _loaded.clear()
    tensorflow_context.reset()
    own_threads(session.threads or 1)
    import keras

    keras.utils.set_random_seed(job.seed)
    model = load_model(job, load_payload(job))
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    loaded = _Loaded(job, model, describe_device(session), [np.array(v) for v in seed_variables(model)])
    _loaded[job.uri, tensorflow_context.generation()] = loaded
    return loaded


class _StepsOnly:
    """Sends `StepEnded` only. The driver reports the end of an epoch itself, after averaging."""

    def __init__(self, reporter: Reporter) -> None:
        self.must_stop = reporter.must_stop
        self._reporter = reporter

    def send(self, message: messages.FromWorker) -> None:
        if isinstance(message, messages.StepEnded):
            self._reporter.send(message)

    def close(self) -> None:
        """The task closes the connection."""
