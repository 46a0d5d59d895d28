"""The driver's view of one run: what the workers report, the failure that explains the others, the result."""

from __future__ import annotations

import contextlib
import logging
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

from dlspark.driver.display import Display, open_display
from dlspark.driver.events import EventLog
from dlspark.driver.health import Failure, Watch
from dlspark.errors import DlsparkError, RunInterruptedError, WorkerError
from dlspark.job import FitResult, TrainJob, WorkerResult
from dlspark.storage import Store
from dlspark.wire import MAX_STRANGERS, Report, Reporter, ReportServer, SocketEndpoint

logger = logging.getLogger(__name__)

TICK_SECONDS = 0.2
PAUSE_SECONDS = 10 * TICK_SECONDS  # a tick that comes so late tells of the driver, not of the workers
LAST_WORDS_SECONDS = 2.0  # an engine may notice a death before the worker's own last words have arrived


class RunMonitor:
    """Listens to the workers of one job and watches over them; a context manager that closes its port and display.

    When a worker fails, dies, or is stuck for longer than the job's timeouts allow, all workers are told to stop, their
    guards end those that do not, and the engine's Spark jobs are cancelled if it has not returned by then.

    Args:
        job: the run.
        backend: the backend's name, for display and result.
        host: the address to listen on; None when all workers run in this process and report by call.
        abort: makes the engine return, if it can be made to.
        pausable: workers stop together after a step, with a checkpoint, when the run is interrupted. Otherwise they are
            ended at once.
    """

    def __init__(
        self,
        job: TrainJob,
        backend: str,
        host: str | None,
        *,
        abort: Callable[[], None] | None = None,
        pausable: bool = True,
    ) -> None:
        self._job = job
        self._backend = backend
        self._host = host
        self._abort = abort
        self._pausable = pausable
        self._started = time.perf_counter()
        self._first_step_seconds: dict[int, float] = {}
        self._failure: Failure | None = None
        self._failed_at = 0.0
        self._interrupted_at: float | None = None
        self._held: dict[int, int] = {}
        self._server: ReportServer | None = None
        self._display: Display = open_display(job, backend)
        self._events = EventLog(Store(job.uri)) if job.keep_events else None
        self._watch = Watch(job.num_workers, job.timeouts)
        self._changed = threading.Condition()
        self._ended = threading.Event()
        self._woken: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._asked_to_end = False
        self._sent_sigint = False
        self._watcher = threading.Thread(target=self._watch_over, name="dlspark-watch", daemon=True)
        self._main = threading.current_thread() is threading.main_thread()
        self._in_process: InProcess | None = None if host is not None else InProcess(self)

    def __enter__(self) -> RunMonitor:
        with contextlib.ExitStack() as opened:
            self._display.start()
            opened.callback(self._display.stop)
            if self._events is not None:
                self._events.open()
                opened.callback(self._events.close)
            if self._host is not None:
                self._server = ReportServer(
                    self._host, self.receive, max_strangers=max(MAX_STRANGERS, 4 * self._job.num_workers)
                )
                opened.callback(self._server.close)
            self._watcher.start()
            opened.callback(self._stop_watching)
            self._opened = opened.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._opened.close()

    def _stop_watching(self) -> None:
        self._ended.set()
        self._woken.put(None)
        self._watcher.join(10 * TICK_SECONDS)

    @property
    def endpoint(self) -> SocketEndpoint | InProcess:
        """What workers connect to."""
        if self._in_process is not None:
            return self._in_process
        if self._server is None:
            raise DlsparkError("A RunMonitor has an endpoint inside its with block only.")
        return self._server.endpoint

    @contextlib.contextmanager
    def launched(self) -> Iterator[None]:
        """Around the work of the engine: it launches all workers, and returns when they have ended. Again and again."""
        with self._changed:
            self._watch.launching()
        try:
            yield
        finally:
            with self._changed:
                self._watch.returned()

    def receive(self, report: Report) -> None:
        """Take in one report. A failure stops the other workers, which may wait for the failed one for ever."""
        kind = report["kind"]
        with self._changed:
            failure = self._watch.note(report)
            if kind == "step":
                self._first_step_seconds.setdefault(report["rank"], time.perf_counter() - self._started)
            if kind == "held":
                self._held[report["rank"]] = report["calls"]
                self._say_where_to_stop()
            self._changed.notify_all()
        if failure is not None:
            self._fail(failure)
        if kind not in ("heartbeat", "guard", "held"):
            if self._events is not None:
                self._events.add(report)
            self._show(report)

    def _show(self, report: Report) -> None:
        """Display it, if it can be: a terminal that is gone does not end a run."""
        try:
            self._display.update(report)
        except (Exception, SystemExit) as error:  # rich makes a SystemExit of a closed pipe
            logger.debug("The display failed: %s", error)

    def interrupt(self) -> None:
        """Have the run write a checkpoint and end; or, where it cannot, end. `explaining_failures` raises what came of it.

        Fit for signal handlers: it takes no lock.
        """
        self._asked_to_end = True
        self._woken.put(None)  # a SimpleQueue's put may interrupt itself

    @property
    def asked_to_end(self) -> bool:
        """Whether `interrupt` was called."""
        return self._asked_to_end

    def _begin_interruption(self) -> None:
        with self._changed:
            self._interrupted_at = time.monotonic()
        self.receive({"kind": "note", "rank": 0, "text": "asked to end" + ": writing a checkpoint" * self._pausable})
        if self._in_process is not None:
            return  # the worker looks for itself
        if self._server is not None and self._pausable:
            self._server.tell({"kind": "hold"})
        else:
            self._stop_all("the run was interrupted")

    def _say_where_to_stop(self) -> None:
        if len(self._held) == self._job.num_workers and self._server is not None:
            self._server.tell({"kind": "stop_after", "calls": max(self._held.values()) + 1})

    def _fail(self, failure: Failure) -> None:
        with self._changed:
            if self._failure is not None:
                self._failure.add(failure)
                return
            if self._failed_at:
                return  # all were told to end, and some do
            self._failure = failure
            self._failed_at = time.monotonic()
            self._changed.notify_all()
        self._stop_all(f"rank {failure.rank} has failed" if failure.rank is not None else "the run has failed")
        if self._events is not None:
            self._events.add({"kind": "failure", "rank": failure.rank, "message": failure.message})

    def _stop_all(self, reason: str) -> None:
        with self._changed:
            self._failed_at = self._failed_at or time.monotonic()
        if self._server is not None:
            self._server.stop_workers(reason)

    def _watch_over(self) -> None:
        """Look after the workers until the run has ended."""
        aborted, before = False, time.monotonic()
        while not self._ended.is_set():
            with contextlib.suppress(queue.Empty):
                self._woken.get(timeout=TICK_SECONDS)
            now = time.monotonic()
            with self._changed:
                if now - before > PAUSE_SECONDS:
                    self._watch.forgive(now - before)  # this process itself was stopped: what has come is still to be read
                before = now
                failure = None if self._failure or self._failed_at else self._watch.verdict(now)
                warnings = self._watch.warnings()
                interrupted_at, failed_at = self._interrupted_at, self._failed_at
            for text in warnings:
                logger.warning("%s", text)
                self.receive({"kind": "note", "rank": 0, "text": text})
            if failure is not None:
                self._fail(failure)
            if self._asked_to_end and interrupted_at is None:
                self._begin_interruption()
            if interrupted_at and not failed_at and now > interrupted_at + self._job.timeouts.interrupt_seconds:
                self._stop_all("the run was interrupted")
            if failed_at and now > failed_at + self._job.timeouts.stop_seconds and not aborted:
                aborted = True
                self._make_the_engine_return()

    def _make_the_engine_return(self) -> None:
        if self._abort is not None:
            logger.warning("Backend %r has not returned: cancelling its Spark jobs.", self._backend)
            try:
                self._abort()
            except Exception:  # Spark may be what has failed; the failure itself is reported all the same
                logger.exception("Cancelling failed.")
        elif self._in_process is not None and self._main:
            self._sent_sigint = True
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    @contextlib.contextmanager
    def explaining_failures(self) -> Iterator[None]:
        """Raise WorkerError for a failed engine: with the failing worker's own words where it could still say them.

        Raises:
            WorkerError: in place of whatever the engine raised. Errors of dlspark itself pass, unless a worker's
                report says more.
            RunInterruptedError: the run was interrupted.
        """
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            if isinstance(error, KeyboardInterrupt) and not self._sent_sigint:
                raise  # it is the user's
            failure = self._last_words()
            if self._asked_to_end:
                resumable = self._job.checkpoints and self._job.keep_events
                cure = "To resume it, run the same command again."
                if not resumable:
                    cure = "It cannot be resumed: that takes a store, and a backend that is resumable."
                message = f"The run on backend {self._backend!r} was interrupted. {cure}"
                logger.warning("%s", message)  # uncaught, the error ends the program without a word
                raise RunInterruptedError(message) from error
            if failure is not None:
                raise failure.as_error(self._backend) from error
            if isinstance(error, DlsparkError):
                raise
            message = (
                f"Backend {self._backend!r} failed, and no worker said why. The engine's own words: "
                f"{type(error).__name__}: {error}"
            )
            if self._events is not None:
                self._events.add({"kind": "failure", "rank": None, "message": message})
            raise WorkerError(message) from error

    def _last_words(self) -> Failure | None:
        """The failure that explains the engine's; waits a moment for what has been sent already."""
        with self._changed:
            if self._server is not None:
                self._changed.wait_for(
                    lambda: self._failure is not None and self._failure.complete, timeout=LAST_WORDS_SECONDS
                )
            return self._failure

    def result(self, results: Sequence[WorkerResult]) -> FitResult:
        """The result of a run whose workers all came back."""
        if self._asked_to_end:
            logger.warning(
                "SIGTERM came as the run on backend %r ended: it is complete, and the program goes on.", self._backend
            )
        first = results[0]
        return FitResult(
            backend=self._backend,
            history=first.history,
            epoch_seconds=list(first.epoch_seconds),
            time_to_first_step_seconds=max(self._first_step_seconds.values(), default=0.0),
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
        self.interruption = _HaltAtOnce(monitor)
        self._monitor = monitor
        self._rank = rank

    def send(self, kind: str, **fields: Any) -> None:
        self._monitor.receive({"kind": kind, "rank": self._rank, "connection": 0, **fields})

    def close(self) -> None:
        self.send("left")


class _HaltAtOnce:
    """The only worker stops after the step in which it was asked: there is nobody to agree with."""

    def __init__(self, monitor: RunMonitor) -> None:
        self._monitor = monitor

    def reached(self) -> bool:
        return self._monitor.asked_to_end
