"""ElephasBackend: Elephas' synchronous mode, one round an epoch, with history, validation and callbacks on the driver."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from dlspark.backend import Backend, Capabilities
from dlspark.cluster import check_cluster, driver_host, task_resources
from dlspark.errors import ConfigError
from dlspark.job import FitResult, TrainJob, WorkerReport, WorkerResult
from dlspark.monitor import RunMonitor
from dlspark.spark import get_session
from dlspark.store import Store
from dlspark.worker import load_model, load_payload, save_trained, versions

if TYPE_CHECKING:
    from dlspark_elephas.master import Master, Outcome


@dataclass(frozen=True, kw_only=True)
class ElephasOptions:
    """Options of backend ``elephas``.

    Attributes:
        mode: "synchronous": after every epoch the workers' weights are averaged by their rows.
    """

    mode: str = "synchronous"

    def __post_init__(self) -> None:
        if self.mode != "synchronous":
            raise ConfigError(
                f"mode must be 'synchronous'; {self.mode!r} came. Elephas' parameter server takes weights from anyone who "
                "reaches its port, so dlspark does not start it."
            )


class ElephasBackend(Backend):
    """Weight averaging between epochs, over Spark tasks; nothing is exchanged within an epoch."""

    name: ClassVar[str] = "elephas"
    options_type: ClassVar[type] = ElephasOptions
    capabilities: ClassVar[Capabilities] = Capabilities(
        synchronous_gradients=False, exact_rows=True, deterministic=True, resumable=True
    )

    def check(self, job: TrainJob) -> None:
        check_cluster(job, self.name, barrier=False)

    def fit(self, job: TrainJob) -> FitResult:
        with (
            RunMonitor(job, self.name, driver_host(get_session(job.num_workers))) as monitor,
            monitor.explaining_failures(),
        ):
            return _Rounds(job, monitor).run()


class _Rounds:
    """One run: the driver's copy of the model and what the rounds have added to it."""

    def __init__(self, job: TrainJob, monitor: RunMonitor) -> None:
        from dlspark_elephas.master import Master

        self._job = job
        self._monitor = monitor
        self._spark = get_session(job.num_workers)
        payload = load_payload(job)
        self._model = load_model(job, payload)
        if getattr(self._model.optimizer, "use_ema", False):
            raise ConfigError(
                "Backend 'elephas' cannot train with use_ema=True: every round would replace the weights by their "
                "moving averages. Turn it off, or use 'mirrored' or 'horovod'."
            )
        self._callbacks = payload.callbacks
        self._master: Master = Master(self._model, job)
        self._epoch_seconds: list[float] = []
        self._reports: dict[int, WorkerReport] = {}

    def run(self) -> FitResult:
        import keras

        # In one process the model's own fit would run them; here the driver does, with the averaged model.
        callbacks = keras.callbacks.CallbackList(list(self._callbacks), add_history=True, model=self._model)
        callbacks.set_params({"epochs": self._job.epochs, "steps": None, "verbose": 0})
        self._model.stop_training = False
        callbacks.on_train_begin()
        logs: dict[str, float] = {}
        for epoch in range(self._job.epochs):
            started = time.perf_counter()
            callbacks.on_epoch_begin(epoch)
            logs = self._train_round(epoch)
            if self._job.validation is not None:
                logs |= {f"val_{name}": value for name, value in self._evaluate(epoch).items()}
            callbacks.on_epoch_end(epoch, logs)
            seconds = time.perf_counter() - started
            self._epoch_seconds.append(seconds)
            self._monitor.receive({"kind": "epoch", "rank": 0, "epoch": epoch, "logs": logs, "seconds": seconds})
            if self._model.stop_training:
                break
        self._model.optimizer.finalize_variable_values(self._model.trainable_weights)
        callbacks.on_train_end(logs)
        save_trained(Store(self._job.uri), self._model)
        return self._result(self._model.history.history)

    def _train_round(self, epoch: int) -> dict[str, float]:
        resources = task_resources(self._spark)
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
        outcomes: Sequence[Outcome] = self._master.evaluate_round(
            self._spark, job_uri=self._job.uri, epoch=epoch, endpoint=self._monitor.endpoint
        )
        return self._master.merged_metrics(outcomes)

    def _account(self, report: WorkerReport) -> None:
        """Add a round's report to those of the rounds before it."""
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

    def _result(self, history: dict[str, Any]) -> FitResult:
        plain = {name: [float(value) for value in values] for name, values in history.items()}
        found = versions()
        return self._monitor.result(
            [
                WorkerResult(report=report, history=plain, epoch_seconds=self._epoch_seconds, versions=found)
                for _, report in sorted(self._reports.items())
            ]
        )
