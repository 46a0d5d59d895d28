"""F4: an executor's JVM is killed; the run resumes on its replacement."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.faults.disturbed import assert_equal, events, finished, undisturbed

pytestmark = [pytest.mark.timeout(240), pytest.mark.spark, pytest.mark.cluster]

SCRIPT = """
import os, sys
from pathlib import Path
from pyspark.sql import SparkSession
from dlspark.spark.java import find_java
from dlspark.testing.faults import Fault
from tests.faults.disturbed import fit, trainer

if __name__ == "__main__":
    os.environ["JAVA_HOME"] = str(find_java())
    os.environ["PYSPARK_PYTHON"] = sys.executable
    engine, folder = sys.argv[1], Path(sys.argv[2])
    builder = SparkSession.builder.master("local-cluster[2,1,768]").config("spark.executor.memory", "768m")
    builder = builder.config("spark.driver.host", "127.0.0.1").config("spark.driver.bindAddress", "127.0.0.1")
    spark = builder.config("spark.ui.enabled", "false").getOrCreate()
    spark.sparkContext.setLogLevel("OFF")
    try:
        fault = Fault(action="kill executor", marker=str(folder / "happened"), driver=1)
        fit(trainer(engine, folder, max_restarts=1, timeouts=None), fault)
    finally:
        spark.stop()
"""


@pytest.mark.usually("mirrored")
@pytest.mark.parametrize("engine", ["mirrored", "horovod", "elephas"])
def test_f4_an_executor_is_killed(engine: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, str(script), engine, str(tmp_path)]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.run(command, capture_output=True, text=True, timeout=220, check=False, env=environment)
    assert run.returncode == 0, run.stdout[-1000:] + run.stderr[-4000:]
    result, told = finished(tmp_path), events(tmp_path)
    assert result.restarts == 1
    assert_equal(result, undisturbed(engine))
    failed = next(event["time"] for event in told if event["kind"] == "failure")
    happened = (tmp_path / "happened").stat().st_mtime
    assert failed - happened < 10
    again = next(event for event in told if event["kind"] == "step" and event["time"] > failed)
    assert again["time"] - happened < 60
    assert again["epoch"] == 1
