"""Train a Keras 3 model on a Spark cluster by changing one word, and know what that bought you."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dlspark.data import ShardedRows, Split
    from dlspark.errors import (
        ConfigError,
        DataError,
        DlsparkError,
        MissingDependencyError,
        NonFiniteLossError,
        RunInterruptedError,
        WorkerError,
    )
    from dlspark.images import ImageDataset, prepare_images
    from dlspark.job import FitResult, WorkerReport
    from dlspark.models import build_classifier
    from dlspark.registry import available_backends, load_backend
    from dlspark.timeouts import Timeouts
    from dlspark.trainer import Trainer

# Looked up on first use: `import dlspark` stays instant and loads no framework.
_HOMES = {
    "ConfigError": "errors",
    "DataError": "errors",
    "DlsparkError": "errors",
    "FitResult": "job",
    "ImageDataset": "images",
    "MissingDependencyError": "errors",
    "NonFiniteLossError": "errors",
    "RunInterruptedError": "errors",
    "ShardedRows": "data",
    "Split": "data",
    "Timeouts": "timeouts",
    "Trainer": "trainer",
    "WorkerError": "errors",
    "WorkerReport": "job",
    "available_backends": "registry",
    "build_classifier": "models",
    "load_backend": "registry",
    "prepare_images": "images",
}

__all__ = [
    "ConfigError",
    "DataError",
    "DlsparkError",
    "FitResult",
    "ImageDataset",
    "MissingDependencyError",
    "NonFiniteLossError",
    "RunInterruptedError",
    "ShardedRows",
    "Split",
    "Timeouts",
    "Trainer",
    "WorkerError",
    "WorkerReport",
    "available_backends",
    "build_classifier",
    "load_backend",
    "prepare_images",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dlspark' has no attribute {name!r}")
    return getattr(import_module(f"dlspark.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
