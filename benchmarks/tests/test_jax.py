"""Without Spark and TensorFlow, under jax and numpy 2, as on a GPU machine but on the CPU; and its results beside others."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from dlspark_bench.cli import main
from dlspark_bench.run import measure
from dlspark_bench.scenario import Scenario

ROOT = Path(__file__).parent.parent.parent
COMMAND = ROOT / ".venv-jax" / "bin" / "dlspark-bench"
FLAGS = ("--model", "small_cnn", "--image-size", "16", "--rows-per-core", "64", "--batch-per-core", "16", "--repeats", "3")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not COMMAND.exists(), reason="there is no .venv-jax: run `make set-up-jax`"),
]


def run(out: Path, *flags: str) -> Path:
    env = {**os.environ, "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [str(COMMAND), "run", *FLAGS, *flags, "--out", str(out), "--format", "json"],
        cwd=out, env=env, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return Path(json.loads(done.stdout)["written"])


def test_it_measures_and_its_results_merge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run(tmp_path, "--backend", "local")
    about = json.loads(path.read_text().splitlines()[0])
    assert about["keras_backend"] == "jax"
    assert {"jax", "numpy"} <= set(about["versions"])
    assert not {"tensorflow", "pyspark", "torch"} & set(about["versions"])
    assert about["versions"]["numpy"].startswith("2.")
    scenario = Scenario(
        name="tensorflow", model="small_cnn", image_size=16, rows_per_core=64, batch_per_core=16, subjects=("loop:1x1",)
    )
    other = measure(scenario, tmp_path)
    assert main(["compare", str(other), str(path), "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["subject"] for row in rows] == ["loop:1x1", "loop:1x1", f"loop:1x{about['hardware']['cores']}", "local:1x1"]
    assert all(row["images/s"] > 0 for row in rows)


def test_mixed_precision_and_compilation(tmp_path: Path) -> None:
    path = run(tmp_path, "--dtype", "mixed_bfloat16", "--jit-compile", "true", "--subjects", "local:1x1")
    assert json.loads(path.read_text().splitlines()[1])["dtype"] == "bfloat16"


def test_without_a_gpu_a_gpu_is_not_measured(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="Expected a GPU: jax sees cpu:0"):
        run(tmp_path, "--backend", "local", "--device", "gpu")
