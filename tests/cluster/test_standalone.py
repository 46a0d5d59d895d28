"""The same training on a standalone cluster: executors are processes of their own, and the driver is one more."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.spark, pytest.mark.slow, pytest.mark.timeout(600)]

ENGINES = ("mirrored", "horovod", "elephas")
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def results(cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What train_engines.py wrote: one application for all engines, as most of the time goes into starting."""
    folder = tmp_path_factory.mktemp("standalone")
    cluster.submit(
        HERE / "train_engines.py", folder / "store", folder / "out.json", *ENGINES, cwd=folder, timeout_seconds=500
    )
    return dict(json.loads((folder / "out.json").read_text()))


@pytest.mark.parametrize("engine", ["mirrored", "horovod"])
def test_synchronous_engines_end_with_the_weights_of_one_process(results: dict[str, Any], engine: str) -> None:
    assert results[engine]["difference"] <= 1e-5
    for name, values in results["local"]["history"].items():
        assert results[engine]["history"][name] == pytest.approx(values, abs=1e-5)


def test_elephas_learns(results: dict[str, Any]) -> None:
    history = results["elephas"]["history"]
    assert history["loss"][-1] < history["loss"][0]
    assert history["val_loss"][-1] < history["val_loss"][0]


@pytest.mark.parametrize("engine", ENGINES)
def test_both_executors_work(results: dict[str, Any], engine: str) -> None:
    workers, witnesses = results[engine]["workers"], results[engine]["witnesses"]
    assert [worker["rank"] for worker in workers] == [0, 1]
    rows = len(results["local"]["history"]["loss"]) * 101
    assert sum(worker["rows"] for worker in workers) == rows
    assert min(worker["rows"] for worker in workers) > rows / 3
    assert len({witness["pid"] for witness in witnesses}) == 2
    # A standalone worker gives each of its executors a folder: …/worker-0/app-…/0
    assert len({next(p for p in Path(w["cwd"]).parts if p.startswith("worker-")) for w in witnesses}) == 2


@pytest.mark.parametrize("engine", ENGINES)
def test_a_worker_computes_with_the_cores_of_its_task(results: dict[str, Any], engine: str) -> None:
    assert [worker["device"] for worker in results[engine]["workers"]] == ["cpu, 1 threads"] * 2
    logging.getLogger(__name__).debug("%s", results[engine]["witnesses"])
