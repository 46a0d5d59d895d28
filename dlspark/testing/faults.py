"""Faults to inject into a real run, to test how a plug-in handles them.

A `Fault` happens once, in one worker, at one step; the next attempt passes that step. `Faulty` is the layer that causes
it, and `disturbed_classifier` is a model with such a layer. Importing this module imports Keras and TensorFlow.

    fault = Fault(action="kill", rank=1, step=20, marker=str(tmp_path / "happened"))
    trainer = Trainer("mine", num_workers=2, store=tmp_path / "store", max_restarts=1)
    result = trainer.fit(disturbed_classifier(fault), toys.separable(1003), epochs=3, batch_size=64)
    assert fault.happened_at() is not None and result.restarts == 1
"""

from __future__ import annotations

import dataclasses
import os
import resource
import signal
import time
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dlspark.testing.toys import PACKAGE

SLEEP_SECONDS = 3600.0  # longer than any test
ACTIONS = {
    "raise": "an exception",
    "kill": "SIGKILL for the worker's process",
    "stop": "SIGSTOP for the worker's process",
    "freeze": "SIGSTOP for the process, its guard and its parents except Spark's daemon and JVM, as if the host froze",
    "hang": "Python code that never returns",
    "slow": "this and every later step takes ``seconds`` longer",
    "nan": "the loss of this step is NaN on this rank",
    "memory": "an allocation beyond the process' memory limit",
    "oom kill": "the kernel kills the process for exceeding the memory limit of ``cgroup``",
    "reset": "the TCP connections are reset, except those to the driver",
    "kill executor": "SIGKILL for the JVM above the process",
    "end driver": "SIGTERM for ``driver``, within a step of ``seconds``",
    "interrupt driver": "SIGINT for ``driver``, as Ctrl-C sends, within a step of ``seconds``",
    "kill driver": "SIGKILL for ``driver``",
}

SIGNALS = {
    "kill": signal.SIGKILL,
    "stop": signal.SIGSTOP,
    "end driver": signal.SIGTERM,
    "interrupt driver": signal.SIGINT,
    "kill driver": signal.SIGKILL,
}


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault: what goes wrong, where and when.

    Attributes:
        action: one of `ACTIONS`.
        rank: the rank of the worker that fails.
        step: the number of the training step, from 1, counted in the worker's process.
        marker: a file that the fault creates; while it exists, nothing happens.
        driver: the driver's process, for the actions that need it.
        seconds: the delay of "slow", "end driver" and "interrupt driver".
        cgroup: folder of a control group with a memory limit, which the process enters.
    """

    action: str
    marker: str
    rank: int = 1
    step: int = 20
    driver: int = dataclasses.field(default_factory=os.getpid)
    seconds: float = 0.5
    cgroup: str = ""

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise ValueError(f"Expected action as one of {', '.join(ACTIONS)}; got {self.action!r}.")

    def happened_at(self) -> float | None:
        """Return the ``time.time()`` of the fault; None if it has not happened."""
        try:
            return os.stat(self.marker).st_mtime
        except FileNotFoundError:
            return None

    def prevent(self) -> Fault:
        """Create the marker, so that the fault never happens, and return this fault: for an undisturbed run."""
        open(self.marker, "a").close()
        return self


_steps_done = 0  # training steps in this process, over all its jobs


@keras.saving.register_keras_serializable(package=PACKAGE)
class Faulty(keras.layers.Layer):
    """Passes its input through until the fault happens. Needs the TensorFlow backend."""

    def __init__(self, fault: Fault | dict[str, Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.fault = Fault(**fault) if isinstance(fault, dict) else fault
        self._first_step: int | None = None

    def call(self, inputs: Any, training: bool = False) -> Any:
        if not training or isinstance(inputs, keras.KerasTensor):
            return inputs
        factor = tf.py_function(self._pass, [], tf.float32)
        factor.set_shape(())
        return inputs * factor

    def _pass(self) -> np.float32:
        """Return the factor of the loss: 1, or NaN for the fault "nan"."""
        global _steps_done
        if self._first_step is None:
            self._first_step = _steps_done
        _steps_done += 1
        fault = self.fault
        if os.environ.get("DLSPARK_RANK") != str(fault.rank) or _steps_done - self._first_step < fault.step:
            return np.float32(1)
        if fault.action == "slow" and fault.happened_at() is not None:
            time.sleep(fault.seconds)
        try:
            os.close(os.open(fault.marker, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return np.float32(1)
        return np.float32(np.nan) if fault.action == "nan" else _happen(fault)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "fault": dataclasses.asdict(self.fault)}


def _happen(fault: Fault) -> np.float32:
    if fault.action == "raise":
        raise ArithmeticError(f"this layer fails on rank {fault.rank}")
    if fault.action == "hang":
        time.sleep(SLEEP_SECONDS)
    if fault.action == "memory":
        _run_out_of_memory()
    if fault.action == "oom kill":
        with open(os.path.join(fault.cgroup, "cgroup.procs"), "w") as file:
            file.write(str(os.getpid()))
        np.ones(1 << 30)
    if fault.action == "reset":
        _reset_connections(fault.driver)
    if fault.action == "kill executor":
        import psutil

        next(process for process in psutil.Process().parents() if "java" in process.name()).kill()
        time.sleep(SLEEP_SECONDS)  # Spark ends the JVM's Python processes
    if fault.action == "freeze":
        _freeze()
    if fault.action in SIGNALS:
        os.kill(fault.driver if "driver" in fault.action else os.getpid(), SIGNALS[fault.action])
    if fault.action in ("end driver", "interrupt driver"):
        time.sleep(fault.seconds)  # a step takes milliseconds: the run could end before the signal arrives
    return np.float32(1)


def _freeze() -> None:
    import psutil

    worker = psutil.Process()
    parents = worker.parents()
    jvm = next(i for i, process in enumerate(parents) if "java" in process.name())
    for process in [*worker.children(recursive=True), *parents[: jvm - 1]]:  # except the daemon, which other workers need
        process.suspend()
    worker.suspend()


def _run_out_of_memory() -> None:
    """Allocate more than the limit on the address space, then restore the limit."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    try:
        resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), limits[1]))
        np.ones(1 << 30)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def _reset_connections(driver: int) -> None:
    """Reset this process' TCP connections to other workers."""
    import socket
    import struct

    import psutil

    theirs = {c.laddr.port for c in psutil.Process(driver).net_connections("tcp")}
    for connection in psutil.Process().net_connections("tcp"):
        if connection.status != psutil.CONN_ESTABLISHED or connection.raddr.port in theirs or connection.fd < 0:
            continue
        with socket.socket(fileno=os.dup(connection.fd)) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.shutdown(socket.SHUT_RDWR)


def disturbed_classifier(fault: Fault) -> Any:
    """``toys.dense_classifier`` with a `Faulty` layer."""
    keras.utils.set_random_seed(1)
    dense = keras.layers.Dense(16, activation="relu", kernel_regularizer=keras.regularizers.L2(1e-4))
    # After the ReLU, which may turn NaN into 0.
    model = keras.Sequential([keras.layers.Input((8,)), dense, Faulty(fault), keras.layers.Dense(3, activation="softmax")])
    model.compile(
        keras.optimizers.SGD(0.1, momentum=0.9, global_clipnorm=1.0), "sparse_categorical_crossentropy", metrics=["accuracy"]
    )
    return model
