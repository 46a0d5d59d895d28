"""The one progress display, on the driver: live on a terminal, plain lines elsewhere."""

from __future__ import annotations

import threading
import time

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dlspark.data import num_steps
from dlspark.job import TrainJob
from dlspark.wire import messages


class Display:
    """Shows messages as they arrive; this one shows nothing."""

    def start(self) -> None:
        """Begin."""

    def update(self, message: messages.FromWorker) -> None:
        """Show ``message``."""

    def stop(self) -> None:
        """End."""


def open_display(job: TrainJob, backend: str) -> Display:
    """The display for ``job.verbose``."""
    console = Console(stderr=True)
    verbose = job.verbose
    if verbose == "auto":
        verbose = 1 if console.is_terminal else 2
    if verbose == 0:
        return Display()
    return _LiveDisplay(job, backend, console) if verbose == 1 and console.is_terminal else _Lines(job, backend, console)


def epoch_line(epoch: messages.EpochEnded, epochs: int, rows: int) -> str:
    """One epoch in one line: number, seconds, training rows/s, metrics."""
    metrics = "  ".join(f"{name} {value:.4g}" for name, value in epoch.logs.items())
    rate = rows / epoch.seconds if epoch.seconds else 0.0
    return f"epoch {epoch.epoch + 1}/{epochs}  {epoch.seconds:.1f} s  {rate:.0f} rows/s  {metrics}"


class _Lines(Display):
    """One line for each event that belongs in a log file."""

    def __init__(self, job: TrainJob, backend: str, console: Console) -> None:
        self._job = job
        self._console = console
        self._backend = backend

    def start(self) -> None:
        steps = num_steps(self._job.train.rows, self._job.batch_size)
        workers = "1 worker" if self._job.num_workers == 1 else f"{self._job.num_workers} workers"
        self._say(f"{self._job.train.rows} rows, {steps} {'step' if steps == 1 else 'steps'} per epoch, {workers}")

    def update(self, message: messages.FromWorker) -> None:
        match message:
            case messages.Started():
                self._say(f"rank {message.rank} on {message.host} (pid {message.pid}): {message.device}")
            case messages.EpochEnded(rank=0):
                self._say(epoch_line(message, self._job.epochs, self._job.train.rows))
            case messages.Note(rank=0):
                self._say(message.text)
            case messages.Failed():
                told = f"{message.error}: {message.message}".removesuffix(": ")
                self._say(f"rank {message.rank} on {message.host} failed: {told}")

    def _say(self, text: str) -> None:
        self._console.print(f"[{self._backend}] {text}", markup=False, highlight=False, soft_wrap=True)


class _LiveDisplay(Display):
    """A progress bar for the epoch and a line for each worker, below the complete epochs."""

    def __init__(self, job: TrainJob, backend: str, console: Console) -> None:
        self._job = job
        self._backend = backend
        self._console = console
        self._lock = threading.Lock()
        self._state: dict[int, str] = dict.fromkeys(range(job.num_workers), "launching")
        self._last: messages.StepEnded | None = None
        self._epoch_started = self._started = time.monotonic()
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=5, transient=True)

    def start(self) -> None:
        self._live.start()

    def stop(self) -> None:
        self._live.stop()

    def update(self, message: messages.FromWorker) -> None:
        rank, line = message.rank, None
        with self._lock:
            match message:
                case messages.Started():
                    self._state[rank] = f"{message.host} pid {message.pid}, {message.device}: loading the model"
                case messages.StepEnded():
                    if self._last is None or self._last.epoch != message.epoch:
                        self._epoch_started = time.monotonic()
                    self._state[rank] = f"epoch {message.epoch + 1} step {message.step}/{message.steps}"
                    self._last = message if rank == 0 else self._last
                case messages.Failed():
                    self._state[rank] = f"failed: {message.error}"
                case messages.Done():
                    self._state[rank] = f"done, {message.rows} rows in {message.seconds:.1f} s"
                case messages.EpochEnded(rank=0):
                    line = epoch_line(message, self._job.epochs, self._job.train.rows)
                case messages.Note(rank=0):
                    line = message.text
        if line is not None:
            self._live.console.print(f"[{self._backend}] {line}", markup=False, highlight=False)

    def _render(self) -> Table:
        with self._lock:
            grid = Table.grid(padding=(0, 1))
            last, now = self._last, time.monotonic()
            if last is None:
                grid.add_row(Text(f"[{self._backend}] starting, {now - self._started:.0f} s"))
            else:
                elapsed = now - self._epoch_started
                facts = f"{last.rows / elapsed:.0f} rows/s" if elapsed > 0 else ""
                if last.loss is not None:
                    facts += f"  loss {last.loss:.4f}"
                bar = ProgressBar(total=last.steps, completed=last.step, width=30)
                head = Text(f"[{self._backend}] epoch {last.epoch + 1}/{self._job.epochs} step {last.step}/{last.steps}")
                grid.add_row(head, bar, Text(facts))
            for rank, state in sorted(self._state.items()):
                grid.add_row(Text(f"  rank {rank}: {state}", style="red" if state.startswith("failed") else "dim"))
            return grid
