"""Measuring under jax and numpy 2, without Spark or TensorFlow, on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from dlspark_bench.cli import main
from dlspark_bench.figures import Run

ROOT = Path(__file__).parent.parent.parent
COMMAND = ROOT / ".venv-jax" / "bin" / "dlspark-bench"
FLAGS = ("--model", "small_cnn", "--image-size", "32", "--rows-per-core", "32", "--batch-per-core", "16", "--repeats", "1")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not COMMAND.exists(), reason=".venv-jax is missing: run `make set-up-jax`"),
]


def run(out: Path, *flags: str) -> Path:
    env = {**os.environ, "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [str(COMMAND), "run", *FLAGS, *flags, "--out", str(out), "--format", "json"],
        cwd=out, env=env, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return Path(json.loads(done.stdout)["written"])


@pytest.mark.full
def test_a_compiled_run_in_mixed_precision_compares_with_a_tensorflow_run(
    recorded: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run(tmp_path, "--dtype", "mixed_bfloat16", "--jit-compile", "true", "--subjects", "local:1x1")
    about, peak, *_ = map(json.loads, path.read_text().splitlines())
    assert about["keras_backend"] == "jax"
    assert {"jax", "numpy"} <= set(about["versions"])
    assert not {"tensorflow", "pyspark", "torch"} & set(about["versions"])
    assert about["versions"]["numpy"].startswith("2.")
    assert peak["dtype"] == "bfloat16"
    assert main(["compare", str(recorded.path), str(path), "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["subject"] for row in rows] == [*recorded.results, "local:1x1"]
    assert all(row["images/s"] > 0 for row in rows)


def test_without_a_gpu_a_gpu_is_not_measured(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"Expected a GPU; got cpu:0.* from jax"):
        run(tmp_path, "--backend", "local", "--device", "gpu")
