"""One declaration of an option or a backbone is enough: flags, Params, schema and classifiers follow."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field, fields
from typing import Any

import pytest

from dlspark.cli.arguments import Parser, add_options
from dlspark.errors import ConfigError
from dlspark.models import ClassifierOptions, build_classifier, build_from_options, option_schemas
from dlspark.models.options import option
from tests.models.tiny import TINY

keras = pytest.importorskip("keras")


@dataclass(frozen=True, kw_only=True)
class Toy(ClassifierOptions):
    """Options with one that the package does not know."""

    label_smoothing: float = field(
        default=0.25, metadata=option("moved to the other classes", {"type": "number", "minimum": 0, "exclusiveMaximum": 1})
    )


def test_build_classifier_takes_the_options_and_their_defaults() -> None:
    taken = {name: each.default for name, each in inspect.signature(build_classifier).parameters.items()}
    assert {"num_classes", "image_size"} == taken.keys() - {each.name for each in fields(ClassifierOptions)}
    for each in fields(ClassifierOptions):
        assert taken[each.name] == each.default or each.name == "backbone"


def test_an_option_is_checked_and_has_a_flag_and_a_schema() -> None:
    parser = Parser()
    add_options(parser, Toy, training=False, defaults={"backbone": "resnet50"})
    add_options(parser, Toy, training=True, defaults={})
    assert "moved to the other classes (default: 0.25)" in " ".join(parser.format_help().split())
    given = parser.parse_args(["--label-smoothing", "0.5", "--dense", "8,4", "--weights", "none"])
    options = Toy.from_plain(vars(given))
    assert (options.label_smoothing, options.dense, options.weights) == (0.5, (8, 4), None)
    assert (options.backbone, options.learning_rate) == (Toy(backbone="resnet50").backbone, 1e-4)
    with pytest.raises(ConfigError, match="Expected label_smoothing to be at least 0 and below 1; got 1"):
        Toy(backbone="resnet50", label_smoothing=1)
    schema = option_schemas(Toy, training=False)
    assert schema["label_smoothing"]["exclusiveMaximum"] == 1
    assert schema["label_smoothing"]["default"] == 0.25
    assert "default" not in schema["backbone"]
    assert list(option_schemas(Toy, training=True)) == ["fine_tune", "learning_rate", "depth_decay"]


def test_an_option_has_a_param() -> None:
    pytest.importorskip("pyspark")
    from pyspark import keyword_only

    from dlspark.ml.params import HasSetParams, option_defaults, with_options

    @with_options(Toy)
    class Stage(HasSetParams):
        @keyword_only
        def __init__(self, **options: Any) -> None:
            super().__init__()
            self._setDefault(**option_defaults(Toy))
            self.setParams(**self._input_kwargs)

    stage: Any = Stage(labelSmoothing=1)
    assert (stage.getLabelSmoothing(), stage.getDense(), stage.getFineTune()) == (1.0, [], "all")
    assert stage.setDense((8,)).getDense() == [8]
    assert stage.getParam("labelSmoothing").doc == "moved to the other classes"
    assert inspect.signature(Stage).parameters["labelSmoothing"].default == 0.25


def test_a_backbone_from_outside() -> None:
    model = build_classifier(TINY, 3, image_size=(16, 8), weights=None, depth_decay=0.5, fine_tune="top:1")
    network = model.get_layer("tiny")
    assert [layer.name for layer in network.layers if layer.trainable_variables] == ["block1_conv"]
    assert set(model.optimizer.multipliers.values()) == {0.5, 0.25}
    assert isinstance(model.get_layer("preprocessing"), keras.layers.Rescaling)
    options = ClassifierOptions(backbone=TINY, weights=None)
    assert build_from_options(options, 3, image_size=(8, 8)).output_shape == (None, 3)
    with pytest.raises(ConfigError, match="Expected image_size of tiny as a whole number of at least 8"):
        build_classifier(TINY, 3, image_size=(16, 7), weights=None)
    with pytest.raises(ConfigError, match="'tiny' has no ImageNet weights"):
        build_classifier(TINY, 3, image_size=(16, 8))


def test_a_backbone_from_outside_is_a_featurizer() -> None:
    pytest.importorskip("pyspark")
    from dlspark.ml import ImageFeaturizer

    stage = ImageFeaturizer(inputCol="image", outputCol="out", backbone=TINY, weights=None, imageSize=(16, 8))
    assert stage.getBackbone() is TINY
    assert stage.network_to_save().model().output_shape == (None, 5)
