"""The same training on a standalone cluster, where the executors and the driver are separate processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.spark, pytest.mark.slow, pytest.mark.full, pytest.mark.timeout(600)]

SCRIPT = Path(__file__).with_name("run_engines.py")


@pytest.fixture(scope="module")
def results(cluster: Any, engines: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of run_engines.py: one application for all engines, because starting takes most of the time."""
    folder = tmp_path_factory.mktemp("standalone")
    out = folder / "out.json"
    cluster.submit(SCRIPT, folder / "store", out, "local", *engines, cwd=folder, timeout_seconds=480)
    return dict(json.loads(out.read_text()))


@pytest.mark.parametrize("engine", ["mirrored", "horovod"], indirect=True)
def test_synchronous_engines_end_with_the_weights_of_one_process(results: dict[str, Any], engine: str) -> None:
    assert "error" not in results[engine]
    assert results[engine]["difference"] <= 1e-5
    for name, values in results["local"]["history"].items():
        assert results[engine]["history"][name] == pytest.approx(values, abs=1e-5)


@pytest.mark.parametrize("engine", ["elephas"], indirect=True)
def test_averaged_weights_learn(results: dict[str, Any], engine: str) -> None:
    assert "error" not in results[engine]
    history = results[engine]["history"]
    assert history["loss"][-1] < history["loss"][0]
    assert history["val_loss"][-1] < history["val_loss"][0]


def test_each_rank_has_an_executor_of_its_own(results: dict[str, Any], engine: str) -> None:
    workers, witnesses = results[engine]["workers"], results[engine]["witnesses"]
    assert [worker["rank"] for worker in workers] == [0, 1]
    assert len({witness["pid"] for witness in witnesses}) == 2
    # A standalone worker gives every executor a folder to run in: …/worker-0/app-…/0
    assert len({next(p for p in Path(w["cwd"]).parts if p.startswith("worker-")) for w in witnesses}) == 2


def test_every_row_is_trained_once_an_epoch(results: dict[str, Any], engine: str) -> None:
    rows = [worker["rows"] for worker in results[engine]["workers"]]
    assert sum(rows) == results["local"]["workers"][0]["rows"]
    assert min(rows) > sum(rows) / 3


def test_a_rank_computes_on_the_cores_of_its_task_and_sees_no_gpu(results: dict[str, Any], engine: str) -> None:
    assert [worker["device"] for worker in results[engine]["workers"]] == ["cpu, 1 thread"] * 2
    assert [witness["devices"] for witness in results[engine]["witnesses"]] == [""] * 2
