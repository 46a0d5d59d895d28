"""A third-party backend, one module with an entry point, passes the whole contract."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dlspark import available_backends
from dlspark.testing.contract import BackendContract

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]

PLUGIN = str(Path(__file__).parent / "stranger")


@pytest.fixture(scope="module", autouse=True)
def installed(forks: None) -> Iterator[None]:
    """Put the plug-in's folder on the path, as an installation does."""
    sys.path.append(PLUGIN)
    yield
    sys.path.remove(PLUGIN)


class TestStranger(BackendContract):
    backend = "processes"

    def test_it_is_found(self) -> None:
        assert {"local", "processes"} <= set(available_backends())
