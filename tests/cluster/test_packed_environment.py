"""The steps of docs/clusters.md: spark-submit with an environment in an archive and without a checkout.

To stay small, the archive holds only dlspark and its plug-ins, installed as a user installs them (not editable). A real
archive also holds TensorFlow, Keras, pyspark and the rest; in this one a .pth file points to the environment that runs
the tests. Python reads no further .pth files in that folder, so the editable installs of the checkout are not found.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.full, pytest.mark.cluster, pytest.mark.spark, pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
VERSION = "0.1.0+packed"  # distinguishes the installed copy from the checkout


@pytest.fixture(scope="module")
def environment(cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with dlspark and the plug-ins in it."""
    folder = tmp_path_factory.mktemp("packed")
    sources = _copy_of_sources(folder / "sources")
    home = folder / "env"
    venv.create(home, symlinks=True, with_pip=False)
    python = home / "bin" / "python"
    paths = sysconfig.get_paths()
    installed = Path(sysconfig.get_path("purelib", vars={"base": str(home), "platbase": str(home)}))
    (installed / "rest.pth").write_text("\n".join(dict.fromkeys([paths["purelib"], paths["platlib"]])) + "\n")
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index", "--no-deps"]
    command += ["--no-build-isolation", "--no-cache-dir", "--ignore-installed", *map(str, sources)]
    ran = subprocess.run(command, env=dict(cluster.environment), cwd=folder, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    shutil.rmtree(folder / "sources")
    return home


def _copy_of_sources(folder: Path) -> list[Path]:
    """Copy the sources of the wheels, because a build leaves files beside its sources."""
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "tests")
    folder.mkdir()
    for name in ("dlspark", "setup.cfg", "pyproject.toml", "LICENSE", "README.md"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=unwanted)
        elif source.exists():
            shutil.copy(source, folder)
    settings = folder / "setup.cfg"
    text = settings.read_text().replace("\nversion = 0.1.0\n", f"\nversion = {VERSION}\n")
    assert VERSION in text
    settings.write_text(text)
    plugins = [shutil.copytree(each, folder / each.name, ignore=unwanted) for each in sorted(ROOT.glob("backends/*"))]
    return [folder, *map(Path, plugins)]


def test_an_archived_environment_trains_on_executors_that_have_no_checkout(
    cluster: Any, environment: Path, tmp_path: Path
) -> None:
    code = "import dlspark, dlspark_mirrored; print(dlspark.__file__); print(dlspark_mirrored.__file__)"
    ran = subprocess.run(
        [environment / "bin" / "python", "-c", code],
        env=dict(cluster.environment),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "PYTHONPATH" not in cluster.environment
    assert all(Path(line).is_relative_to(environment) for line in ran.stdout.split())

    archive = shutil.make_archive(str(tmp_path / "env"), "gztar", environment)
    assert os.path.getsize(archive) < 10_000_000
    script = Path(shutil.copy(ROOT / "examples" / "submit.py", tmp_path))
    out = tmp_path / "out.json"
    cluster.submit(
        script,
        *("--backend", "mirrored", "--workers", 2, "--epochs", 1, "--store", tmp_path / "store", "--out", out),
        python=str(environment / "bin" / "python"),
        executor_python="./environment/bin/python",
        options=("--archives", f"{archive}#environment"),
        cwd=tmp_path,
        timeout_seconds=420,
    )
    result = json.loads(out.read_text())
    assert [worker["rank"] for worker in result["workers"]] == [0, 1]
    assert [worker["rows"] for worker in result["workers"]] == [500, 500]
    assert len(result["history"]["loss"]) == 1
    assert result["versions"]["dlspark"] == VERSION  # reported by rank 0, on its executor
