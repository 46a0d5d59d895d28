"""WorkerSession: what an engine gives the training loop in one worker."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


class WorkerSession:
    """One worker among ``world_size``. This class is the session of a single worker: both exchanges are the identity.

    Engines override ``sum``, and may override ``broadcast``. All ranks call them in the same order, with the same shapes and
    dtypes.

    Attributes:
        rank: this worker, from 0.
        world_size: the number of workers.
        threads: intra-op threads of this worker; None leaves the framework's default.
        needs_gpu: the cluster gave this worker a GPU, so computing without one is an error.
        compiles: ``sum`` works inside a step compiled by XLA.
        exchanges: the workers exchange gradients within an epoch. False for engines that average weights between epochs.
    """

    def __init__(
        self,
        rank: int = 0,
        world_size: int = 1,
        *,
        threads: int | None = None,
        needs_gpu: bool = False,
        compiles: bool = False,
        exchanges: bool = True,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.threads = threads
        self.needs_gpu = needs_gpu
        self.compiles = compiles
        self.exchanges = exchanges and world_size > 1

    def sum(self, tensors: Sequence[Any]) -> list[Any]:
        """The elementwise sums of ``tensors`` over all workers, inside a traced step or outside.

        Args:
            tensors: dense tensors of the Keras backend, of any floating dtypes and shapes.

        Returns:
            One tensor for each, of the same shape and dtype, bit-identical on all ranks.
        """
        return list(tensors)

    def broadcast(self, arrays: Sequence[Any]) -> list[Any]:
        """Copies of rank 0's ``arrays`` on every rank, bit by bit, of any dtypes and shapes. Called outside steps."""
        if not self.exchanges:
            return list(arrays)
        import keras

        values = [np.asarray(array) for array in arrays]
        data = b"".join(value.tobytes() for value in values)
        # float32 holds 16 bits exactly, and all other ranks add zeros, so engines need not implement this.
        halves = np.frombuffer(data + bytes(len(data) % 2), np.uint16).astype(np.float32)
        (total,) = self.sum([keras.ops.convert_to_tensor(halves if self.rank == 0 else np.zeros_like(halves))])
        data = keras.ops.convert_to_numpy(total).astype(np.uint16).tobytes()
        copies, start = [], 0
        for value in values:
            copies.append(np.frombuffer(data, value.dtype, value.size, start).reshape(value.shape))
            start += value.nbytes
        return copies
