"""Classifiers: what trains, what the file contains, learning rates by depth, and refusals."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlspark.errors import ConfigError
from dlspark.models.backbones import BACKBONES
from dlspark.models.classifier import build_classifier

keras = pytest.importorskip("keras")

SIZE = (32, 32)
REAL_WEIGHTS = Path(__file__).parents[3] / "shared/data/weights/mobilenet_v2_1.0_224_imagenet_notop.h5"
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (6, *SIZE, 3)).astype("uint8")
LABELS = np.array([0, 1, 2, 0, 1, 2], "int32")


def small(**settings: Any) -> Any:
    return build_classifier("mobilenetv2", 3, **{"image_size": SIZE, "weights": None, **settings})


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Draw the same weights whichever tests ran before: some draws leave every unit of a small relu layer dead."""
    keras.utils.set_random_seed(1)


@pytest.fixture
def real_weights() -> Path:
    if not REAL_WEIGHTS.exists():
        pytest.skip(f"no ImageNet weights at {REAL_WEIGHTS}")
    return REAL_WEIGHTS


@pytest.fixture
def keras_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.setattr("keras.src.backend.config._KERAS_DIR", str(tmp_path))  # read once, when Keras is imported
    (tmp_path / "models").mkdir()
    return tmp_path


@pytest.fixture
def mixed_bfloat16() -> Iterator[None]:
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    yield
    keras.config.set_dtype_policy(before)


def predict(model: Any, images: Any = IMAGES) -> Any:
    return np.asarray(model(images, training=False))  # eagerly: tracing takes seconds per model


def backbone_input(model: Any, name: str) -> Any:
    """The part of the model before the backbone."""
    return keras.Model(model.input, model.layers[model.layers.index(model.get_layer(name)) - 1].output)


# Every backbone ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_builds_at_its_least_size_with_its_own_preprocessing(name: str) -> None:
    spec = BACKBONES[name]
    size = (spec.min_size, spec.min_size + 5)
    model = build_classifier(name, 4, image_size=size, weights=None, depth_decay=0.5)
    images = RNG.integers(0, 256, (2, *size, 3)).astype("uint8")

    probabilities = predict(model, images)
    assert probabilities.shape == (2, 4)
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, rtol=1e-5)

    network = model.get_layer(name)
    module = getattr(
        keras.applications, {"efficientnetv2b0": "efficientnet_v2", "mobilenetv2": "mobilenet_v2"}.get(name, name)
    )
    expected = module.preprocess_input(images.astype("float32"))
    np.testing.assert_allclose(predict(backbone_input(model, name), images), expected, atol=2e-5)
    included = [layer for layer in network.layers if isinstance(layer, keras.layers.Rescaling)]
    assert bool(included) == (spec.preprocessing == "included")

    # The head learns at the full rate, the last block at half of it, and so on for every block down to the stem.
    factors = model.optimizer.multipliers
    assert set(factors) == {variable.path for variable in network.trainable_variables}
    blocks = {"resnet50": 17, "xception": 14, "mobilenet": 14, "mobilenetv2": 19, "efficientnetv2b0": 23}[name]
    by_depth = [factors[variable.path] for variable in network.trainable_variables]
    assert by_depth == sorted(by_depth)
    assert sorted(set(factors.values()), reverse=True) == [0.5**depth for depth in range(1, blocks + 1)]

    constructor = getattr(keras.applications, spec.constructor)
    with pytest.raises(ValueError, match=f"at least {spec.min_size}"):
        constructor(include_top=False, weights=None, input_shape=(spec.min_size - 1, 300, 3))


