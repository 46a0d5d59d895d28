"""The one module of dlspark that a plug-in imports. CONTRIBUTING.md shows how to write a plug-in."""

from __future__ import annotations

from dlspark.backend import Backend, Capabilities, Engine, LaunchBackend, SparkLaunchBackend, WorkerFunction, watched
from dlspark.data import Feed, num_steps
from dlspark.driver import RunMonitor
from dlspark.errors import ConfigError, MissingDependencyError, WorkerError
from dlspark.job import (
    MODEL_FILE,
    PAYLOAD_FILE,
    FitResult,
    JobSettings,
    TrainJob,
    WorkerReport,
    WorkerResult,
    load_job,
    versions,
)
from dlspark.mends import horovod_lifetime, tensorflow_context
from dlspark.mends.horovod_connections import ending_connections
from dlspark.mends.horovod_rendezvous import stopped_rendezvous
from dlspark.mends.horovod_signals import own_signals
from dlspark.spark import cancellable, check_cluster, driver_host, get_session, is_local, own_gpus, task_resources
from dlspark.storage import Checkpoints, Position, Store
from dlspark.wire import Endpoint, Frames, Reporter, Server, SocketEndpoint, messages
from dlspark.worker import (
    WorkerSession,
    WorkerStatus,
    callback_arrays,
    capture,
    describe_device,
    environment,
    load_model,
    load_payload,
    moving,
    optimizers_of,
    own_threads,
    reporting,
    restore_callbacks,
    resumed,
    save_trained,
    seed_variables,
    set_weights,
    train,
    worker_environment,
    worker_report,
)

__all__ = [
    "MODEL_FILE",
    "PAYLOAD_FILE",
    "Backend",
    "Capabilities",
    "Checkpoints",
    "ConfigError",
    "Endpoint",
    "Engine",
    "Feed",
    "FitResult",
    "Frames",
    "JobSettings",
    "LaunchBackend",
    "MissingDependencyError",
    "Position",
    "Reporter",
    "RunMonitor",
    "Server",
    "SocketEndpoint",
    "SparkLaunchBackend",
    "Store",
    "TrainJob",
    "WorkerError",
    "WorkerFunction",
    "WorkerReport",
    "WorkerResult",
    "WorkerSession",
    "WorkerStatus",
    "callback_arrays",
    "cancellable",
    "capture",
    "check_cluster",
    "describe_device",
    "driver_host",
    "ending_connections",
    "environment",
    "get_session",
    "horovod_lifetime",
    "is_local",
    "load_job",
    "load_model",
    "load_payload",
    "messages",
    "moving",
    "num_steps",
    "optimizers_of",
    "own_gpus",
    "own_signals",
    "own_threads",
    "reporting",
    "restore_callbacks",
    "resumed",
    "save_trained",
    "seed_variables",
    "set_weights",
    "stopped_rendezvous",
    "task_resources",
    "tensorflow_context",
    "train",
    "versions",
    "watched",
    "worker_environment",
    "worker_report",
]
