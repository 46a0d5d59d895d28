"""Model and weights files from anywhere, read safely."""

from __future__ import annotations

from dlspark.model_files.model import MODEL, check_model_file, load_model
from dlspark.model_files.weights import load_weights

__all__ = [
    "MODEL",
    "check_model_file",
    "load_model",
    "load_weights",
]
