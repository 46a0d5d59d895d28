"""What all tests share: one Spark session per test process, with two slots."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

# TensorFlow turns oneDNN on by itself only on some CPUs; on others ResNet50 takes 2.5 times as long. Set before TensorFlow
# is imported, and inherited by every process that a test starts.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

pytest.register_assert_rewrite("dlspark.testing.contract")


@pytest.fixture(scope="session")
def spark() -> Iterator[Any]:
    """The one session of this test process."""
    from dlspark.spark import get_session

    session = get_session(2, app_name="dlspark-tests")
    yield session
    session.stop()
