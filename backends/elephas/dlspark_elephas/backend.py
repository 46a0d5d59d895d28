"""ElephasBackend: Elephas' modes, one round an epoch, with history, validation and callbacks on the driver."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from dlspark.plugin import (
    Backend,
    Capabilities,
    Checkpoints,
    ConfigError,
    Engine,
    FitResult,
    JobSettings,
    Position,
    RunMonitor,
    Store,
    TrainJob,
    WorkerReport,
    WorkerResult,
    callback_arrays,
    cancellable,
    capture,
    check_cluster,
    driver_host,
    get_session,
    load_model,
    load_payload,
    messages,
    optimizers_of,
    restore_callbacks,
    resumed,
    save_trained,
    task_resources,
    versions,
    watched,
)

if TYPE_CHECKING:
    from dlspark_elephas.master import Master, Outcome


MODES = ("synchronous", "asynchronous")
FREQUENCIES = ("epoch", "batch")


@dataclass(frozen=True, kw_only=True)
class ElephasOptions:
    """Options of backend ``elephas``.

    Attributes:
        mode: "synchronous": the workers' weights are averaged by their rows after every epoch. "asynchronous": each worker
            adds its changes to the weights of a parameter server, without waiting for the others.
        frequency: when it does so in mode "asynchronous": after its part of an "epoch" (None, the default) or of a
            "batch".
    """

    mode: str = "synchronous"
    frequency: str | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("mode", MODES), ("frequency", (None, *FREQUENCIES))):
            value = getattr(self, name)
            if value not in allowed:
                known = " or ".join(repr(one) for one in allowed if one is not None)
                raise ConfigError(f"Expected {name} to be {known}; got {value!r}.{_why_no_sockets(value)}")
        if self.mode == "synchronous" and self.frequency is not None:
            raise ConfigError(
                f"Expected no frequency with mode='synchronous', which averages once an epoch; got {self.frequency!r}. Set "
                "mode='asynchronous', or leave frequency out."
            )


def _why_no_sockets(value: Any) -> str:
    if "socket" not in str(value).lower():
        return ""
    return (
        " Elephas' socket mode is not offered: its server takes weights from anyone who reaches its port, as it has no "
        "authentication, and its client looks for the server on its own host. mode='asynchronous' has a server with "
        "authentication."
    )


class ElephasBackend(Backend):
    """Weight averaging between epochs, or a parameter server, over Spark tasks that do not wait for each other."""

    name: ClassVar[str] = "elephas"
    engine: ClassVar[Engine] = Engine(packages=("dlspark-keras-elephas", "elephas"), modules=("elephas",))
    options_type: ClassVar[type] = ElephasOptions
    capabilities = Capabilities(synchronous_gradients=False, exact_rows=True, deterministic=True, resumable=True)

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        if self.options.mode == "asynchronous":  # the result depends on the order of the updates
            self.capabilities = dataclasses.replace(self.capabilities, deterministic=False, resumable=False)

    def check(self, settings: JobSettings, uri: str) -> None:
        if settings.checkpoint_steps:
            raise ConfigError(
                "Backend 'elephas' cannot save a checkpoint within an epoch, because a partial round is lost. Leave "
                "checkpoint_steps out: it saves one after every epoch."
            )
        spark = get_session(settings.num_workers)
        if spark.sparkContext.getConf().get("spark.speculation", "false").strip().lower() == "true":
            raise ConfigError(
                "Backend 'elephas' needs every task to run once, but spark.speculation=true starts slow tasks twice. Start "
                "the session without it."
            )
        check_cluster(settings, uri, backend=self.name, barrier=self.engine.barrier, packages=self.engine.packages)

    def fit(self, job: TrainJob) -> FitResult:
        spark = get_session(job.num_workers)
        with (
            cancellable(spark) as cancel,
            # An interrupted run ends at once with the last round's checkpoint, because a partial round is lost.
            watched(job, self.name, driver_host(spark), abort=cancel, pausable=False) as monitor,
            monitor.explaining_failures(),
        ):
            return _Rounds(job, monitor, self.options).run()


class _Rounds:
    """One run: the driver's copy of the model, and the results of the rounds so far."""

    def __init__(self, job: TrainJob, monitor: RunMonitor, options: ElephasOptions) -> None:
        from dlspark_elephas.asynchronous import AsynchronousMaster
        from dlspark_elephas.master import Master

        self._job = job
        self._monitor = monitor
        self._spark = get_session(job.num_workers)
        payload = load_payload(job)
        self._model = load_model(job, payload)
        if getattr(self._model.optimizer, "use_ema", False):
            raise ConfigError(
                "Backend 'elephas' cannot train with use_ema=True: every round would replace the weights by their moving "
                "averages. Set it to False, or use 'mirrored' or 'horovod'."
            )
        names = [optimizer.name for optimizer in optimizers_of(self._model)]
        if len(names) > 1:
            raise ConfigError(
                f"Backend 'elephas' exchanges the state of one optimizer; the model has {', '.join(names)}. Use 'mirrored' "
                "or 'horovod'."
            )
        self._callbacks = payload.callbacks_for(self._model)
        self._master: Master = (
            AsynchronousMaster(self._model, job, options.frequency or "epoch")
            if options.mode == "asynchronous"
            else Master(self._model, job)
        )
        self._start = resumed(job, self._model)
        self._history = {name: list(values) for name, values in self._start.position.history.items()}
        self._epoch_seconds = list(self._start.position.epoch_seconds)
        self._reports: dict[int, WorkerReport] = {}

    def run(self) -> FitResult:
        import keras

        # The driver runs the callbacks, with the averaged model, as ``fit`` would in one process.
        callbacks = keras.callbacks.CallbackList(list(self._callbacks), add_history=True, model=self._model)
        callbacks.set_params({"epochs": self._job.epochs, "steps": None, "verbose": 0})
        self._model.stop_training = False
        callbacks.on_train_begin()
        restore_callbacks(self._callbacks, self._start.arrays)
        logs: dict[str, float] = {}
        first = self._start.position
        for epoch in range(first.epoch, first.epoch if first.stopped else self._job.epochs):
            started = time.perf_counter()
            callbacks.on_epoch_begin(epoch)
            logs = self._train_round(epoch)
            if self._job.validation is not None:
                logs |= {f"val_{name}": value for name, value in self._evaluate(epoch).items()}
            callbacks.on_epoch_end(epoch, logs)
            seconds = time.perf_counter() - started
            self._epoch_seconds.append(seconds)
            # The history has what callbacks added, such as learning_rate: they get a copy of ``logs``.
            self._keep(epoch, {name: float(values[-1]) for name, values in self._model.history.history.items()}, seconds)
            if self._model.stop_training:
                break
        self._model.optimizer.finalize_variable_values(self._model.trainable_weights)
        callbacks.on_train_end(logs)
        self._master.close()
        save_trained(Store(self._job.uri), self._model)
        return self._result()

    def _keep(self, epoch: int, logs: dict[str, float], seconds: float) -> None:
        """Report the end of an epoch, and save a checkpoint."""
        self._monitor.receive(messages.EpochEnded(rank=0, epoch=epoch, logs=logs, seconds=seconds))
        for name, value in logs.items():
            self._history.setdefault(name, []).append(value)
        if not self._job.checkpoints:
            return
        began = time.perf_counter()
        position = Position(
            epoch=epoch + 1,
            history=self._history,
            epoch_seconds=self._epoch_seconds,
            stopped=bool(self._model.stop_training),
        )
        arrays = {**capture(self._model), **callback_arrays(self._callbacks)}
        name = Checkpoints(Store(self._job.uri)).save(arrays, position)
        self._monitor.receive(messages.CheckpointSaved(rank=0, name=name, seconds=time.perf_counter() - began))

    def _train_round(self, epoch: int) -> dict[str, float]:
        resources = task_resources(self._spark)
        with self._monitor.launched():
            outcomes = self._master.train_round(
                self._spark,
                job_uri=self._job.uri,
                epoch=epoch,
                endpoint=self._monitor.endpoint,
                threads=resources.cores,
                needs_gpu=resources.gpus > 0,
            )
        for outcome in outcomes:
            self._account(outcome.report)
        return self._master.merged_metrics(outcomes)

    def _evaluate(self, epoch: int) -> dict[str, float]:
        with self._monitor.launched():
            outcomes: Sequence[Outcome] = self._master.evaluate_round(
                self._spark, job_uri=self._job.uri, epoch=epoch, endpoint=self._monitor.endpoint
            )
        return self._master.merged_metrics(outcomes)

    def _account(self, report: WorkerReport) -> None:
        """Add a round's report to those of earlier rounds."""
        before = self._reports.get(report.rank)
        if before is not None:
            report = dataclasses.replace(
                report,
                rows=before.rows + report.rows,
                seconds=before.seconds + report.seconds,
                input_seconds=before.input_seconds + report.input_seconds,
                peak_memory_bytes=max(before.peak_memory_bytes, report.peak_memory_bytes),
            )
        self._reports[report.rank] = report

    def _result(self) -> FitResult:
        found = versions()
        return self._monitor.result(
            [
                WorkerResult(report=report, history=self._history, epoch_seconds=self._epoch_seconds, versions=found)
                for _, report in sorted(self._reports.items())
            ]
        )
