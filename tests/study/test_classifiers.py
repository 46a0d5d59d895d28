"""Kinds of classifiers are found by entry point; test_fits.py fits one from outside the package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dlspark.errors import ConfigError
from dlspark.study.classifiers import CLASSIFIERS, available_classifiers, load_classifier
from dlspark.study.study_file import StudyFile

OURS = ["gbt", "logistic_regression", "random_forest"]
FILE = """\
name: small
store: store
data: {source: photos, layout: folders, image_size: 32}
splits: {only: {}}
networks: {net: {backbone: mobilenetv2, weights: none}}
features: {pooled: {networks: [net]}}
classifiers:
  nb: {algorithm: naive_bayes, features: [pooled], params: {smoothing: 0.5}}
"""


def claim(folder: Path, line: str) -> None:
    """Install a distribution with one entry point."""
    info = folder / "dlspark_rival-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: dlspark-rival\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text(f"[{CLASSIFIERS.group}]\n{line}\n")


def test_ours_are_found_and_nothing_heavy_is_imported() -> None:
    assert available_classifiers() == OURS
    script = (
        "import sys; from dlspark.study.classifiers import *; "
        f"assert [load_classifier(name).packages for name in available_classifiers()] == [('pyspark',)] * {len(OURS)}; "
        "assert not {'pyspark', 'keras', 'tensorflow', 'sklearn'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=100)


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(ConfigError, match=r"Unknown classifier 'random_forrest'. Did you mean 'random_forest'"):
        load_classifier("random_forrest")


def test_two_that_claim_a_name_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claim(tmp_path, "gbt = rival:Rival")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=r"claim the classifier name 'gbt'.*rival:Rival.*Uninstall"):
        load_classifier("gbt")


def test_an_entry_point_of_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claim(tmp_path, "path = pathlib:Path")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="to be a StudyClassifier"):
        load_classifier("path")


def test_a_strangers_kind_is_a_setting_of_a_study(stranger: None, tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(FILE)
    assert StudyFile.read(path).settings.classifiers["nb"].algorithm == "naive_bayes"
    path.write_text(FILE.replace("naive_bayes", "naive_bayess"))
    with pytest.raises(ConfigError, match=r"classifiers.nb.algorithm: .*Did you mean 'naive_bayes'"):
        StudyFile.read(path)
