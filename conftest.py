"""What all tests share: one Spark session per test process, with two slots, and a temporary folder of their own."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any

import pytest

# TensorFlow turns oneDNN on by itself only on some CPUs; on others ResNet50 takes 2.5 times as long. Set before TensorFlow
# is imported, and inherited by every process that a test starts.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

pytest.register_assert_rewrite("dlspark.testing.contract", "tests.faults.disturbed")


LONGEST = ("tests/faults/test_deaths", "tests/faults/", "tests/study/", "benchmarks/", "backends/")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Sort files by how long they take, as their folders and markers say.

    pytest-xdist gives each worker one file at a time, in this order. With the short files last, both workers end together.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    on_spark = {item.path for item in items if item.get_closest_marker("spark")}

    def order(item: pytest.Item) -> tuple[int, bool, bool]:
        path = item.path.relative_to(config.rootpath).as_posix()
        place = next((i for i, start in enumerate(LONGEST) if path.startswith(start)), len(LONGEST))
        return place, item.path not in slow, item.path not in on_spark

    items.sort(key=order)


@pytest.fixture(scope="session", autouse=True)
def own_temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep this test process and what it starts out of the temporary files of another one."""
    folder = str(tmp_path_factory.mktemp("tmp"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", folder)
        yield


@pytest.fixture(scope="session")
def forks(own_temporary_folder: None) -> None:
    """Start the server of multiprocessing's "forkserver": what it forks has Keras imported."""
    # Here and not in a test, which would seem to leave them behind.
    resource_tracker.ensure_running()
    forkserver.set_forkserver_preload(["keras"])
    forkserver.ensure_running()


@pytest.fixture(scope="session")
def spark() -> Iterator[Any]:
    """The one session of this test process. Its Python workers begin with Keras imported (tests/preloaded.py).

    Its SQL is ANSI, as in Spark 4 by default: a cast that fails is an error there, and a null in Spark 3.5.
    """
    from dlspark.spark import get_session

    with pytest.MonkeyPatch.context() as patch:  # Spark reads both when it starts
        patch.setenv(
            "PYSPARK_SUBMIT_ARGS",
            "--conf spark.python.daemon.module=preloaded --conf spark.sql.ansi.enabled=true pyspark-shell",
        )
        patch.setenv("PYTHONPATH", str(Path(__file__).parent / "tests"), prepend=os.pathsep)
        session = get_session(2, app_name="dlspark-tests")
    yield session
    session.stop()
