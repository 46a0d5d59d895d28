"""WorkerSession: all that an engine gives the training loop inside one worker."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class WorkerSession:
    """One worker among ``world_size``. This class is the session of a world of one: both exchanges are the identity.

    An engine overrides ``sum`` and ``broadcast``. Every rank calls them in the same order with the same shapes and dtypes.

    Attributes:
        rank: this worker, from 0.
        world_size: the number of workers.
        threads: intra-op threads that this worker owns; None leaves the framework's own choice.
        needs_gpu: the cluster gave this worker a GPU; computing without one is an error.
        compiles: ``sum`` works inside a step compiled by XLA.
        exchanges: the workers exchange within an epoch. False for engines that average weights between epochs.
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
        """The elementwise sums of ``tensors`` over all workers, inside a traced step and outside.

        Args:
            tensors: dense tensors of the Keras backend, of any floating dtypes and shapes.

        Returns:
            One tensor per tensor, of the same shape and dtype, equal to the bit on all ranks.
        """
        return list(tensors)

    def broadcast(self, arrays: Sequence[Any]) -> list[Any]:
        """Rank 0's ``arrays`` on every rank. Called outside of steps."""
        if not self.exchanges:
            return list(arrays)
        import keras

        # A sum in which only rank 0 has a say: exact, and no engine has to write it twice.
        mine = [keras.ops.convert_to_tensor(a if self.rank == 0 else a * 0) for a in arrays]
        return [keras.ops.convert_to_numpy(total) for total in self.sum(mine)]
