"""HorovodBackend: launches workers by horovod.spark.run and lets them sum by grouped all-reduces."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import logging
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from dlspark.plugin import (
    MODEL_FILE,
    PAYLOAD_FILE,
    Capabilities,
    ConfigError,
    Engine,
    FitResult,
    JobSettings,
    MissingDependencyError,
    SparkLaunchBackend,
    Store,
    TrainJob,
    WorkerFunction,
    WorkerResult,
    WorkerSession,
    ending_connections,
    environment,
    get_session,
    horovod_lifetime,
    is_local,
    own_signals,
    own_threads,
    stopped_rendezvous,
    task_resources,
)

# Horovod looks for tensors to reduce once a cycle, on a thread that takes the cores of the computation. Measured with
# ResNet50 (94 MB of gradients), images/s of two ranks: 1 ms (its default) 22-24, 5 ms 27-28, 20 ms 28-29; but a small
# all-reduce waits a whole cycle, so small models want short ones.
LARGE_MODEL_BYTES = 20_000_000
LARGE_MODEL_CYCLE_MS = 20.0
SMALL_MODEL_CYCLE_MS = 5.0
_SPARK_THREAD = "(run_spark)"  # how Python names a thread after its function (horovod/spark/runner.py)
SPARK_THREAD_SECONDS = 5.0  # it ends within a moment after its job was cancelled


@dataclass(frozen=True, kw_only=True)
class HorovodOptions:
    """Options of backend ``horovod``.

    Attributes:
        cycle_time_ms: HOROVOD_CYCLE_TIME; None chooses 5 ms, or 20 ms for models of more than 20 MB.
        start_timeout_seconds: the most that Horovod waits for all tasks; None takes ``launch_seconds`` of the timeouts.
        nics: network interfaces to use, separated by commas; None lets Horovod find them ("lo" on a local session).
    """

    cycle_time_ms: float | None = None
    start_timeout_seconds: int | None = None
    nics: str | None = None

    def __post_init__(self) -> None:
        if self.cycle_time_ms is not None and self.cycle_time_ms <= 0:
            raise ConfigError(f"Expected cycle_time_ms above 0; got {self.cycle_time_ms}.")
        if self.start_timeout_seconds is not None and self.start_timeout_seconds < 1:
            raise ConfigError(f"Expected start_timeout_seconds of at least 1; got {self.start_timeout_seconds}.")


class HorovodBackend(SparkLaunchBackend):
    """One worker per Spark task, in a fresh process beside the task's own; CPU, or one GPU each from Spark."""

    name: ClassVar[str] = "horovod"
    engine: ClassVar[Engine] = Engine(
        packages=("dlspark-keras-horovod", "horovod"),
        modules=("horovod",),
        environment=("HOROVOD_CYCLE_TIME", "CUDA_VISIBLE_DEVICES"),
        barrier=True,
        open_ports="Horovod's services and gloo",
    )
    options_type: ClassVar[type] = HorovodOptions
    capabilities = Capabilities(synchronous_gradients=True, exact_rows=True, deterministic=True, resumable=True)

    def check(self, settings: JobSettings, uri: str) -> None:
        if importlib.util.find_spec("horovod") is None:
            raise MissingDependencyError(
                "Backend 'horovod' needs Horovod, which is not installed. Run: python tools/build_horovod.py in a checkout "
                "of dlspark; it needs a C++ compiler."
            )
        super().check(settings, uri)

    def fit(self, job: TrainJob) -> FitResult:
        cycle, timeout = self.options.cycle_time_ms, self.options.start_timeout_seconds
        if cycle is not None and timeout is not None:
            return super().fit(job)
        large = Store(job.uri).size(PAYLOAD_FILE if job.from_builder else MODEL_FILE) > LARGE_MODEL_BYTES
        settled = dataclasses.replace(
            self.options,
            cycle_time_ms=cycle or (LARGE_MODEL_CYCLE_MS if large else SMALL_MODEL_CYCLE_MS),
            start_timeout_seconds=timeout or math.ceil(job.timeouts.launch_seconds),
        )
        return HorovodBackend(settled).fit(job)

    @contextmanager
    def abortable(self) -> Iterator[Callable[[], None]]:
        with ending_connections() as end:
            yield end

    def launch(self, function: WorkerFunction, num_workers: int) -> list[WorkerResult]:
        import horovod.spark

        spark = get_session(num_workers)
        resources = task_resources(spark)
        nics = self.options.nics or ("lo" if is_local(spark) else None)
        logging.getLogger("horovod.spark").setLevel(logging.WARNING)
        horovod_lifetime.mend()
        with _quiet_spark_thread(), stopped_rendezvous(), own_signals():
            results: list[WorkerResult] = horovod.spark.run(
                partial(_rank, function, self.options, resources.cores, resources.gpus > 0),
                num_proc=num_workers,
                start_timeout=self.options.start_timeout_seconds,
                executable=spark.sparkContext.pythonExec,
                nics=set(nics.split(",")) if nics else None,
                verbose=0,
            )
        return results


@contextmanager
def _quiet_spark_thread() -> Iterator[None]:
    """Hide the sixty lines of Java that a failed run would print.

    Horovod runs the Spark job in its own thread and cancels the job when a rank has failed; the thread then raises the
    cancellation. The failure itself reaches the caller by other means.
    """
    before, others = threading.excepthook, set(threading.enumerate())

    def hook(dying: threading.ExceptHookArgs) -> None:
        if dying.thread is None or not dying.thread.name.endswith(_SPARK_THREAD):
            before(dying)

    threading.excepthook = hook
    try:
        yield
    finally:
        for thread in set(threading.enumerate()) - others:
            if thread.name.endswith(_SPARK_THREAD):
                thread.join(SPARK_THREAD_SECONDS)
        if threading.excepthook is hook:
            threading.excepthook = before


def _rank(function: WorkerFunction, options: HorovodOptions, threads: int, needs_gpu: bool) -> WorkerResult:
    """Run in every process that Horovod starts."""
    from horovod.spark.task import get_available_devices

    with environment(
        HOROVOD_CYCLE_TIME=str(options.cycle_time_ms),
        CUDA_VISIBLE_DEVICES=",".join(get_available_devices()) if needs_gpu else "",
    ):
        own_threads(threads)
        import horovod.tensorflow as hvd

        hvd.init()
        try:
            return function(AllreduceSession(hvd.rank(), hvd.size(), threads=threads, needs_gpu=needs_gpu))
        finally:
            hvd.shutdown()


class AllreduceSession(WorkerSession):
    """Sums by one grouped all-reduce. Ranks trace and call in the same order, so counting gives equal names."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._calls = itertools.count()

    def sum(self, tensors: Sequence[Any]) -> list[Any]:
        import horovod.tensorflow as hvd

        return list(hvd.grouped_allreduce(list(tensors), op=hvd.Sum, name=f"dlspark.{next(self._calls)}"))
