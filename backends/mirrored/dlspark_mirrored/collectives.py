"""WorkerSession over TensorFlow's collective operations.

The strategy is built for one thing only: it starts the collective group and its gRPC server. Model, variables and ``fit``
stay plain Keras, outside its scope, because Keras 3 does not train inside it (keras-team/keras#20585).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from dlspark.plugin import WorkerSession

# Any constant will do, as long as it is equal on all ranks and not one of the strategy's own (those count from 1).
GROUP_KEY = 1_000_000


class CollectiveSession(WorkerSession):
    """Sums by ``CollectiveReduceV2`` over the flattened, concatenated tensors.

    Args:
        strategy: a ``tf.distribute.MultiWorkerMirroredStrategy`` with one device per worker.
        bytes_per_pack: about how many bytes go into one operation; packs overlap each other.
        timeout_seconds: the most that one operation waits for its peers; 0 waits forever.
    """

    def __init__(
        self, strategy: Any, *, rank: int, world_size: int, bytes_per_pack: int, timeout_seconds: float, **kwargs: Any
    ) -> None:
        super().__init__(rank, world_size, **kwargs)
        self._device = strategy.extended.worker_devices[0]
        self._bytes_per_pack = bytes_per_pack
        self._timeout_seconds = timeout_seconds
        # Ranks trace and call in the same order, so counting gives every operation the same key everywhere.
        self._instance_keys = itertools.count(1)

    def sum(self, tensors: Sequence[Any]) -> list[Any]:
        import tensorflow as tf

        totals: list[Any] = [None] * len(tensors)
        with tf.device(self._device):
            for pack in self._packs(tensors):
                flat = tf.concat([tf.reshape(tensors[i], [-1]) for i in pack], axis=0)
                reduced = tf.raw_ops.CollectiveReduceV2(
                    input=flat,
                    group_size=self.world_size,
                    group_key=GROUP_KEY,
                    instance_key=next(self._instance_keys),
                    ordering_token=[],
                    merge_op="Add",
                    final_op="Id",
                    communication_hint="auto",
                    timeout_seconds=self._timeout_seconds,
                )
                sizes = [tf.size(tensors[i]) for i in pack]
                for i, part in zip(pack, tf.split(reduced, sizes), strict=True):
                    totals[i] = tf.reshape(part, tf.shape(tensors[i]))
        return totals

    def _packs(self, tensors: Sequence[Any]) -> list[list[int]]:
        """Indices of ``tensors`` in packs of one dtype and about ``bytes_per_pack`` bytes, in order."""
        packs: list[list[int]] = []
        open_packs: dict[Any, tuple[list[int], int]] = {}
        for i, tensor in enumerate(tensors):
            size = (tensor.shape.num_elements() or 1) * tensor.dtype.size
            pack, filled = open_packs.get(tensor.dtype, ([], 0))
            if not pack or filled + size > self._bytes_per_pack:
                pack, filled = [], 0
                packs.append(pack)
            pack.append(i)
            open_packs[tensor.dtype] = (pack, filled + size)
        return packs
