"""LocalBackend: one worker in this process. The shortest implementation of the contract."""

from __future__ import annotations

from typing import ClassVar

from dlspark.backend import Backend, Capabilities, watched
from dlspark.job import FitResult, TrainJob
from dlspark.worker import WorkerSession, run_worker


class LocalBackend(Backend):
    """Trains in this process under any Keras backend, with the framework's own choice of threads.

    Like every backend it trains a copy: the caller's model changes on success only.
    """

    name: ClassVar[str] = "local"
    capabilities = Capabilities(
        synchronous_gradients=True, exact_rows=True, deterministic=True, resumable=True, max_workers=1
    )

    def fit(self, job: TrainJob) -> FitResult:
        with watched(job, self.name, None) as monitor:
            with monitor.explaining_failures():
                result = run_worker(job.uri, monitor.endpoint, WorkerSession())
            return monitor.result([result])
