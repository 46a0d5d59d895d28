"""``dlspark backends`` lists installed, absent and broken backends."""

from __future__ import annotations

import json
import sys
from importlib import metadata
from typing import Any

import pytest

from dlspark.cli.main import main
from dlspark.registry import GROUP, PLUGINS, install_command


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make these the installed plug-ins, by name and address."""

    def install(**plugins: str) -> None:
        points = metadata.EntryPoints(metadata.EntryPoint(name, value, GROUP) for name, value in plugins.items())
        monkeypatch.setattr(metadata, "entry_points", points.select)

    return install


def listed(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["backends", "--format", "json"]) == 0
    return {each["name"]: each for each in json.loads(capsys.readouterr().out)}


def test_local_is_ready(capsys: pytest.CaptureFixture[str]) -> None:
    local = listed(capsys)["local"]
    assert local["status"] == "ready"
    assert local["capabilities"]["max_workers"] == 1
    assert "keras" in local["versions"]


def test_an_absent_one_comes_with_its_command(installed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    installed(local="dlspark.local:LocalBackend")
    found = listed(capsys)
    assert found["horovod"]["status"] == "not installed"
    assert "build_horovod" in found["horovod"]["install"]
    assert main(["backends"]) == 0
    assert "mirrored, run: pip install" in capsys.readouterr().out


@pytest.mark.parametrize("name", PLUGINS)
def test_the_command_brings_pyspark_only_where_there_is_none(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"./backends/{name}'" in install_command(name)
    monkeypatch.setitem(sys.modules, "pyspark", None)
    assert f"./backends/{name}[spark]'" in install_command(name)


def test_a_broken_one_says_why_and_the_rest_is_listed(installed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    installed(local="dlspark.local:LocalBackend", mine="no_such_plugin:Mine", other="json:JSONDecoder")
    found = listed(capsys)
    assert found["local"]["status"] == "ready"
    assert found["mine"]["status"] == "broken"
    assert found["mine"]["error"] == "ModuleNotFoundError: No module named 'no_such_plugin'"
    assert "subclass of dlspark's Backend" in found["other"]["error"]
    assert main(["backends"]) == 0
    assert "No module named 'no_such_plugin'" in capsys.readouterr().out


def test_a_requirement_that_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    info = tmp_path / "mine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: mine\nVersion: 1.0\nRequires-Dist: dlspark-keras\nRequires-Dist: numpy>=1\n"
        "Requires-Dist: no-such-engine==2.0\nRequires-Dist: pytest; extra == 'test'\n"
        "Requires-Dist: pyspark; extra == 'spark'\n"
    )
    (info / "entry_points.txt").write_text(f"[{GROUP}]\nmine = dlspark.local:LocalBackend\n")
    monkeypatch.setattr(metadata, "entry_points", metadata.PathDistribution(info).entry_points.select)
    mine = listed(capsys)["mine"]
    assert mine["status"] == "incomplete"
    assert mine["missing"] == ["no-such-engine"]
    assert mine["install"] == "pip install no-such-engine"
    assert list(mine["versions"]) == ["numpy", "pyspark"]


def test_a_platforms_spark_without_metadata_is_no_missing_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    pyspark = pytest.importorskip("pyspark")
    info = tmp_path / "mine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: mine\nVersion: 1.0\nRequires-Dist: pyspark; extra == 'spark'\n"
    )
    (info / "entry_points.txt").write_text(f"[{GROUP}]\nmine = dlspark.local:LocalBackend\n")
    monkeypatch.setattr(metadata, "entry_points", metadata.PathDistribution(info).entry_points.select)
    monkeypatch.setattr("dlspark.cli.backends.installed_versions", lambda names: {})
    mine = listed(capsys)["mine"]
    assert (mine["status"], mine["versions"]) == ("ready", {"pyspark": pyspark.__version__})
