"""What all tests share: one Spark session per test process, with two slots."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.register_assert_rewrite("dlspark.testing.contract")


@pytest.fixture(scope="session")
def spark() -> Iterator[Any]:
    """The one session of this test process."""
    from dlspark.spark import get_session

    session = get_session(2, app_name="dlspark-tests")
    yield session
    session.stop()
