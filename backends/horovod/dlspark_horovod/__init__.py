"""dlspark's backend on Horovod: a ring all-reduce between processes that Spark tasks start."""

from dlspark_horovod.backend import HorovodBackend, HorovodOptions

__all__ = ["HorovodBackend", "HorovodOptions"]
