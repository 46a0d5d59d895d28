"""Spark schedules the GPUs: each rank gets its own address, and a rank that lacks its GPU fails.

The workers' discovery scripts make up the addresses (see conftest.py), so each rank must refuse to train. Training on
a real GPU is not tested here.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dlspark.errors import ConfigError
from dlspark.spark.cluster import task_resources

pytestmark = [pytest.mark.cluster, pytest.mark.spark, pytest.mark.slow, pytest.mark.timeout(600)]

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def results(cluster: Any, engines: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of run_engines.py, in one application whose tasks take one GPU each."""
    folder = tmp_path_factory.mktemp("gpus")
    out = folder / "out.json"
    conf = {
        "spark.executor.resource.gpu.amount": "1",
        "spark.task.resource.gpu.amount": "1",
        "spark.task.maxFailures": "1",  # Spark would retry a task outside a barrier stage three times
    }
    script = HERE / "run_engines.py"
    cluster.submit(script, folder / "store", out, *engines, conf=conf, cwd=folder, timeout_seconds=480)
    return dict(json.loads(out.read_text()))


@pytest.mark.full
def test_each_rank_sees_the_gpu_of_its_task_and_no_other(results: dict[str, Any], cluster: Any, engine: str) -> None:
    assert sorted(witness["devices"] for witness in results[engine]["witnesses"]) == sorted(cluster.addresses)


@pytest.mark.full
def test_a_gpu_that_is_not_there_is_an_error_that_names_rank_and_address(results: dict[str, Any], engine: str) -> None:
    told = results[engine]
    assert "error" in told, f"{engine} trained on {[worker['device'] for worker in told['workers']]}"
    found = re.search(r"Rank (\d) on \S+ was given the GPU addresses '(\d+)' by Spark", told["error"])
    assert found, told["error"]
    assert int(found[1]) == told["rank"]
    assert found[2] == told["witnesses"][told["rank"]]["devices"]


@pytest.mark.full
def test_what_no_executor_can_have_is_refused_before_any_work(cluster: Any, tmp_path: Path) -> None:
    conf = {
        "spark.executor.resource.gpu.amount": "2",
        "spark.task.resource.gpu.amount": "1",
        "spark.scheduler.maxRegisteredResourcesWaitingTime": "1s",
    }
    out = tmp_path / "out.json"
    cluster.submit(HERE / "ask_too_much.py", tmp_path / "store", out, conf=conf, cwd=tmp_path, timeout_seconds=240)
    refusals = json.loads(out.read_text())
    assert "2 free slots" in refusals["no gpus"]
    assert "spark.task.resource.gpu.amount" in refusals["no gpus"]
    assert "Give Trainer a store" in refusals["no store"]


@pytest.mark.parametrize(
    ("master", "amount", "told"),
    [("local[2]", "1", "a master that schedules GPUs"), ("spark://host:7077", "0.5", "Set it to 1")],
)
def test_settings_that_cannot_work_are_refused(master: str, amount: str, told: str) -> None:
    context = SimpleNamespace(master=master, getConf=lambda: {"spark.task.resource.gpu.amount": amount})
    with pytest.raises(ConfigError, match=told):
        task_resources(SimpleNamespace(sparkContext=context))
