"""The contract on backend mirrored, with real Spark and the real engine."""

from __future__ import annotations

import pytest

from dlspark.testing.contract import BackendContract

pytestmark = [pytest.mark.spark, pytest.mark.timeout(300), pytest.mark.usefixtures("spark")]


class TestMirrored(BackendContract):
    backend = "mirrored"
