"""F17 on mirrored: the port that the runner chose is taken before TensorFlow binds it."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

import dlspark_mirrored.backend
from dlspark import Trainer
from dlspark.testing import toys

pytestmark = [pytest.mark.timeout(120), pytest.mark.spark]


def test_f17_mirrored_takes_another_port(
    spark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rank_as_it_is, marker = dlspark_mirrored.backend._rank, str(tmp_path / "taken")

    def robbed(*arguments: Any) -> Any:
        """Run a worker; on the first launch, another socket already listens on its port."""
        cluster = json.loads(os.environ["TF_CONFIG"])
        if cluster["task"]["index"] == 1:
            try:
                os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return rank_as_it_is(*arguments)
            port = int(cluster["cluster"]["worker"][1].rpartition(":")[2])
            with socket.create_server(("", port)):
                return rank_as_it_is(*arguments)
        return rank_as_it_is(*arguments)

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    try:
        monkeypatch.setattr(dlspark_mirrored.backend, "_rank", robbed)
        result = Trainer("mirrored", num_workers=2).fit(toys.dense_classifier(), toys.separable(100), verbose=0)
    finally:
        cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    assert os.path.exists(marker)
    assert "launching again" in caplog.text
    assert len(result.workers) == 2
