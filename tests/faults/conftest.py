"""Shared by all fault tests: the check for leaks, and the engines."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dlspark.testing.faults import Fault
from dlspark.testing.leaks import no_leaks

ENGINES = {"mirrored": "spark_tensorflow_distributor", "horovod": "horovod", "elephas": "elephas"}


@pytest.fixture(autouse=True)
def nothing_left_behind(own_temporary_folder: None, request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves a process, port, thread or temporary file behind; the session of all tests is none of them."""
    if request.node.get_closest_marker("spark"):
        request.getfixturevalue("spark")
    with no_leaks(worker_ports="mirrored" not in request.node.name):
        yield


@pytest.fixture(scope="session", autouse=True)
def stranger(forks: None) -> Iterator[None]:
    """Backend "processes", a real launcher without a JVM: what does not depend on the engine is tested on it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "stranger"))
        yield


@pytest.fixture
def fault(tmp_path: Path) -> Callable[..., Fault]:
    """Makes a fault that happens once in this test."""
    return lambda action, **where: Fault(action=action, marker=str(tmp_path / "happened"), **where)


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    """Each engine that runs on Spark, or those that a test names."""
    package = ENGINES.get(request.param)
    if package and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    return str(request.param)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as full what ``@pytest.mark.usually("engine", …)`` does not name: other engines run in make test-all only."""
    for item in items:
        usual = item.get_closest_marker("usually")
        if usual and not any(
            set(names.split()) <= set(item.name.partition("[")[2].rstrip("]").split("-")) for names in usual.args
        ):
            item.add_marker(pytest.mark.full)
