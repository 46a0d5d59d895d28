"""Train on executors that lack something, in processes of their own, and write how each fit is refused.

Arguments: the working folder; the file to write. The executors' Python is a shell script that prepares the case named by
the variable CASE and then runs Python. Spark passes CASE to its Python workers and starts new ones for each value.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pyspark
from pyspark.sql import SparkSession

from dlspark import DlsparkError, Trainer, load_backend
from dlspark.data.shards import ShardedRows
from dlspark.job import TrainJob
from dlspark.spark.java import find_java
from dlspark.spark.slots import require_slots
from dlspark.testing import toys

LOOPBACK = "127.0.0.1"
PYTHON = """\
#!/bin/sh
case "$CASE" in
    version) export PYTHONPATH="{folder}/version:$PYTHONPATH" ;;
    minor) export PYTHONPATH="{folder}/minor:$PYTHONPATH" ;;
    absent) export PYTHONPATH="{packages}"; exec "{python}" -S "$@" ;;  # no .pth file leads to the checkout
    unwritable) ulimit -f 0 ;;
    nothing) exec /no/such/python ;;
esac
exec "{python}" "$@"
"""
# Simulates another Python version on a machine that has only one.
OLDER = """\
import collections, sys
Info = collections.namedtuple("Info", "major minor micro releaselevel serial")
sys.version_info = Info(3, 7, 1, "final", 0)
"""


def session(folder: Path, **settings: str) -> SparkSession:
    """Two one-core executors on this machine. Their Spark home consists of links, because they write to its `work`."""
    home = folder / "spark"
    installed = Path(pyspark.__file__).parent
    if not home.exists():
        home.mkdir()
        for name in ("bin", "jars", "python"):
            (home / name).symlink_to(installed / name)
    (core,) = (home / "jars").glob("spark-core_*.jar")
    os.environ.update(
        JAVA_HOME=str(find_java()),
        SPARK_HOME=str(home),
        SPARK_SCALA_VERSION=core.name.removeprefix("spark-core_").partition("-")[0],
        SPARK_LOCAL_IP=LOOPBACK,
        PYSPARK_PYTHON=str(folder / "python"),
    )
    builder = SparkSession.builder.master("local-cluster[2,1,512]")
    settings = {
        "spark.dynamicAllocation.enabled": "false",  # explicit, because the JVM keeps its first session's settings
        "spark.driver.host": LOOPBACK,
        "spark.driver.bindAddress": LOOPBACK,
        "spark.executor.memory": "512m",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        **settings,
    }
    for key, value in settings.items():
        builder = builder.config(key, value)
    return builder.getOrCreate()


def write_pythons(folder: Path) -> None:
    """Write the executors' Python, and the packages that it finds before the real ones."""
    other = folder / "version" / "cloudpickle-0.0.1.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: cloudpickle\nVersion: 0.0.1\n")
    (folder / "minor").mkdir()
    (folder / "minor" / "sitecustomize.py").write_text(OLDER)
    packages = Path(numpy.__file__).parent.parent
    python = folder / "python"
    python.write_text(PYTHON.format(folder=folder, packages=packages, python=sys.executable))
    python.chmod(0o755)


def refusal(act: Callable[[], Any]) -> dict[str, Any]:
    """The type, message and duration of a refusal; after success, only the duration."""
    started = time.monotonic()
    try:
        act()
    except (DlsparkError, AssertionError) as error:
        return {"type": type(error).__name__, "error": str(error), "seconds": time.monotonic() - started}
    return {"seconds": time.monotonic() - started}


def fit(store: str | Path, engine: str = "elephas") -> None:
    """Fit a small model; reaching the launch is an error."""
    trainer = Trainer(engine, num_workers=2, store=str(store))

    def launched(job: Any) -> Any:
        raise AssertionError("the job was launched")

    trainer._backend.fit = launched  # type: ignore[method-assign]
    trainer.fit(toys.dense_classifier(), toys.separable(60), batch_size=20, verbose=0)


def check(store: Path, engine: str) -> None:
    """Run the engine's own check of the cluster."""
    rows = ShardedRows(str(store), ("a",), (4,), "x", "y")
    job = TrainJob(uri=str(store), num_workers=2, epochs=1, batch_size=2, seed=0, train=rows)
    load_backend(engine).from_options(None).check(job, job.uri)


def main(folder: Path, out: Path) -> None:
    """Run every case in one session, except dynamic allocation, which needs another one."""
    write_pythons(folder)
    toys.dense_classifier()  # loads TensorFlow before anything is timed
    told = {}
    dynamic = session(folder, **{"spark.dynamicAllocation.enabled": "true"})
    for engine in ("mirrored", "horovod"):
        told[f"dynamic {engine}"] = refusal(lambda engine=engine: fit(folder / "runs", engine))
    dynamic.stop()

    spark = session(folder)
    require_slots(spark, 2, wait_seconds=120)  # on a busy machine executors start slowly
    context = spark.sparkContext
    for case in ("version", "minor", "absent", "unwritable", "nothing"):
        context.environment["CASE"] = case
        told[case] = refusal(lambda: fit(folder / "runs"))
    context.environment["CASE"] = "sound"
    for engine in ("elephas", "mirrored", "horovod"):
        told[f"sound {engine}"] = refusal(lambda engine=engine: check(folder / "runs" / "run", engine))
    told["unseen"] = refusal(lambda: fit("memory://runs"))  # each process has its own memory://
    told["left"] = sorted(str(path) for path in (folder / "runs").rglob("*"))
    told["tags"] = sorted(context.getJobTags())
    spark.stop()
    out.write_text(json.dumps(told, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
