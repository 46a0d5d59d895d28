"""F4: an executor's JVM is killed; the run goes on, on the one that takes its place."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytestmark = [pytest.mark.timeout(240), pytest.mark.spark, pytest.mark.cluster]

SCRIPT = """
import os, sys
from pyspark.sql import SparkSession
from dlspark import Trainer
from dlspark.spark.java import find_java
from dlspark.testing import toys
from dlspark.testing.faults import Fault, disturbed_classifier

def fit(engine, folder, **settings):
    trainer = Trainer(engine, num_workers=2, store=folder + "/store", max_restarts=1, **settings)
    fault = Fault(action="kill executor", marker=folder + "/happened", driver=1)
    return trainer.fit(disturbed_classifier(fault), toys.separable(1003), epochs=3, batch_size=64, seed=3, verbose=0)

if __name__ == "__main__":
    os.environ["JAVA_HOME"] = str(find_java())
    os.environ["PYSPARK_PYTHON"] = sys.executable
    folder = sys.argv[1]
    builder = SparkSession.builder.master("local-cluster[2,1,768]").config("spark.executor.memory", "768m")
    builder = builder.config("spark.driver.host", "127.0.0.1").config("spark.driver.bindAddress", "127.0.0.1")
    spark = builder.config("spark.ui.enabled", "false").getOrCreate()
    spark.sparkContext.setLogLevel("OFF")
    try:
        for engine in sys.argv[2:]:
            os.makedirs(f"{folder}/{engine}")
            disturbed = fit(engine, f"{folder}/{engine}")
            os.makedirs(f"{folder}/{engine}-undisturbed")
            open(f"{folder}/{engine}-undisturbed/happened", "w").close()
            expected = fit(engine, f"{folder}/{engine}-undisturbed")
            same = all((a == b).all() for a, b in zip(disturbed.weights, expected.weights, strict=True))
            print("RESULT", engine, disturbed.restarts, same and disturbed.history == expected.history, flush=True)
    finally:
        spark.stop()
"""


@pytest.mark.usually("mirrored")
@pytest.mark.parametrize("engine", ["mirrored", "horovod", "elephas"])
def test_f4_an_executor_is_killed(engine: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, str(script), str(tmp_path), engine]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=220, check=False, env=environment)
    assert f"RESULT {engine} 1 True" in run.stdout, run.stdout[-1000:] + run.stderr[-4000:]
    (log,) = tmp_path.glob(f"{engine}/store/run-*/events.jsonl")
    events = [json.loads(line) for line in log.read_text().splitlines()]
    told = next(event["time"] for event in events if event["kind"] == "failure")
    happened = (tmp_path / engine / "happened").stat().st_mtime
    assert told - happened < 10
    again = next(event for event in events if event["kind"] == "step" and event["time"] > told)
    assert again["time"] - happened < 60
    assert again["epoch"] == 1