@pytest.mark.parametrize(
    ("name", "size"),
    [("resnet50", 32), ("xception", 71), ("mobilenet", 160), ("mobilenetv2", 96), ("efficientnetv2b0", 32)],
)
def test_the_file_of_weights_is_the_one_keras_asks_for(
    name: str, size: int, keras_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def refuse(file_name: str, *_: object, **__: object) -> str:
        asked.append(file_name)
        raise TimeoutError("the firewall swallowed it")

    monkeypatch.setattr("keras.src.utils.file_utils.get_file", refuse)
    with pytest.raises(ConfigError, match="the firewall swallowed it") as caught:
        build_classifier(name, 2, image_size=(size, size))
    assert asked == [BACKBONES[name].imagenet_file((size, size))]
    assert str(keras_home / "models" / asked[0]) in str(caught.value)


def test_sizes_without_a_file_of_their_own_use_the_one_for_224() -> None:
    spec = BACKBONES["mobilenetv2"]
    assert "_1.0_160_" in spec.imagenet_file((160, 160))
    assert "_1.0_224_" in spec.imagenet_file((160, 128))
    assert "_1.0_224_" in spec.imagenet_file((300, 300))


# What trains ---------------------------------------------------------------------------------------------------------


def test_head_trains_the_head_alone() -> None:
    model = small(fine_tune="head", dense=(8,), dropout=0.2, augment=("flip",))
    network = model.get_layer("mobilenetv2")
    before, head = network.get_weights(), model.get_layer("dense_1").get_weights()
    history = model.fit(IMAGES, LABELS, verbose=0).history
    assert set(history) == {"accuracy", "loss"}
    assert len(model.trainable_variables) == 4
    for old, new in zip(before, network.get_weights(), strict=True):  # batch-norm statistics included
        np.testing.assert_array_equal(old, new)
    assert not np.array_equal(head[0], model.get_layer("dense_1").get_weights()[0])


def test_top_trains_the_last_layers_that_carry_weights() -> None:
    model = small(fine_tune="top:3", learning_rate=1e-2)
    model.run_eagerly = True
    network = model.get_layer("mobilenetv2")
    before = {layer.name: layer.get_weights() for layer in network.layers if layer.weights}
    model.train_on_batch(IMAGES, LABELS)
    changed = [
        name
        for name, old in before.items()
        if any(not np.array_equal(a, b) for a, b in zip(old, network.get_layer(name).get_weights(), strict=True))
    ]
    assert changed == ["block_16_project_BN", "Conv_1", "Conv_1_bn"]


def test_the_frozen_part_runs_as_at_prediction() -> None:
    model = build_classifier("efficientnetv2b0", 3, image_size=SIZE, weights=None, fine_tune="top:20")
    layers = model.get_layer("efficientnetv2b0").layers
    rates = [layer.rate for layer in layers if isinstance(layer, keras.layers.Dropout)]
    assert rates[0] == 0.0
    assert rates[-1] > 0.0
    assert rates == sorted(rates)


def test_synchronized_batch_normalisations_are_those_that_train_and_the_file_keeps_it(tmp_path: Path) -> None:
    from dlspark.mends.keras_batch_norm import batch_normalisations

    model = small(batch_norm="synchronized", fine_tune="top:4")
    assert [w.shape for w in model.get_weights()] == [w.shape for w in small().get_weights()]
    model.save(tmp_path / "model.keras")
    norms = batch_normalisations(keras.saving.load_model(tmp_path / "model.keras"))
    assert {norm.name for norm in norms if norm.synchronized} == {"block_16_project_BN", "Conv_1_bn"}
    assert {norm.name for norm in norms if norm.trainable} == {"block_16_project_BN", "Conv_1_bn"}


def test_frozen_batch_normalisations_stay_as_they_come() -> None:
    model = small(batch_norm="frozen")
    assert [w.shape for w in model.get_weights()] == [w.shape for w in small().get_weights()]  # phases pass on their weights
    norms = [layer for layer in model.get_layer("mobilenetv2").layers if isinstance(layer, keras.layers.BatchNormalization)]
    before = [value for layer in norms for value in layer.get_weights()]
    kernel = model.get_layer("mobilenetv2").get_layer("Conv_1").kernel
    was = np.array(kernel)
    model.fit(IMAGES, np.arange(len(IMAGES)) % 3, verbose=0)
    assert norms
    assert all(np.array_equal(a, b) for a, b in zip(before, [v for n in norms for v in n.get_weights()], strict=True))
    assert not np.array_equal(np.array(kernel), was)


def test_everything_trains_and_two_phases_hand_over_by_weights() -> None:
    first, second = small(fine_tune="head", augment=("flip",)), small(fine_tune="all")
    assert all(layer.trainable for layer in second.get_layer("mobilenetv2").layers)
    assert [weight.path for weight in first.weights] == [weight.path for weight in second.weights]
    second.set_weights(first.get_weights())
    for old, new in zip(first.get_weights(), second.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    assert type(first.optimizer) is type(keras.optimizers.Adam())
    assert first.jit_compile == keras.Sequential([keras.layers.Dense(1)]).jit_compile  # Keras' default


# The file ------------------------------------------------------------------------------------------------------------

STRANGER = """
import sys
sys.modules["dlspark"] = None  # importing it fails
import keras, numpy as np
model = keras.saving.load_model(sys.argv[1], safe_mode=True)
data = np.load(sys.argv[2])
x = data["images"]
for predictions in model(x, training=False), model(x):  # the second would augment with Keras' own default
    np.testing.assert_allclose(np.asarray(predictions), data["predictions"], rtol=1e-4, atol=1e-5)
assert len(model.trainable_variables) == int(data["trainable"])
backbone = model.get_layer("resnet50").get_weights()
model.run_eagerly = True
model.train_on_batch(x, data["labels"])
for old, new in zip(backbone, model.get_layer("resnet50").get_weights(), strict=True):
    np.testing.assert_array_equal(old, new)
"""


def tiny_resnet(**_: object) -> Any:
    inputs = keras.Input((*SIZE, 3))
    x = keras.layers.Conv2D(4, 3, strides=4, name="conv1_conv")(inputs)
    return keras.Model(inputs, keras.layers.BatchNormalization(name="conv1_bn")(x), name="tiny")


def test_the_file_loads_where_there_is_no_dlspark(tmp_path: Path) -> None:
    model = build_classifier(
        replace(BACKBONES["resnet50"], constructor=tiny_resnet),  # to test the layers around it without its 90 MB
        3,
        image_size=SIZE,
        weights=None,
        fine_tune="head",
        dense=(8,),
        dropout=0.2,
        augment=("flip", "rotation"),
    )
    model.save(tmp_path / "model.keras")
    predictions = predict(model)
    assert np.ptp(predictions, axis=0).min() > 1e-3  # random weights, but different predictions for each image
    np.savez(
        tmp_path / "data.npz",
        images=IMAGES,
        labels=LABELS,
        predictions=predictions,
        trainable=len(model.trainable_variables),
    )
    command = [sys.executable, "-c", STRANGER, "model.keras", "data.npz"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_augmentation_acts_in_training_only() -> None:
    model = small(augment=("flip", "rotation", keras.layers.RandomBrightness(0.2)))
    front = backbone_input(model, "mobilenetv2")
    plain = IMAGES / np.float32(127.5) - 1
    np.testing.assert_allclose(front.predict(IMAGES, verbose=0), plain, atol=1e-6)
    np.testing.assert_allclose(np.asarray(front(IMAGES)), plain, atol=1e-6)  # Keras' default would augment here
    assert not np.allclose(np.asarray(front(IMAGES, training=True)), plain, atol=0.1)


def test_mixed_precision_keeps_pixels_and_probabilities_in_float32(mixed_bfloat16: None) -> None:
    model = build_classifier("resnet50", 3, image_size=SIZE, weights=None, fine_tune="head", augment=("flip",))
    front = predict(backbone_input(model, "resnet50"))
    np.testing.assert_allclose(front, keras.applications.resnet50.preprocess_input(IMAGES.astype("float32")), atol=2e-5)
    assert predict(model).dtype == np.float32
    assert model.get_layer("resnet50").get_layer("conv1_conv").compute_dtype == "bfloat16"


# Learning rates by depth ---------------------------------------------------------------------------------------------


def steps(optimizer: Any, values: list[Any], gradients: list[list[Any]]) -> list[Any]:
    variables = [keras.Variable(value, name=f"v{number}") for number, value in enumerate(values)]
    for gradient in gradients:
        optimizer.apply([keras.ops.convert_to_tensor(g) for g in gradient], variables)
    return [np.asarray(variable) for variable in variables]


@pytest.mark.parametrize("scheduled", [False, True])
def test_each_variable_moves_as_under_adam_with_its_own_rate(scheduled: bool) -> None:
    from dlspark.models.optimizers import DepthDecayAdam

    def rate(factor: float) -> Any:
        return keras.optimizers.schedules.ExponentialDecay(0.1 * factor, 2, 0.5) if scheduled else 0.1 * factor

    values = [RNG.normal(size=(5, 3)).astype("float32") for _ in range(3)]
    gradients = [[RNG.normal(size=(5, 3)).astype("float32") for _ in range(3)] for _ in range(5)]
    moved = steps(DepthDecayAdam(rate(1.0), multipliers={"v0": 0.25, "v1": 0.3}), values, gradients)
    for number, factor in enumerate((0.25, 0.3, 1.0)):
        alone = steps(keras.optimizers.Adam(rate(factor)), values, gradients)
        np.testing.assert_allclose(moved[number], alone[number], rtol=2e-6, atol=1e-7)
    assert np.abs(moved[0] - values[0]).max() < np.abs(moved[2] - values[2]).max() / 2


def test_a_classifier_moves_by_depth_and_its_file_keeps_the_rates(tmp_path: Path) -> None:
    model = small(depth_decay=0.5, learning_rate=1e-2)
    model.save(tmp_path / "model.keras")
    copy = keras.saving.load_model(tmp_path / "model.keras")
    assert copy.optimizer.multipliers == model.optimizer.multipliers
    copy.run_eagerly = True
    network = copy.get_layer("mobilenetv2")
    layers = ["block_15_project", "block_16_project", "Conv_1"]
    kernels = [*(network.get_layer(name).kernel for name in layers), copy.get_layer("probabilities").kernel]
    before = [np.array(kernel) for kernel in kernels]
    copy.train_on_batch(IMAGES, LABELS)
    # Adam's first step equals the rate wherever the gradient is far above epsilon.
    moved = [np.abs(np.asarray(kernel) - old).max() for kernel, old in zip(kernels, before, strict=True)]
    np.testing.assert_allclose(moved, [0.00125, 0.0025, 0.005, 0.01], rtol=1e-2)


def test_one_rate_for_all_needs_no_dlspark_optimizer_and_schedules_are_kept() -> None:
    schedule = keras.optimizers.schedules.CosineDecay(3e-4, 10)
    model = small(learning_rate=schedule)
    assert type(model.optimizer).__module__.startswith("keras.")
    assert model.optimizer.get_config()["learning_rate"]["class_name"] == "CosineDecay"


def test_the_optimizer_refuses_another_model_and_negative_rates() -> None:
    from dlspark.models.optimizers import DepthDecayAdam

    with pytest.raises(ConfigError, match="another model"):
        DepthDecayAdam(multipliers={"conv1/kernel": 0.5}).build([keras.Variable(1.0, name="other")])
    with pytest.raises(ConfigError, match="of 0 or more"):
        DepthDecayAdam(multipliers={"conv1/kernel": -0.5})


# Weights -------------------------------------------------------------------------------------------------------------


def test_real_weights_from_the_cache(keras_home: Path, real_weights: Path) -> None:
    shutil.copyfile(real_weights, keras_home / "models" / BACKBONES["mobilenetv2"].imagenet_file(SIZE))
    model = small(weights="imagenet")
    expected = keras.applications.MobileNetV2(include_top=False, weights=str(real_weights), input_shape=(*SIZE, 3))
    for old, new in zip(expected.get_weights(), model.get_layer("mobilenetv2").get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_weights_that_keras_saved(tmp_path: Path) -> None:
    network = keras.applications.MobileNetV2(include_top=False, weights=None, input_shape=(40, 40, 3))
    network.save(tmp_path / "backbone.keras")
    loaded = small(weights=tmp_path / "backbone.keras").get_layer("mobilenetv2").get_weights()
    for old, new in zip(network.get_weights(), loaded, strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_file_that_does_not_fit_is_refused_and_kept(keras_home: Path) -> None:
    file = keras_home / "models" / BACKBONES["mobilenetv2"].imagenet_file(SIZE)
    file.write_bytes(b"cut off")
    with pytest.raises(ConfigError, match="truncated"):
        small(weights="imagenet")
    assert file.exists()
    other = keras_home / "other.weights.h5"
    keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]).save_weights(other)
    with pytest.raises(ConfigError, match="include_top=False"):
        small(weights=other)


def test_without_a_network_it_fails_soon_and_names_the_file(keras_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited = []

    def no_network(*_: object, **__: object) -> None:
        waited.append(socket.getdefaulttimeout())
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    with pytest.raises(ConfigError, match="Name or service not known") as caught:
        small(weights="imagenet", image_size=(96, 96))
    file = keras_home / "models/mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_96_no_top.h5"
    assert f"put it at {str(file)!r}" in str(caught.value)
    assert waited == [10.0]
    assert socket.getdefaulttimeout() is None


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backbone": "resnet5"}, "Did you mean 'resnet50'"),
        ({"backbone": None}, "Unknown backbone None. Known: efficientnetv2b0"),
        ({"num_classes": 1}, "Expected num_classes as a whole number of at least 2"),
        ({"num_classes": 2.5}, "num_classes"),
        ({"num_classes": True}, "num_classes"),
        ({"image_size": (31, 64)}, "Expected image_size of mobilenetv2 as a whole number of at least 32"),
        ({"backbone": "xception", "image_size": (71, 70)}, "at least 71"),
        ({"image_size": 224}, "Expected image_size to be"),
        ({"image_size": (32, 32, 3)}, "Expected image_size to be"),
        ({"fine_tune": "top"}, "'top:N'"),
        ({"fine_tune": "top:0"}, "'top:N'"),
        ({"fine_tune": "top:-3"}, "'top:N'"),
        ({"fine_tune": "none"}, "'all', 'head'"),
        ({"fine_tune": 3}, "'all', 'head'"),
        ({"fine_tune": "top:1000"}, "N of at most 104"),
        ({"dense": 512}, "Expected dense to be a sequence"),
        ({"dense": (512, 0)}, "each item of dense"),
        ({"dropout": 1.0}, "dropout to be at least 0 and below 1"),
        ({"dropout": -0.1}, "dropout"),
        ({"depth_decay": 0.0}, "depth_decay to be above 0 and at most 1"),
        ({"depth_decay": 1.5}, "depth_decay"),
        ({"depth_decay": 0.5, "fine_tune": "head"}, "which freezes it"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"learning_rate": "fast"}, "learning_rate"),
        ({"augment": ("zoom",)}, "Unknown augmentation"),
        ({"weights": "imagenett"}, "which does not exist"),
        ({"weights": 3}, "'imagenet', a file or None"),
        ({"weights": __file__}, "ends in .h5 or .keras"),
    ],
)
def test_refusals(settings: dict[str, Any], message: str) -> None:
    settings = {"backbone": "mobilenetv2", "num_classes": 3, "image_size": SIZE, "weights": None, **settings}
    with pytest.raises(ConfigError, match=message):
        build_classifier(**settings)


def test_channels_first_is_refused() -> None:
    before = keras.config.image_data_format()
    keras.config.set_image_data_format("channels_first")
    try:
        with pytest.raises(ConfigError, match="channels_last"):
            small()
    finally:
        keras.config.set_image_data_format(before)
