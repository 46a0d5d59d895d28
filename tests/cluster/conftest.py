"""A standalone Spark cluster for the tests: a master and two workers, real processes on loopback.

Each worker has one core and one made-up GPU with an address from `ADDRESSES`. An application gets a GPU only if it
requests one. Each application has its own driver process (spark-submit), because a test process has one SparkContext.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from dlspark.spark.java import find_java

LOOPBACK = "127.0.0.1"
ADDRESSES = ("41", "42")  # neither ranks nor GPUs of any machine
ENGINES = {"mirrored": "spark_tensorflow_distributor", "horovod": "horovod", "elephas": "elephas"}
START_SECONDS = 90.0
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Cluster:
    """A running cluster.

    Attributes:
        master: the URL of the master.
        addresses: the GPU address of each worker.
        environment: the variables with which a driver finds Java and Spark; none leads to the checkout.
    """

    master: str
    addresses: tuple[str, ...]
    environment: Mapping[str, str]

    def submit(
        self,
        script: Path,
        *arguments: object,
        python: str = sys.executable,
        executor_python: str | None = None,
        options: tuple[str, ...] = (),
        conf: Mapping[str, str] | None = None,
        cwd: Path,
        timeout_seconds: float,
    ) -> str:
        """Run ``script`` as an application and return what it printed.

        Args:
            script: the driver's program.
            arguments: its arguments.
            python: the driver's interpreter.
            executor_python: the executors' interpreter, if it differs.
            options: further options of spark-submit.
            conf: settings of the session.
            cwd: the working folder of the driver.
            timeout_seconds: after this time the application is ended, and the test fails with the output so far.
        """
        settings = {
            "spark.driver.host": LOOPBACK,
            "spark.driver.bindAddress": LOOPBACK,
            "spark.executor.memory": "512m",
            "spark.scheduler.maxRegisteredResourcesWaitingTime": "120s",  # on a busy machine executors start slowly
            "spark.ui.enabled": "false",
            **(conf or {}),
        }
        command = [f"{self.environment['SPARK_HOME']}/bin/spark-submit", "--master", self.master]
        command += ["--driver-memory", "512m", *options]
        for key, value in settings.items():
            command += ["--conf", f"{key}={value}"]
        command += [str(script), *map(str, arguments)]
        pythons = {"PYSPARK_DRIVER_PYTHON": python, "PYSPARK_PYTHON": executor_python or python}
        with (
            subprocess.Popen(
                command,
                env={**self.environment, **pythons},
                cwd=cwd,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            ) as driver,
            ended(driver),
        ):
            try:
                printed, _ = driver.communicate(timeout=timeout_seconds)
            except subprocess.TimeoutExpired as late:
                so_far = (late.stdout or b"").decode(errors="replace")
                pytest.fail(f"{script.name} took more than {timeout_seconds:.0f} s. It printed:\n{so_far[-6000:]}")
        if driver.returncode:
            pytest.fail(f"{script.name} ended with status {driver.returncode}. It printed:\n{printed[-6000:]}")
        return printed


@pytest.fixture(scope="session")
def engines() -> list[str]:
    """The engines that are installed here."""
    return [name for name, package in ENGINES.items() if importlib.util.find_spec(package)]


@pytest.fixture(params=ENGINES)  # function scope: a wider one would reorder the tests and repeat the cluster's runs
def engine(request: pytest.FixtureRequest, engines: list[str]) -> str:
    """Each engine in turn."""
    if request.param not in engines:
        pytest.skip(f"{ENGINES[request.param]} is not installed")
    return str(request.param)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster on which both workers have registered. All its processes are ended afterwards."""
    folder = tmp_path_factory.mktemp("cluster")
    environment = _environment()
    with contextlib.ExitStack() as stack:
        log = folder / "master.log"
        server = _start(
            stack,
            environment,
            log,
            ("org.apache.spark.deploy.master.Master", "--host", LOOPBACK, "--port", "0", "--webui-port", "0"),
        )
        master = _wait_for(r"Starting Spark master at (spark://\S+)", log, server)
        workers = []
        for number, address in enumerate(ADDRESSES):
            script = folder / f"gpus-{number}.sh"
            script.write_text(f'#!/bin/sh\necho \'{{"name": "gpu", "addresses": ["{address}"]}}\'\n')
            script.chmod(0o755)
            log = folder / f"worker-{number}.log"
            options = (
                "-Dspark.worker.resource.gpu.amount=1",
                f"-Dspark.worker.resource.gpu.discoveryScript={script}",
                "org.apache.spark.deploy.worker.Worker",
                *("--host", LOOPBACK, "--port", "0", "--webui-port", "0"),
                *("--cores", "1", "--memory", "1g", "--work-dir", str(folder / f"worker-{number}"), master),
            )
            workers.append((log, _start(stack, environment, log, options)))
        for log, worker in workers:
            _wait_for(r"(Successfully registered) with master", log, worker)
        yield Cluster(master, ADDRESSES, environment)


def _environment() -> dict[str, str]:
    """This process' environment with Java and Spark, and without the variables that lead executors to the checkout.

    Executors inherit their worker's environment: with PYTHONPATH in it, a packed environment would prove nothing.
    """
    import pyspark

    kept = {k: v for k, v in os.environ.items() if not k.startswith(("CUDA_", "PYSPARK_", "PYTHONPATH", "SPARK_"))}
    home = Path(pyspark.__file__).parent
    (core,) = (home / "jars").glob("spark-core_*.jar")
    return {
        **kept,
        "JAVA_HOME": str(find_java()),
        "SPARK_HOME": str(home),
        "SPARK_SCALA_VERSION": core.name.removeprefix("spark-core_").partition("-")[0],  # required by workers
        "SPARK_LOCAL_IP": LOOPBACK,
        "PYSPARK_PYTHON": sys.executable,
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }


def _start(
    stack: contextlib.ExitStack, environment: Mapping[str, str], log: Path, arguments: tuple[str, ...]
) -> subprocess.Popen[bytes]:
    """Start a Spark daemon, which ends with ``stack``."""
    java, jars = f"{environment['JAVA_HOME']}/bin/java", f"{environment['SPARK_HOME']}/jars/*"
    with log.open("wb") as output:
        daemon = subprocess.Popen(
            [java, "-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-cp", jars, *arguments],
            env=dict(environment),
            cwd=log.parent,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    stack.enter_context(ended(daemon))
    return daemon


@contextlib.contextmanager
def ended(process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> Iterator[None]:
    """End ``process`` and its children, each by its own id, on leaving the block."""
    try:
        yield
    finally:
        children = []
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        _, left = psutil.wait_procs(children, timeout=5)
        for child in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


def _wait_for(pattern: str, log: Path, process: subprocess.Popen[bytes]) -> str:
    """Wait until ``log`` contains ``pattern``, and return its first group."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        ran = process.poll() is None  # asked first, so that all its output is read below
        text = log.read_text(errors="replace")
        found = re.search(pattern, text)
        if found:
            return found[1]
        if not ran or time.monotonic() > deadline:
            state = f"ended with status {process.returncode}" if not ran else f"is silent after {START_SECONDS:.0f} s"
            raise RuntimeError(f"{log.stem} {state}; expected {pattern!r} in its log:\n{text[-4000:]}")
        time.sleep(POLL_SECONDS)
