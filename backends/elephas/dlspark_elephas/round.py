"""RoundWorker: one worker's part of one round, inside a Spark task."""

from __future__ import annotations

import dataclasses
import os
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
    describe_device,
    load_job,
    load_model,
    load_payload,
    moving,
    num_steps,
    own_gpus,
    own_threads,
    reporting,
    tensorflow_context,
    train,
    worker_environment,
    worker_report,
)


@dataclass(frozen=True)
class Outcome:
    """What a worker returns from a round beside its weights."""

    rank: int
    metric_states: list[NDArray[Any]]
    report: WorkerReport


@dataclass
class _Loaded:
    """A job's model as this Python worker keeps it between rounds, with the seeds of its random layers."""

    job: TrainJob
    model: Any
    device: str
    seeds: list[NDArray[Any]]


# One model at most, for as long as TensorFlow's context is the one it was loaded in: (job URI, generation) → model.
_loaded: dict[tuple[str, int], _Loaded] = {}


class RoundWorker:
    """Takes the place of Elephas' SparkWorker: the same outcome, dlspark's loop and feed.

    Args:
        parameters: a broadcast of the state that every worker begins with.
        config: what `round_part` needs.
    """

    def __init__(self, parameters: Any, config: dict[str, Any]) -> None:
        self._parameters = parameters
        self._config = config

    def train(self, ranks: Iterable[int]) -> Iterator[list[Any]]:
        """Train the part of the one rank in ``ranks``; yields Elephas' pair of [weights before minus after, outcome]."""
        (rank,) = ranks
        state = self._parameters.value
        with round_part(rank, **self._config) as part:
            set_state(part.model, state)
            outcome = part.train()
            # Elephas averages over workers; scaled like this, that is the average over rows.
            share = outcome.report.rows * part.job.num_workers / part.job.train.rows
            # asarray: Elephas adds up in place, which a NumPy scalar, such as the difference of two 0-d arrays, silently
            # ignores.
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
    _position: dict[str, Any]
    _started: float

    def train(self, callbacks: Sequence[Any] = ()) -> Outcome:
        """Train the model, as it is, on this worker's rows of the epoch."""
        trained = train(
            dataclasses.replace(self.job, validation=None),
            self.model,
            self._session,
            _StepsOnly(self._reporter),
            callbacks=callbacks,
            epochs=range(self.epoch, self.epoch + 1),
            position=self._position,
        )
        rank = self._session.rank
        report = worker_report(rank, device=self._device, trained=trained, seconds=time.perf_counter() - self._started)
        return Outcome(rank, _metric_states(self.model), report)


@contextmanager
def round_part(
    rank: int, *, job_uri: str, epoch: int, endpoint: Endpoint, threads: int, needs_gpu: bool
) -> Iterator[RoundPart]:
    """The part of ``rank`` of the round ``epoch``. Whatever fails inside the block is reported to the driver."""
    position: dict[str, Any] = {}
    job = load_job(job_uri)
    session = WorkerSession(rank, job.num_workers, threads=threads, needs_gpu=needs_gpu, exchanges=False)
    with reporting(endpoint, rank, position) as reporter, worker_environment(job, rank), own_gpus():
        started = time.perf_counter()
        loaded = _load(job, session)
        if not epoch:
            reporter.send("started", pid=os.getpid(), host=socket.gethostname(), device=loaded.device)
        for variable, seed in zip(_seed_variables(loaded.model), loaded.seeds, strict=True):
            # The same draws in whichever process the round runs; others in every round.
            variable.assign(np.array([seed[0] + 7919 * epoch, 0], seed.dtype))
        yield RoundPart(job, loaded.model, epoch, session, loaded.device, reporter, position, started)


def evaluate_part(rank: int, state: Any, *, job_uri: str, epoch: int, endpoint: Endpoint) -> Outcome:
    """Evaluate the part of ``rank`` of the validation rows; ``state`` is a broadcast of the averaged state."""
    from pyspark import TaskContext

    job = load_job(job_uri)
    if job.validation is None:
        raise ValueError("The job has no validation rows.")
    position: dict[str, Any] = {"epoch": epoch, "step": num_steps(job.train.rows, job.batch_size)}
    with reporting(endpoint, rank, position), worker_environment(job, rank), own_gpus() as gpus:
        started = time.perf_counter()
        # Another process may have trained this part: then the model is loaded here, for the device of this task.
        threads = TaskContext.get().cpus()
        session = WorkerSession(rank, job.num_workers, threads=threads, needs_gpu=bool(gpus), exchanges=False)
        loaded = _load(job, session)
        set_state(loaded.model, state.value)
        with Feed(job.validation, batch_size=job.batch_size, rank=rank, world_size=job.num_workers) as feed:
            loaded.model.evaluate(feed.dataset(), verbose=0, callbacks=[moving(position)])
    report = worker_report(rank, device=loaded.device, trained=None, seconds=time.perf_counter() - started)
    return Outcome(rank, _metric_states(loaded.model), report)


def state_of(model: Any) -> list[NDArray[Any]]:
    """The values of all weights and optimizer variables."""
    import keras

    return [keras.ops.convert_to_numpy(variable) for variable in _state_variables(model)]


def set_state(model: Any, values: Sequence[NDArray[Any]]) -> None:
    """Assign what ``state_of`` gave; averages of whole numbers are rounded back to whole numbers."""
    for variable, value in zip(_state_variables(model), values, strict=True):
        variable.assign(value if "float" in variable.dtype else np.rint(value).astype(variable.dtype))


def _state_variables(model: Any) -> list[Any]:
    return [*model.weights, *model.optimizer.variables]


def _seed_variables(model: Any) -> list[Any]:
    return [variable for variable in model.variables if variable.name == "seed_generator_state"]


def _metric_states(model: Any) -> list[NDArray[Any]]:
    return [np.array(variable) for variable in model.metrics_variables]


def _load(job: TrainJob, session: WorkerSession) -> _Loaded:
    """The job's model, from this process' memory or from the store."""
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
    loaded = _Loaded(job, model, describe_device(session), [np.array(v) for v in _seed_variables(model)])
    _loaded[job.uri, tensorflow_context.generation()] = loaded
    return loaded


class _StepsOnly:
    """Passes on steps. An epoch is over when the driver has averaged, and it says so itself."""

    def __init__(self, reporter: Reporter) -> None:
        self.interruption = reporter.interruption
        self._reporter = reporter

    def send(self, kind: str, **fields: Any) -> None:
        if kind == "step":
            self._reporter.send(kind, **fields)

    def close(self) -> None:
        """The task closes the connection."""
