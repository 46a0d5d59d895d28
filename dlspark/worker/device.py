"""A worker's threads and device, and the report of its resources."""

from __future__ import annotations

import os
import resource
import socket

from dlspark.errors import ConfigError
from dlspark.job import WorkerReport
from dlspark.worker.loop import Trained
from dlspark.worker.session import WorkerSession


def own_threads(threads: int) -> None:
    """Make TensorFlow compute with ``threads`` threads. Call it before TensorFlow creates its context.

    This limits both thread pools: on one core, even a second inter-op thread competes with the first.
    """
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)


def describe_device(session: WorkerSession) -> str:
    """A description of the device of this process, for the report.

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
