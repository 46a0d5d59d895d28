"""dlspark's backend on spark-tensorflow-distributor: TensorFlow collectives between the tasks of one barrier stage."""

from dlspark_mirrored.backend import MirroredBackend, MirroredOptions

__all__ = ["MirroredBackend", "MirroredOptions"]
