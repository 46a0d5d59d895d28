"""The threads and cores that a measured process computes with."""

from __future__ import annotations

import os


def own_threads(threads: int) -> None:
    """Compute with that many threads, under whatever framework Keras uses. To be called before it computes."""
    name = os.environ.get("KERAS_BACKEND", "tensorflow")
    if name == "tensorflow":
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)
    elif name == "torch":
        import torch

        torch.set_num_threads(threads)
    else:
        own_cores(threads)  # XLA takes a thread for every core that it may use


def own_cores(count: int) -> None:
    """Keep this process on ``count`` cores, others than those of its neighbours in the same subject."""
    if hasattr(os, "sched_setaffinity"):
        free = sorted(os.sched_getaffinity(0))
        first = int(os.environ.get("DLSPARK_BENCH_INDEX", "0")) * count
        os.sched_setaffinity(0, {free[(first + i) % len(free)] for i in range(count)})
