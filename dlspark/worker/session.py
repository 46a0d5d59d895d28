"""WorkerSession: what an engine gives the training loop in one worker."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


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
        """Rank 0's ``arrays`` on every rank. Called outside steps."""
        if not self.exchanges:
            return list(arrays)
        import keras

        # All other ranks add zeros, so the sum is exact, and engines need not implement this.
        mine = [keras.ops.convert_to_tensor(a if self.rank == 0 else a * 0) for a in arrays]
        return [keras.ops.convert_to_numpy(total) for total in self.sum(mine)]
