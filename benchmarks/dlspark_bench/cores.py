"""Limit the threads and cores of a measured process."""

from __future__ import annotations

import os


def own_threads(threads: int) -> None:
    """Limit Keras' framework to ``threads`` threads. Call this before it computes."""
    name = os.environ.get("KERAS_BACKEND", "tensorflow")
    if name == "tensorflow":
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)
    elif name == "torch":
        import torch

        torch.set_num_threads(threads)
    else:
        own_cores(threads)  # XLA starts a thread for each available core


def own_cores(count: int) -> None:
    """Pin this process to ``count`` cores that no other process of its subject uses."""
    if hasattr(os, "sched_setaffinity"):
        free = sorted(os.sched_getaffinity(0))
        first = int(os.environ.get("DLSPARK_BENCH_INDEX", "0")) * count
        os.sched_setaffinity(0, {free[(first + i) % len(free)] for i in range(count)})
