"""A third-party plug-in: it starts its own processes and sums over them with a shared list and a barrier."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import Any, ClassVar

import numpy as np

from dlspark.plugin import Capabilities, LaunchBackend, WorkerFunction, WorkerResult, WorkerSession


class ListSession(WorkerSession):
    def sum(self, tensors: Any) -> list[Any]:
        import tensorflow as tf

        totals = tf.nest.flatten(tf.numpy_function(self.exchange, list(tensors), [t.dtype for t in tensors]))
        return [tf.ensure_shape(total, tensor.shape) for total, tensor in zip(totals, tensors, strict=True)]

    def exchange(self, *mine: Any) -> list[Any]:
        self.box[self.rank] = mine
        self.barrier.wait(60)
        totals = [np.sum(parts, axis=0) for parts in zip(*self.box, strict=True)]
        self.barrier.wait(60)
        return totals


class ProcessesBackend(LaunchBackend):
    name: ClassVar[str] = "processes"
    capabilities = Capabilities(
        synchronous_gradients=True, exact_rows=True, deterministic=True, resumable=True, max_workers=2
    )

    def launch(self, function: WorkerFunction, num_workers: int) -> list[WorkerResult]:
        context = multiprocessing.get_context("forkserver")
        with context.Manager() as manager, ProcessPoolExecutor(num_workers, mp_context=context) as pool:
            shared = (num_workers, manager.list([None] * num_workers), manager.Barrier(num_workers))
            return [f.result() for f in [pool.submit(work, function, rank, *shared) for rank in range(num_workers)]]


def work(function: WorkerFunction, rank: int, num_workers: int, box: Any, barrier: Any) -> WorkerResult:
    session = ListSession(rank, num_workers)
    session.box, session.barrier = box, barrier
    return function(session)
