"""The driver's view of one run: the workers' reports, the failure that caused the others, and the result."""

from __future__ import annotations

import contextlib
import logging
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from dlspark.driver.display import Display, open_display
from dlspark.driver.events import EventLog
from dlspark.driver.failure import Failure
from dlspark.driver.health import Watch
from dlspark.driver.in_process import InProcess
from dlspark.errors import DlsparkError, RunInterruptedError, WorkerError
from dlspark.job import FitResult, TrainJob, WorkerResult
from dlspark.storage import Store
from dlspark.wire import MAX_STRANGERS, ReportServer, SocketEndpoint, messages

logger = logging.getLogger(__name__)

TICK_SECONDS = 0.2
PAUSE_SECONDS = 10 * TICK_SECONDS  # a tick this late means that the driver itself was stopped
LAST_WORDS_SECONDS = 2.0  # an engine may notice a death before the worker's own report has arrived


class RunMonitor:
    """Receives the reports of one job's workers and detects failures; a context manager that closes its port and display.

    When a worker fails, dies, or makes no progress within the job's timeouts, the monitor orders all workers to stop. Their
    guards kill those that do not, and the engine's Spark jobs are cancelled if the engine still has not returned.

    Args:
        job: the run.
        backend: the backend's name, for display and result.
        host: the address to listen on; None if the only worker runs in this process.
        abort: makes the engine return; None if nothing can.
        pausable: an interrupted run stops all workers after the same step, with a checkpoint. Otherwise it ends at once.
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
        self._in_process = None if host is not None else InProcess(self.receive, lambda: self._asked_to_end)

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

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def _stop_watching(self) -> None:
        self._ended.set()
        self._woken.put(None)
        self._watcher.join(10 * TICK_SECONDS)

    @property
    def endpoint(self) -> SocketEndpoint | InProcess:
        """The endpoint that workers connect to."""
        if self._in_process is not None:
            return self._in_process
        if self._server is None:
            raise DlsparkError("A RunMonitor has an endpoint inside its with block only.")
        return self._server.endpoint

    @contextlib.contextmanager
    def launched(self) -> Iterator[None]:
        """Around each launch: the engine launches all workers in the block, and returns when they have ended."""
        with self._changed:
            self._watch.launching()
        try:
            yield
        finally:
            with self._changed:
                self._watch.returned()

    def receive(self, message: messages.FromWorker) -> None:
        """Process one message. A failure stops the other workers, which might wait for the failed one forever."""
        with self._changed:
            failure = self._watch.note(message)
            match message:
                case messages.StepEnded():
                    self._first_step_seconds.setdefault(message.rank, time.perf_counter() - self._started)
                case messages.Held():
                    self._held[message.rank] = message.calls
                    self._order_stop_after()
            self._changed.notify_all()
        if failure is not None:
            self._fail(failure)
        if not isinstance(message, messages.Heartbeat | messages.GuardConnected | messages.Held):
            if self._events is not None:
                self._events.add(message)
            self._show(message)

    def _show(self, message: messages.FromWorker) -> None:
        """Display ``message``. A closed terminal must not end the run."""
        try:
            self._display.update(message)
        except (Exception, SystemExit) as error:  # rich raises SystemExit for a closed pipe
            logger.debug("The display failed: %s", error)

    def interrupt(self) -> None:
        """End the run, after a checkpoint if it is pausable; `explaining_failures` then raises RunInterruptedError.

        Signal handlers may call this, because it takes no lock.
        """
        self._asked_to_end = True
        self._woken.put(None)  # SimpleQueue.put is reentrant

    def _begin_interruption(self) -> None:
        with self._changed:
            self._interrupted_at = time.monotonic()
        self.receive(
            messages.Note(
                rank=0, text="asked to end" + ": writing a checkpoint" * (self._pausable and self._job.checkpoints)
            )
        )
        if self._in_process is not None:
            return  # the worker checks `_asked_to_end`
        if self._server is not None and self._pausable:
            self._server.order(messages.Hold())
        else:
            self._stop_all("the run was interrupted")

    def _order_stop_after(self) -> None:
        if len(self._held) == self._job.num_workers and self._server is not None:
            self._server.order(messages.StopAfter(calls=max(self._held.values()) + 1))

    def _fail(self, failure: Failure) -> None:
        with self._changed:
            if self._failure is not None:
                self._failure.add(failure)
                return
            if self._failed_at:
                return  # workers end because they were ordered to
            self._failure = failure
            self._failed_at = time.monotonic()
            self._changed.notify_all()
        self._stop_all(f"rank {failure.rank} has failed" if failure.rank is not None else "the run has failed")
        if self._events is not None:
            self._events.add(messages.RunFailed(rank=failure.rank, message=failure.message))

    def _stop_all(self, reason: str) -> None:
        with self._changed:
            self._failed_at = self._failed_at or time.monotonic()
        if self._server is not None:
            self._server.stop_workers(reason)

    def _watch_over(self) -> None:
        """Check the workers until the run has ended."""
        aborted, before = False, time.monotonic()
        while not self._ended.is_set():
            with contextlib.suppress(queue.Empty):
                self._woken.get(timeout=TICK_SECONDS)
            now = time.monotonic()
            with self._changed:
                if now - before > PAUSE_SECONDS:
                    self._watch.forgive(now - before)  # this process was stopped, and has not read what has arrived
                before = now
                failure = None if self._failure or self._failed_at else self._watch.verdict()
                warnings = self._watch.warnings()
                interrupted_at, failed_at = self._interrupted_at, self._failed_at
            for text in warnings:
                logger.warning("%s", text)
                self.receive(messages.Note(rank=0, text=text))
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
            except Exception:  # Spark may have failed itself; the run's failure is still reported
                logger.exception("Cancelling failed.")
        elif self._in_process is not None and self._main:
            self._sent_sigint = True
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    @contextlib.contextmanager
    def explaining_failures(self) -> Iterator[None]:
        """Replace the engine's exception by one that explains the failure.

        Raises:
            WorkerError: instead of the engine's exception, with the failed worker's own report if there is one. dlspark's
                own errors pass if no worker has reported a failure.
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
                logger.warning("%s", message)  # an uncaught SystemExit prints nothing
                raise RunInterruptedError(message) from error
            if failure is not None:
                raise failure.as_error(self._backend) from error
            if isinstance(error, DlsparkError):
                raise
            message = (
                f"Backend {self._backend!r} failed, and no worker reported why. The engine's error: "
                f"{type(error).__name__}: {error}"
            )
            if self._events is not None:
                self._events.add(messages.RunFailed(rank=None, message=message))
            raise WorkerError(message) from error

    def _last_words(self) -> Failure | None:
        """The failure that explains the engine's exception; waits a moment for reports that are on their way."""
        with self._changed:
            if self._server is not None:
                self._changed.wait_for(
                    lambda: self._failure is not None and self._failure.complete, timeout=LAST_WORDS_SECONDS
                )
            return self._failure

    def result(self, results: Sequence[WorkerResult]) -> FitResult:
        """The result of a run, from the results of all its workers."""
        if self._asked_to_end:
            logger.warning(
                "SIGTERM arrived as the run on backend %r ended: the run is complete, and the program continues.",
                self._backend,
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
