"""A study's file: defaults, and errors by line."""

from __future__ import annotations

from pathlib import Path

import pytest

from dlspark.cli.main import main
from dlspark.data import Split
from dlspark.errors import ConfigError
from dlspark.study.settings import PhaseSettings, StudySettings
from dlspark.study.study_file import EXAMPLES, StudyFile, example

ROOT = Path(__file__).parents[2]

SMALL = """\
name: small
store: store
data: {source: photos, layout: folders, image_size: 32}
splits:
  only: {test: 0.25}
networks:
  net:
    backbone: mobilenetv2
    weights: none
    phases: [{epochs: 1, learning_rate: 1e-3}]
features:
  pooled: {networks: [net]}
classifiers:
  lr: {algorithm: logistic_regression, features: [pooled], params: {regParam: 0.1}}
ensembles:
  both: {models: [net, lr/pooled]}
"""


def read(tmp_path: Path, text: str) -> StudySettings:
    path = tmp_path / "study.yaml"
    path.write_text(text)
    return StudyFile.read(path).settings


def test_defaults_are_filled_in(tmp_path: Path) -> None:
    settings = read(tmp_path, SMALL)
    assert settings.seed == 0
    assert settings.splits["only"] == Split(test=0.25)
    options = {"fine_tune": "all", "learning_rate": 0.001, "depth_decay": 1.0}
    assert settings.networks["net"].phases == (PhaseSettings(epochs=1, schedule="constant", classifier=options),)
    assert (settings.cross_validation.folds, settings.cross_validation.metric) == (5, "f1")
    assert settings.evaluate.bootstrap == 1000
    assert settings.models == ["net", "lr/pooled"]
    assert settings.data.bits == 16
    assert read(tmp_path, SMALL.replace("image_size: 32", "image_size: 32, bits: 12")).data.bits == 12


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (
            "weights: none",
            "weigths: none",
            r"line 9: networks\.net\.weigths: unknown setting. Did you mean 'weights'",
        ),
        ("splits:\n", "split:\n", r"line 4: split: unknown setting. Did you mean 'splits'"),
        ("name: small\n", "", r"got no 'name'"),
        ("epochs: 1", "epochs: one", r'line 10: networks\.net\.phases\.0\.epochs: expected a whole number; got "one"'),
        ("image_size: 32", "image_size: 32x32", r"line 3: data.image_size: expected a whole number or a list \(Pixels"),
        ("image_size: 32", "image_size: [32]", r"line 3: data.image_size"),
        ("image_size: 32", "image_size: 32, bits: 20", r"line 3: data.bits"),
        ("backbone: mobilenetv2", "backbone: mobilenet_v2", r"line 8: networks.net.backbone: .*Did you mean 'mobilenetv2'"),
        ("layout: folders", "layout: folder", r"line 3: data.layout: .*Did you mean 'folders'"),
        ("networks: [net]", "networks: [nett]", r"line 12: features.pooled.networks.0: .*Did you mean 'net'"),
        ("features: [pooled]", "features: [pool]", r"line 14: classifiers.lr.features.0"),
        ("models: [net, lr/pooled]", "models: [net, lr]", r"line 16: ensembles.both.models.1: .*Known: lr/pooled, net"),
        ("algorithm: logistic_regression", "algorithm: logistic", r"line 14: classifiers.lr.algorithm: .* Known: gbt"),
        ("store: store\n", "store: store\nstore: other\n", r"line 3: expected every name once; got store in line 2 too"),
        ("epochs: 1,", "epochs: 1, depth_decay: 0.9, fine_tune: head,", r"a frozen backbone has no learning rates"),
        ("epochs: 1,", "epochs: 1, fine_tune: top,", r'fine_tune: expected a match of .*; got "top"'),
        ("learning_rate: 1e-3", "learning_rate: -1e-3", r"learning_rate: -0.001 is less than or equal to"),
        ("name: small", "name: small: er", r"Expected YAML in"),
        ("name: small", "name: &itself [*itself]", r"Expected YAML in"),
        ("name: small", "name: 2020-13-45", r"Expected YAML in .* month must be in 1..12"),
        ("weights: none", "weights: none\n    x-note: hi", r"line 10: networks.net.x-note: unknown setting"),
        ("learning_rate: 1e-3", "learning_rate: .nan", r"learning_rate: expected a finite number; got nan"),
        ("models: [net, lr/pooled]", "models: [net]", r"ensembles.both.models: expected 2 or more"),
        ("name: small", "name: small\n1: x", r"line \d+: expected a name; got 1"),
        (
            "layout: folders",
            "layout: csv, layout_options: {imagecolum: x}",
            r"data.layout_options: Layout 'csv' has no option 'imagecolum'. Did you mean 'image_column'",
        ),
        (
            "networks: [net]",
            "networks: [net], layer: dense_3",
            r"line 12: features.pooled.layer: the network 'net' has no layer",
        ),
        (
            "name: small",
            "evaluate: {by: ['age:ten']}\nname: small",
            r"line 1: evaluate.by.0: expected a column, or a column",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_line(tmp_path: Path, old: str, new: str, told: str) -> None:
    assert old in SMALL
    with pytest.raises(ConfigError, match=told):
        read(tmp_path, SMALL.replace(old, new, 1))


def test_a_mistake_in_what_is_merged_is_told_where_it_is_written(tmp_path: Path) -> None:
    text = "x-all: &all\n  dropuot: 0.3\n" + SMALL.replace("    weights: none\n", "    weights: none\n    <<: *all\n", 1)
    assert "<<" in text
    with pytest.raises(ConfigError, match=r"line 2: networks.net.dropuot: unknown setting. Did you mean 'dropout'"):
        read(tmp_path, text)


def test_an_empty_file_is_called_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="got an empty file"):
        read(tmp_path, "# nothing\n")


def test_init_writes_the_examples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in EXAMPLES:
        assert main(["study", "init", name]) == 0
        assert StudyFile.read(f"{name}.yaml").settings.name == name
        assert Path(f"{name}.yaml").read_text() == (ROOT / "examples" / f"{name}.yaml").read_text() == example(name)
    assert main(["study", "init", "cnmc"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["study", "init", "cnmcc"]) == 2
    assert "Did you mean 'cnmc'" in capsys.readouterr().err
    assert main(["study", "absent.yaml"]) == 2
    assert "study init" in capsys.readouterr().err
