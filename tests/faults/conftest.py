"""What all tests of faults share: nothing may be left behind, and a temporary folder in which nobody else works."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Iterator

import pytest

from dlspark.testing.leaks import no_leaks

ENGINES = {"mirrored": "spark_tensorflow_distributor", "horovod": "horovod", "elephas": "elephas"}


@pytest.fixture(scope="session", autouse=True)
def own_temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Other processes on this machine may be training, with temporary folders of the same names.

    Executors get it too where these tests start the session.
    """
    folder = str(tmp_path_factory.mktemp("tmp"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", folder)
        yield


@pytest.fixture(autouse=True)
def nothing_left_behind(own_temporary_folder: None, request: pytest.FixtureRequest) -> Iterator[None]:
    """No process, port, thread or temporary file that was not there before the test."""
    with no_leaks(worker_ports="mirrored" not in request.node.name):
        yield


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    """Each engine that runs on Spark."""
    if importlib.util.find_spec(ENGINES[request.param]) is None:
        pytest.skip(f"{ENGINES[request.param]} is not installed")
    return str(request.param)
