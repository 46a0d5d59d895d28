"""The driver's view of one run: what the workers report, the failure that explains the others, the result."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

from dlspark.channel import Report, Reporter, ReportServer, SocketEndpoint
from dlspark.errors import DlsparkError, WorkerError
from dlspark.job import FitResult, TrainJob, WorkerResult
from dlspark.progress import Display, open_display


class RunMonitor:
    """Listens to the workers of one job; a context manager that closes its port and display.

    Args:
        job: the run.
        backend: the backend's name, for display and result.
        host: the address to listen on; None when all workers run in this process and report by call.
    """

    def __init__(self, job: TrainJob, backend: str, host: str | None) -> None:
        self._job = job
        self._backend = backend
        self._host = host
        self._started = time.perf_counter()
        self._first_step_seconds: dict[int, float] = {}
        self._failure: Report | None = None
        self._server: ReportServer | None = None
        self._display: Display = open_display(job, backend)

    def __enter__(self) -> RunMonitor:
        self._display.start()
        if self._host is not None:
            try:
                self._server = ReportServer(self._host, self.receive)
            except BaseException:
                self._display.stop()
                raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if self._server is not None:
                self._server.close()
        finally:
            self._display.stop()

    @property
    def endpoint(self) -> SocketEndpoint | InProcess:
        """What workers connect to."""
        return InProcess(self) if self._server is None else self._server.endpoint

    def receive(self, report: Report) -> None:
        """Take in one report. A failure stops the other workers, which may wait for the failed one for ever."""
        rank = int(report["rank"])
        if report["kind"] == "step":
            self._first_step_seconds.setdefault(rank, time.perf_counter() - self._started)
        if report["kind"] == "failed" and self._failure is None:
            self._failure = report
            if self._server is not None:
                self._server.stop_workers(f"rank {rank} has failed")
        self._display.update(report)

    @contextlib.contextmanager
    def explaining_failures(self) -> Iterator[None]:
        """Raise WorkerError for a failed engine: with the failing worker's own words where it could still say them.

        Raises:
            WorkerError: in place of whatever the engine raised. Errors of dlspark itself pass, unless a worker's
                report says more.
        """
        try:
            yield
        except Exception as error:
            if self._failure is not None:
                raise self._worker_error(self._failure) from error
            if isinstance(error, DlsparkError):
                raise
            raise WorkerError(
                f"Backend {self._backend!r} failed, and no worker said why (a process that is killed cannot). The engine's "
                f"own words: {type(error).__name__}: {error}"
            ) from error

    def _worker_error(self, failure: Report) -> WorkerError:
        where = f"rank {failure['rank']} on {failure['host']}"
        if "epoch" in failure:
            where += f", epoch {failure['epoch'] + 1}, after step {failure['step']}"
        return WorkerError(
            f"Training on backend {self._backend!r} failed: {failure['error']} on {where}: {failure['message']}",
            rank=failure["rank"],
            host=failure["host"],
            remote_traceback=failure["traceback"],
        )

    def result(self, results: Sequence[WorkerResult]) -> FitResult:
        """The result of a run whose workers all came back."""
        first = results[0]
        return FitResult(
            backend=self._backend,
            history=first.history,
            epoch_seconds=list(first.epoch_seconds),
            time_to_first_step_seconds=max(self._first_step_seconds.values()),
            versions=first.versions,
            workers=[result.report for result in results],
        )


class InProcess:
    """The endpoint of a worker that runs in the driver's own process: a report is a call."""

    def __init__(self, monitor: RunMonitor) -> None:
        self._monitor = monitor

    def connect(self, rank: int) -> Reporter:
        return _CallReporter(self._monitor, rank)


class _CallReporter:
    def __init__(self, monitor: RunMonitor, rank: int) -> None:
        self._monitor = monitor
        self._rank = rank

    def send(self, kind: str, **fields: Any) -> None:
        self._monitor.receive({"kind": kind, "rank": self._rank, **fields})

    def close(self) -> None:
        """Nothing is open."""
