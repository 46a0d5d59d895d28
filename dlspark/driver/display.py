"""The one progress display, on the driver: live on a terminal, plain lines elsewhere."""

from __future__ import annotations

import threading
import time
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dlspark.data import num_steps
from dlspark.job import TrainJob
from dlspark.wire import Report


class Display(Protocol):
    """Shows reports as they come."""

    def start(self) -> None: ...

    def update(self, report: Report) -> None: ...

    def stop(self) -> None: ...


def open_display(job: TrainJob, backend: str) -> Display:
    """The display that ``job.verbose`` asks for."""
    console = Console(stderr=True)
    verbose = job.verbose
    if verbose == "auto":
        verbose = 1 if console.is_terminal else 2
    if verbose == 0:
        return _Silent()
    return _LiveDisplay(job, backend, console) if verbose == 1 and console.is_terminal else _Lines(job, backend, console)


def epoch_line(report: Report, epochs: int, rows: int) -> str:
    """One epoch in one line: number, seconds, images/s, metrics."""
    metrics = "  ".join(f"{name} {value:.4g}" for name, value in report["logs"].items())
    rate = rows / report["seconds"] if report["seconds"] else 0.0
    return f"epoch {report['epoch'] + 1}/{epochs}  {report['seconds']:.1f} s  {rate:.0f} rows/s  {metrics}"


class _Silent:
    def start(self) -> None:
        """Nothing to show."""

    def update(self, report: Report) -> None:
        """Nothing to show."""

    def stop(self) -> None:
        """Nothing to show."""


class _Lines:
    """One line per event that a log file should keep."""

    def __init__(self, job: TrainJob, backend: str, console: Console) -> None:
        self._job = job
        self._console = console
        self._backend = backend

    def start(self) -> None:
        steps = num_steps(self._job.train.rows, self._job.batch_size)
        workers = "1 worker" if self._job.num_workers == 1 else f"{self._job.num_workers} workers"
        self._say(f"{self._job.train.rows} rows, {steps} steps an epoch, {workers}")

    def update(self, report: Report) -> None:
        if report["kind"] == "started":
            self._say(f"rank {report['rank']} on {report['host']} (pid {report['pid']}): {report['device']}")
        elif report["kind"] == "epoch" and report["rank"] == 0:
            self._say(epoch_line(report, self._job.epochs, self._job.train.rows))
        elif report["kind"] == "note" and report["rank"] == 0:
            self._say(report["text"])
        elif report["kind"] == "failed":
            self._say(f"rank {report['rank']} on {report['host']} failed: {report['error']}: {report['message']}")

    def stop(self) -> None:
        """Lines need no end."""

    def _say(self, text: str) -> None:
        self._console.print(f"[{self._backend}] {text}", markup=False, highlight=False, soft_wrap=True)


class _LiveDisplay:
    """A bar for the epoch, a line per worker, and the finished epochs above them."""

    def __init__(self, job: TrainJob, backend: str, console: Console) -> None:
        self._job = job
        self._backend = backend
        self._console = console
        self._lock = threading.Lock()
        self._state: dict[int, str] = dict.fromkeys(range(job.num_workers), "launching")
        self._last: Report | None = None
        self._epoch_started = self._started = time.monotonic()
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=5, transient=True)

    def start(self) -> None:
        self._live.start()

    def stop(self) -> None:
        self._live.stop()

    def update(self, report: Report) -> None:
        kind, rank = report["kind"], report["rank"]
        with self._lock:
            if kind == "started":
                self._state[rank] = f"{report['host']} pid {report['pid']}, {report['device']}: loading the model"
            elif kind == "step":
                if self._last is None or self._last["epoch"] != report["epoch"]:
                    self._epoch_started = time.monotonic()
                self._state[rank] = f"epoch {report['epoch'] + 1} step {report['step']}/{report['steps']}"
                self._last = report if rank == 0 else self._last
            elif kind == "failed":
                self._state[rank] = f"failed: {report['error']}"
            elif kind == "done":
                self._state[rank] = f"done, {report['rows']} rows in {report['seconds']:.1f} s"
        if kind in ("epoch", "note") and rank == 0:
            text = report["text"] if kind == "note" else epoch_line(report, self._job.epochs, self._job.train.rows)
            self._live.console.print(
                f"[{self._backend}] {text}",
                markup=False,
                highlight=False,
            )

    def _render(self) -> Table:
        with self._lock:
            grid = Table.grid(padding=(0, 1))
            last, now = self._last, time.monotonic()
            if last is None:
                grid.add_row(Text(f"[{self._backend}] starting, {now - self._started:.0f} s"))
            else:
                elapsed = now - self._epoch_started
                facts = f"{last['rows'] / elapsed:.0f} rows/s" if elapsed > 0 else ""
                if last["loss"] is not None:
                    facts += f"  loss {last['loss']:.4f}"
                bar = ProgressBar(total=last["steps"], completed=last["step"], width=30)
                head = Text(
                    f"[{self._backend}] epoch {last['epoch'] + 1}/{self._job.epochs} step {last['step']}/{last['steps']}"
                )
                grid.add_row(head, bar, Text(facts))
            for rank, state in sorted(self._state.items()):
                grid.add_row(Text(f"  rank {rank}: {state}", style="red" if state.startswith("failed") else "dim"))
            return grid
