"""Measure this machine's peak in floating-point operations per second. No result can exceed it."""

from __future__ import annotations

import json
import os
import sys
import time

from dlspark_bench.hardware import devices

REPEATS = 12


def measured_peak(dtype: str, threads: int, device: str) -> float:
    """Return the best FLOP/s of several square matrix products, computed in this process by the framework that trains.

    Args:
        dtype: the compute dtype of the policy: "float32", "bfloat16" or "float16".
        threads: number of threads; no effect on a GPU.
        device: "cpu" or "gpu".
    """
    from dlspark_bench.cores import own_threads

    if device == "cpu":
        own_threads(threads)
    devices(device)
    import keras
    import numpy as np

    size = 8192 if device == "gpu" else 1536
    one = keras.ops.cast(np.random.default_rng(0).standard_normal((size, size), np.float32), dtype)
    best = 0.0
    for _ in range(REPEATS):
        started = time.perf_counter()
        # Copy a number to the host, because frameworks return before they have computed.
        float(keras.ops.convert_to_numpy(keras.ops.cast(keras.ops.matmul(one, one)[0, 0], "float32")))
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


if __name__ == "__main__":
    if sys.argv[3] == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    print(json.dumps(measured_peak(sys.argv[1], int(sys.argv[2]), sys.argv[3])))
