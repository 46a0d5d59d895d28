"""TensorFlow's eager context cannot be reconfigured once it is in use, and Spark reuses Python workers.

Collective groups, thread pools and visible devices are fixed when the context starts, so a second training in the same
process would use the cluster of the first. spark-tensorflow-distributor resets the context by the same private call before
it builds its strategy, but not if the caller builds it (tensorflow/tensorflow#34568).
"""

from __future__ import annotations

_generation = 0


def generation() -> int:
    """The number of resets in this process. Tensors from before a reset are unusable."""
    return _generation


def reset() -> None:
    """Reset the eager context of this process; the next operation starts a new one. Existing tensors become unusable."""
    global _generation
    _generation += 1
    from tensorflow.python.eager import context  # private: TensorFlow has no public way

    context._reset_context()
