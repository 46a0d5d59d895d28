"""Describe the machine: processor, memory, GPU, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from dlspark import ConfigError, available_backends, load_backend

_FRAMEWORKS = ("dlspark", "keras", "tensorflow", "jax", "torch", "numpy")
_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16")  # they determine the speed of a matrix product


def hardware() -> dict[str, Any]:
    """Return plain data: ``cpu``, ``cpu_flags``, ``cores`` that this process may use, ``memory_bytes``, ``gpus``."""
    return {
        "cpu": _cpu_field("model name") or platform.processor() or platform.machine(),
        "cpu_flags": [flag for flag in _FLAGS if flag in _cpu_field("flags").split()],
        "cores": cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": gpus(),
    }


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpus() -> list[dict[str, str]]:
    """Return name, UUID and driver of each NVIDIA GPU; empty without nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=name,uuid,driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in told.splitlines() if line.strip()]
    return [dict(zip(("name", "uuid", "driver"), row, strict=True)) for row in rows if len(row) == 3]


def devices(wanted: str) -> list[str]:
    """Return the devices that Keras' framework uses in this process.

    Raises:
        ConfigError: ``wanted`` is "gpu" and there is none.
    """
    import keras

    if keras.backend.backend() == "torch":  # Keras cannot list torch's devices
        import torch

        found = [f"cuda:{number}" for number in range(torch.cuda.device_count())] or ["cpu:0"]
    else:
        found = [str(name) for name in keras.distribution.list_devices()]
    if wanted == "gpu" and not any(name.startswith(("gpu", "cuda")) for name in found):
        raise ConfigError(
            f"Expected a GPU; got {', '.join(found)} from {keras.backend.backend()}. Install a build with GPU support and "
            "its driver, or use --device cpu."
        )
    return found


def versions() -> dict[str, str]:
    """Return the versions of Python and of the relevant packages that are installed."""
    found = {"python": platform.python_version()}
    engines = [package for backend in available_backends() for package in load_backend(backend).engine.packages]
    for name in (*_FRAMEWORKS, "pyspark", *engines):
        try:
            found[name] = metadata.version("dlspark-keras" if name == "dlspark" else name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Return the commit of this checkout, with ``+`` if files were changed; None outside a checkout."""
    try:
        head = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+" if changed else "")


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=30, check=True
    )
    return done.stdout.strip()


def _cpu_field(name: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == name), "")
