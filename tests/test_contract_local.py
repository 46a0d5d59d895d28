"""The contract on backend local."""

from __future__ import annotations

import pytest

from dlspark.testing.contract import BackendContract

pytestmark = pytest.mark.timeout(120)


class TestLocal(BackendContract):
    backend = "local"
