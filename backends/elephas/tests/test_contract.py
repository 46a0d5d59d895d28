"""The contract on backend elephas, in each of its modes, with real Spark and the real engine."""

from __future__ import annotations

from typing import ClassVar

import pytest

from dlspark.testing.contract import BackendContract

pytestmark = [pytest.mark.spark, pytest.mark.timeout(300), pytest.mark.usefixtures("spark")]


class TestElephas(BackendContract):
    backend = "elephas"


class TestElephasByEpoch(BackendContract):
    backend = "elephas"
    options: ClassVar[dict[str, str]] = {"mode": "asynchronous"}


class TestElephasByBatch(BackendContract):
    backend = "elephas"
    options: ClassVar[dict[str, str]] = {"mode": "asynchronous", "frequency": "batch"}
