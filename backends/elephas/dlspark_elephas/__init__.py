"""dlspark's backend on Elephas: workers train for an epoch on their own, then their weights are averaged."""

from dlspark_elephas.backend import ElephasBackend, ElephasOptions

__all__ = ["ElephasBackend", "ElephasOptions"]
