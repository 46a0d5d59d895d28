"""The contract on backend horovod, with real Spark and the real engine."""

from __future__ import annotations

import pytest

pytest.importorskip("horovod", reason="Horovod is not built: run `make set-up` with a C++ compiler installed")

from dlspark.testing.contract import BackendContract

pytestmark = [pytest.mark.spark, pytest.mark.timeout(300), pytest.mark.usefixtures("spark")]


class TestHorovod(BackendContract):
    backend = "horovod"
