"""The contract on backend elephas, with real Spark and the real engine."""

from __future__ import annotations

import pytest

from dlspark.testing.contract import BackendContract

pytestmark = [pytest.mark.spark, pytest.mark.timeout(300), pytest.mark.usefixtures("spark")]


class TestElephas(BackendContract):
    backend = "elephas"
