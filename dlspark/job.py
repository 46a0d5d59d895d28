"""A training run as driver and workers see it: what is asked, what a worker returns, what the caller gets."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import cloudpickle

from dlspark._require import installed_versions
from dlspark.data import ShardedRows
from dlspark.storage import Store
from dlspark.timeouts import Timeouts

if TYPE_CHECKING:
    from numpy.typing import NDArray

Verbosity = Literal["auto", 0, 1, 2]

# Names inside a run's folder of the store.
IDENTITY_FILE = "run.json"
MODEL_FILE = "model.keras"
PAYLOAD_FILE = "payload.pkl"
JOB_FILE = "job.pkl"
INITIAL_WEIGHTS_FILE = "initial.npz"
WEIGHTS_FILE = "trained.npz"
RESULT_FILE = "result.json"
EVENTS_FILE = "events.jsonl"
TENSORBOARD_FOLDER = "tensorboard"

_VERSIONS_OF = ("dlspark", "keras", "tensorflow", "jax", "torch", "numpy", "pyspark")


@dataclass(frozen=True, kw_only=True)
class JobSettings:
    """What is asked of a run, known before its data and its model are in the store. A backend's ``check`` gets it.

    Attributes:
        num_workers: the world size.
        epochs: passes over the training rows.
        batch_size: the most rows that a step takes, *global*.
        seed: of shuffling, initialisation, dropout and augmentation.
        class_weight: weight of the loss by class index, or None.
        keras_backend: the Keras backend that the workers must use.
        verbose: 0 silent, 1 live display, 2 plain lines, "auto" 1 on a terminal and 2 elsewhere.
        dtype_policy: the driver's global one, under which a builder builds on the workers too.
        from_builder: the workers build the model by the builder in the payload instead of loading the file.
        timeouts: the bounds of the waits.
        checkpoints: leave a checkpoint after every epoch.
        checkpoint_steps: also after every so many steps of an epoch; None for none.
        keep_events: leave events.jsonl and TensorBoard's scalars beside the job.
    """

    num_workers: int
    epochs: int
    batch_size: int
    seed: int
    class_weight: Mapping[int, float] | None = None
    keras_backend: str = "tensorflow"
    verbose: Verbosity = "auto"
    from_builder: bool = False
    dtype_policy: str = "float32"
    timeouts: Timeouts = field(default_factory=Timeouts)
    checkpoints: bool = False
    checkpoint_steps: int | None = None
    keep_events: bool = False


@dataclass(frozen=True, kw_only=True)
class GivenModel:
    """What the ``.keras`` file of a model does not hold. Layers and variables are in Keras' order.

    Attributes:
        dtype_policy: that of the model itself.
        layers_trainable: the flag of each layer at any depth, the model first.
        variables_trainable: the flag of each variable.
        compiled: the serialized arguments of ``compile``, with the optimizer as it is now.
        optimizer_built: the optimizer has a state.
        iterations: how many steps each optimizer counts, built or not.
        undecayed: what each optimizer excludes from weight decay: indices of variables, and a pattern of names.
    """

    dtype_policy: str
    layers_trainable: tuple[bool, ...]
    variables_trainable: tuple[bool, ...]
    compiled: Mapping[str, Any]
    optimizer_built: bool
    iterations: tuple[int, ...]
    undecayed: tuple[tuple[tuple[int, ...], str | None], ...]


@dataclass(frozen=True, kw_only=True)
class TrainJob(JobSettings):
    """One training run, as the backend and the workers see it.

    The large things lie in the store under ``uri``: the compiled model (``model.keras``, or a builder in the payload and
    its initial weights), the payload (callbacks, builder, custom objects) and, afterwards, the trained variables.

    Attributes:
        uri: folder of the store that holds this run.
        train: the training rows.
        validation: rows evaluated after every epoch, or None.
        given: what the model's file does not hold; None with a builder.
        resume_from: the checkpoint to resume from; None starts with the model's own weights.
    """

    uri: str
    train: ShardedRows
    validation: ShardedRows | None = None
    given: GivenModel | None = None
    resume_from: str | None = None

    def save(self) -> None:
        """Write the job into its folder, where `load_job` finds it."""
        Store(self.uri).write_bytes(JOB_FILE, cloudpickle.dumps(self))


def load_job(uri: str) -> TrainJob:
    """The job that the driver saved in the run's folder; a pickle, because the user's own store is trusted."""
    found = cloudpickle.loads(Store(uri).read_bytes(JOB_FILE))
    if not isinstance(found, TrainJob):
        raise TypeError(f"Expected a TrainJob in {JOB_FILE} of {uri}; got a {type(found).__name__}.")
    return found


@dataclass(frozen=True, kw_only=True)
class WorkerReport:
    """What one worker did.

    Attributes:
        rank: 0 to world size - 1.
        host: name of its machine.
        device: what it computed on, with the number of threads or the address of the GPU.
        rows: training rows that it saw, over all epochs.
        seconds: from the start of its work to the end.
        input_seconds: of them, waiting for training batches; see `dlspark.data.feed.Feed.ready_at`.
        peak_memory_bytes: largest resident set of its process.
    """

    rank: int
    host: str
    device: str
    rows: int
    seconds: float
    input_seconds: float
    peak_memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class WorkerResult:
    """What a worker returns to the driver. ``history`` and ``epoch_seconds`` are equal on all ranks up to clocks."""

    report: WorkerReport
    history: Mapping[str, list[float]]
    epoch_seconds: list[float]
    versions: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """What ``Trainer.fit`` returns.

    Attributes:
        backend: name of the backend that ran.
        history: metric → one float per epoch; over all rows of all workers; validation metrics as ``val_…``.
        epoch_seconds: wall time of each epoch, validation included, on rank 0.
        time_to_first_step_seconds: from the call of ``fit`` until every worker had done its first step.
        versions: of Python and of the packages that mattered, on rank 0.
        workers: one report per rank, in rank order; of the last attempt, where there were several.
        restarts: how often the run was started again after a failure, in this call of ``fit``.
        resumed_from: the checkpoint from which this call resumed first; None if it started from the beginning.
        weights: the trained weights, in the order of ``model.get_weights()``.
        model: the caller's model, trained (or the one that the builder made).
    """

    backend: str
    history: Mapping[str, list[float]]
    epoch_seconds: list[float]
    time_to_first_step_seconds: float
    versions: Mapping[str, str]
    workers: list[WorkerReport]
    restarts: int = 0
    resumed_from: str | None = None
    weights: list[NDArray[Any]] = field(default_factory=list, repr=False)
    model: Any = field(default=None, repr=False)

    def to_json(self) -> str:
        """All but ``weights`` and ``model``, as JSON."""
        plain = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("weights", "model", "workers")
        }
        return json.dumps({**plain, "workers": [dataclasses.asdict(worker) for worker in self.workers]}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> FitResult:
        """The result that ``to_json`` wrote, without weights and model."""
        plain = json.loads(text)
        return cls(**{**plain, "workers": [WorkerReport(**worker) for worker in plain["workers"]]})


def versions() -> dict[str, str]:
    """Version by package of what is installed here, and Python's."""
    return {"python": platform.python_version(), **installed_versions(_VERSIONS_OF)}
