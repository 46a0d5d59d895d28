"""One process of one subject: ``python -m dlspark_bench.subject SPEC.json``. It runs the timed training, in turns."""

from __future__ import annotations

import json
import os
import resource
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from dlspark import FitResult, Trainer
from dlspark_bench.cores import own_threads
from dlspark_bench.hardware import devices
from dlspark_bench.scenario import Scenario, Subject
from dlspark_bench.turns import Clock, put, wait


def main() -> None:
    """Train as the spec says, once for each launch, and write the results beside the spec."""
    threading.Thread(target=_end_with_the_harness, daemon=True).start()
    path = Path(sys.argv[1])
    spec = json.loads(path.read_text())
    scenario = Scenario.from_dict(spec["scenario"])
    subject = Subject.parse(spec["subject"])
    if scenario.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    result: dict[str, Any] = {"fits": []}
    for number, folder in enumerate(spec["launches"]):
        wait(Path(folder, "prepare"))
        # Later launches measure the time to the first step, so they last one epoch.
        epochs = scenario.all_epochs if number == 0 else 1
        go, model = _prepared(scenario, subject, folder, epochs, spec["delay_seconds"])
        if number == 0 and model is not None:
            from dlspark_bench import work

            result["flops_per_image"] = work.flops_per_image(model)
            result["gradient_bytes"] = work.gradient_bytes(model)
        put(Path(folder, "ready"), "")
        wait(Path(folder, "launch"))
        put(Path(folder, "launched"), repr(time.time()))
        told = go()
        if isinstance(told, FitResult):
            result["fits"].append(json.loads(told.to_json()))
        put(Path(folder, "through"), "")
    result["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result["jvm_peak_memory_bytes"] = _jvm_peak_memory_bytes()
    if subject.alone and subject.trains:
        result["devices"] = devices(scenario.device)
    put(path.with_suffix(".result"), json.dumps(result))


def _end_with_the_harness() -> None:
    """Exit when the harness does, which closes the pipe on stdin."""
    os.read(0, 1)  # sys.stdin has a lock, on which a fork (Horovod's, for example) would block
    os._exit(1)


def _prepared(
    scenario: Scenario, subject: Subject, folder: str, epochs: int, delay_seconds: float
) -> tuple[Callable[[], Any], Any]:
    """Create the model, the images and the Spark session.

    Returns:
        A function that trains, and the model; None if only the workers have the model.
    """
    clock = Clock(folder, epochs=scenario.epochs, delay_seconds=delay_seconds)
    share = Subject(subject.name, 1, subject.threads) if subject.alone else subject
    if subject.name == "feed":
        from dlspark_bench import feed

        return feed.prepared(scenario, share, epochs, clock), None
    if subject.name.startswith("bare-"):
        from dlspark_bench import bare

        return bare.prepared(scenario, subject, folder, epochs)
    if subject.alone and scenario.device == "cpu":
        own_threads(subject.threads)
    from dlspark_bench import work
    from dlspark_bench.pace import Pace

    model, (x, y) = work.model(scenario), work.images(scenario, scenario.rows(share))
    options: dict[str, Any] = {
        "epochs": epochs,
        "batch_size": scenario.batch_size(share),
        "callbacks": [Pace(clock)],
        "verbose": 0,
    }
    if subject.name == "loop":
        return partial(_loop, model, x, y, **options), model
    if not subject.alone:
        from dlspark.spark import get_session

        get_session(subject.workers)
    trainer = Trainer(subject.name, num_workers=share.workers)
    return partial(trainer.fit, model, (x, y), seed=scenario.seed, **options), model


def _loop(model: Any, x: Any, y: Any, *, batch_size: int, **options: Any) -> None:
    """Train with a hand-written loop: ``fit`` on arrays, without two known slow-downs.

    A slow baseline would make the other subjects look better.
    """
    if os.environ.get("KERAS_BACKEND", "tensorflow") != "tensorflow":
        model.fit(x, y, batch_size=batch_size, **options)
        return
    import tensorflow as tf

    # First: variables created in the first step cause a second trace.
    model.optimizer.build(model.trainable_variables)
    (output,) = model.outputs
    predicted = tf.zeros((1, *output.shape[1:]), output.dtype)
    model.compute_loss(x[:1], y[:1], predicted)
    model.compute_metrics(x[:1], y[:1], predicted)
    model.reset_metrics()
    # Second: the autotuner of Keras' array pipeline sometimes delays the end of an epoch by seconds.
    untuned = tf.data.Options()
    untuned.autotune.enabled = False
    rows = tf.data.Dataset.range(len(x)).shuffle(len(x)).batch(batch_size)
    x, y = tf.constant(x), tf.constant(y)
    batches = rows.map(lambda some: (tf.gather(x, some), tf.gather(y, some))).prefetch(2).with_options(untuned)
    model.fit(batches, shuffle=False, **options)


def _jvm_peak_memory_bytes() -> int | None:
    """Return the peak resident memory of this process' JVM; None without Spark or /proc."""
    for child in psutil.Process().children(recursive=True):
        if child.name() == "java":
            try:
                lines = Path(f"/proc/{child.pid}/status").read_text().splitlines()
            except OSError:
                return None
            return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
    return None


if __name__ == "__main__":
    main()
