"""TensorFlow's eager context cannot be reconfigured in a process that has used it, and Spark reuses Python workers.

Collective groups, thread pools and visible devices are fixed when the context starts: a second training in the same
process meets the first one's cluster. spark-tensorflow-distributor resets the context by the same private call before it
builds its strategy, unless it is told to leave the strategy to the caller (tensorflow/tensorflow#34568).
"""

from __future__ import annotations

_generation = 0


def generation() -> int:
    """How often this process' context was reset: whoever keeps tensors must drop them when it has changed."""
    return _generation


def reset() -> None:
    """Drop this process' eager context; the next operation starts a fresh one. Existing tensors become unusable."""
    global _generation
    _generation += 1
    from tensorflow.python.eager import context  # private: TensorFlow has no public way

    context._reset_context()
