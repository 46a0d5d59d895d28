"""The contract on `local` under jax, in its own environment without TensorFlow and Spark."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PYTHON = ROOT / ".venv-jax" / "bin" / "python"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not PYTHON.exists(), reason="there is no .venv-jax: run `make set-up-jax`"),
]


def run(*arguments: str) -> str:
    env = {**os.environ, "KERAS_BACKEND": "jax", "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [str(PYTHON), *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_environment_is_what_it_claims() -> None:
    code = "import importlib.util as u; print([m for m in ('tensorflow', 'pyspark', 'torch', 'jax') if u.find_spec(m)])"
    assert run("-c", code).strip() == "['jax']"


def test_the_contract_under_jax() -> None:
    flags = ("-q", "-p", "no:cacheprovider", "--import-mode=importlib")
    assert "passed" in run("-m", "pytest", *flags, "tests/test_contract_local.py")


def test_synchronized_batch_normalisation_needs_tensorflow() -> None:
    code = """
from dlspark import ConfigError, build_classifier
try:
    build_classifier("mobilenetv2", 3, image_size=(32, 32), weights=None, batch_norm="synchronized")
except ConfigError as error:
    print(error)
"""
    assert "Expected Keras on TensorFlow for batch_norm='synchronized'; got 'jax'" in run("-c", code)
