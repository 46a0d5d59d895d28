"""What runs in a worker."""

from __future__ import annotations

from dlspark.worker.callbacks import callback_arrays, moving, restore_callbacks
from dlspark.worker.device import describe_device, own_threads, worker_report
from dlspark.worker.entry import build, load_model, reporting, resumed, run_worker, worker_environment
from dlspark.worker.exactness import check_exact, check_mergeable
from dlspark.worker.given_model import save_model
from dlspark.worker.loop import train
from dlspark.worker.model_parts import optimizers_of
from dlspark.worker.model_state import (
    capture,
    give_back,
    load_trained,
    save_initial_weights,
    save_trained,
    seed_variables,
    set_weights,
    weight_shapes,
    weights_of,
)
from dlspark.worker.payload import load_payload, pickled_payload
from dlspark.worker.process import dtype_policy, environment, random_states
from dlspark.worker.session import WorkerSession
from dlspark.worker.status import WorkerStatus

__all__ = [
    "WorkerSession",
    "WorkerStatus",
    "build",
    "callback_arrays",
    "capture",
    "check_exact",
    "check_mergeable",
    "describe_device",
    "dtype_policy",
    "environment",
    "give_back",
    "load_model",
    "load_payload",
    "load_trained",
    "moving",
    "optimizers_of",
    "own_threads",
    "pickled_payload",
    "random_states",
    "reporting",
    "restore_callbacks",
    "resumed",
    "run_worker",
    "save_initial_weights",
    "save_model",
    "save_trained",
    "seed_variables",
    "set_weights",
    "train",
    "weight_shapes",
    "weights_of",
    "worker_environment",
    "worker_report",
]
