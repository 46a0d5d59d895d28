"""Runner: MirroredStrategyRunner that leaves the environment of Spark's Python workers as it found it.

spark-tensorflow-distributor sets TF_CONFIG and CUDA_VISIBLE_DEVICES in a Python worker that Spark uses again for other
tasks, and never unsets them: TensorFlow in a later task would wait for a cluster that is gone, or see no GPU
(tensorflow/ecosystem#177).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from spark_tensorflow_distributor import MirroredStrategyRunner

from dlspark.plugin import environment

CHANGED = ("TF_CONFIG", "CUDA_VISIBLE_DEVICES")


class Runner(MirroredStrategyRunner):
    """Launches as its parent does."""

    def _get_spark_task_program(self, train_fn: Callable[..., Any], **kwargs: Any) -> Callable[[Any], Any]:
        program = super()._get_spark_task_program(train_fn, **kwargs)

        def restoring(partition: Any) -> Any:
            # Unset inside: the parent takes Spark's addresses as positions in a CUDA_VISIBLE_DEVICES that it finds.
            with environment(**dict.fromkeys(CHANGED)):
                return program(partition)

        return restoring
