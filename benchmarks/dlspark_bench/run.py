"""Measure a scenario: start its subjects, let them train in turns, and record their reports."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dlspark import DlsparkError
from dlspark_bench import hardware
from dlspark_bench.scenario import Scenario, Subject
from dlspark_bench.turns import LOOK_SECONDS, give, put

LAUNCH_SECONDS = 900.0
"""Timeout for a subject's first epoch, which traces the model."""

_END_SECONDS = 120.0


class MeasurementError(DlsparkError, RuntimeError):
    """A subject failed or timed out; the message ends with its output."""


def measure(
    scenario: Scenario, out: Path, *, delays: dict[str, float] | None = None, say: Callable[[str], None] = lambda line: None
) -> Path:
    """Run a scenario and write one file of JSON lines.

    The first line, ``kind`` "run", describes the scenario and the machine. A line follows for each turn of each subject
    ("turn"), each launch ("launch"), each process ("process"), and the machine's measured peak ("peak"). The file is
    written atomically.

    Args:
        scenario: what to measure.
        out: folder for the file.
        delays: seconds to add to each step of a subject, to test the harness. Recorded in the file.
        say: receives each line of progress.

    Raises:
        ConfigError: a subject does not exist.
        MeasurementError: a subject failed.
    """
    delays = delays or {}
    started, begun = datetime.now(UTC), time.monotonic()
    about: dict[str, Any] = {
        "kind": "run",
        "id": f"{started:%Y%m%dT%H%M%SZ}-{scenario.name}-{uuid.uuid4().hex[:6]}",
        "started": started.isoformat(timespec="seconds"),
        "commit": hardware.commit(),
        "keras_backend": os.environ.get("KERAS_BACKEND", "tensorflow"),
        "versions": hardware.versions(),
        "hardware": hardware.hardware(),
        "scenario": dataclasses.asdict(scenario),
        "delays": delays,
    }
    subjects = [Subject.parse(text) for text in scenario.subjects]
    for subject in subjects:
        subject.check()
    lines = list(_peaks(scenario, subjects, say))
    with tempfile.TemporaryDirectory(prefix="dlspark-bench-") as folder, ExitStack() as alive:
        running: list[_Running] = []
        say("start: models, images, Spark sessions")
        for subject in subjects:
            each = alive.enter_context(_started(scenario, subject, Path(folder), delays.get(str(subject), 0.0)))
            running.append(each)
            each.prepare(0)
        for each in running:
            each.ready(0)
        for number, each in enumerate(running, 1):
            say(f"{each.subject}, {number} of {len(running)}: launch and first epoch")
            each.launch(0)
            lines.append(each.turn(0, 0, LAUNCH_SECONDS))
            say(f"{each.subject}: first epoch {lines[-1]['seconds']:.1f} s")
        longest = 60 + 10 * scenario.epochs * sum(line["seconds"] for line in lines if line["kind"] == "turn")
        for repeat in range(1, scenario.repeats + 1):
            round_begun = time.monotonic()
            for each in _in_turn(running, repeat):
                # A steady epoch is shorter than the first. If it takes ten times as long, the machine hangs.
                lines.append(each.turn(0, repeat, longest))
            took = time.monotonic() - round_begun
            say(f"repeat {repeat} of {scenario.repeats}: {took:.0f} s; {took * (scenario.repeats - repeat):.0f} s left")
        for each in running:
            each.finish(0)
        for each in running:
            lines.append(each.through(0))
        engines = [each for each in running if len(each.processes[0].launches) > 1]
        for launch in range(1, scenario.warm_launches + 1 if engines else 1):
            say(f"warm launch {launch} of {scenario.warm_launches}")
            for each in _in_turn(engines, launch):
                each.prepare(launch)
                each.ready(launch)
                each.launch(launch)
                each.turn(launch, 0, LAUNCH_SECONDS)
                each.finish(launch)
                lines.append(each.through(launch))
        for each in running:
            lines += each.end()
    about["seconds"] = time.monotonic() - begun
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{about['id']}.jsonl"
    put(path, "".join(json.dumps(line) + "\n" for line in [about, *lines]))
    return path


def _in_turn(running: list[_Running], repeat: int) -> list[_Running]:
    """Reverse the order in every second repeat (A B, B A), so that drift affects all alike."""
    return running[:: -1 if repeat % 2 == 0 else 1]


def _peaks(scenario: Scenario, subjects: list[Subject], say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    dtype = scenario.dtype.removeprefix("mixed_")
    for count in sorted({subject.threads for subject in subjects if subject.trains}):
        say(f"peak of {count} thread{'s' if count > 1 else ''}")
        yield {"kind": "peak", "dtype": dtype, "threads": count, "flops": _peak(dtype, count, scenario.device)}


@functools.cache  # the peak does not depend on the scenario, and benchmarks/short.py needs it five times
def _peak(dtype: str, threads: int, device: str) -> float:
    command = [sys.executable, "-m", "dlspark_bench.peak", dtype, str(threads), device]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LAUNCH_SECONDS, check=False)
    if done.returncode:
        raise MeasurementError(f"Measuring the machine's peak failed:\n{done.stderr[-2000:]}")
    return float(json.loads(done.stdout.splitlines()[-1]))


@dataclasses.dataclass
class _Process:
    """One process of a subject, with a folder of turns for each launch."""

    subject: Subject
    spec: Path
    launches: list[Path]
    reporters: int
    handle: subprocess.Popen[bytes]
    log: Path

    def wait(self, done: Callable[[], bool], seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not done():
            if self.handle.poll() is not None and not done():
                raise MeasurementError(f"{what} of {self.subject} failed, {self._ended()}:\n{self._tail()}")
            if time.monotonic() > deadline:
                raise MeasurementError(f"{what} of {self.subject} took longer than {seconds:.0f} s:\n{self._tail()}")
            time.sleep(LOOK_SECONDS)

    def reports(self, launch: int, turn: int) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in self.launches[launch].glob(f"done-{turn}-*.json")]

    def launched_at(self, launch: int) -> float:
        return float((self.launches[launch] / "launched").read_text())

    def _ended(self) -> str:
        code = self.handle.returncode
        if code == -signal.SIGKILL:
            return "killed; unless someone did that, memory ran out: use fewer subjects"
        return f"exit code {code}"

    def _tail(self) -> str:
        return self.log.read_text(errors="replace")[-6000:]


@dataclasses.dataclass
class _Running:
    """A running subject."""

    subject: Subject
    processes: list[_Process]

    def prepare(self, number: int) -> None:
        for process in self.processes:
            give(process.launches[number] / "prepare")

    def ready(self, number: int) -> None:
        for process in self.processes:
            process.wait((process.launches[number] / "ready").exists, LAUNCH_SECONDS, "The start")

    def launch(self, number: int) -> None:
        for process in self.processes:
            give(process.launches[number] / "launch")

    def turn(self, launch: int, turn: int, seconds: float) -> dict[str, Any]:
        """Give all processes the turn, wait for them, and return the duration of the slowest."""
        for process in self.processes:
            give(process.launches[launch] / f"go-{turn}")
        reports = []
        for process in self.processes:

            def done(process: _Process = process) -> bool:
                return len(process.reports(launch, turn)) >= process.reporters

            process.wait(done, seconds, f"Turn {turn}")
            reports += process.reports(launch, turn)
        return {
            "kind": "turn",
            "subject": str(self.subject),
            "turn": turn,
            "seconds": max(report["seconds"] for report in reports),
            "steps_seconds": max(report["steps_seconds"] for report in reports),
            "workers": reports,
        }

    def finish(self, launch: int) -> None:
        for process in self.processes:
            give(process.launches[launch] / "end")

    def through(self, launch: int) -> dict[str, Any]:
        """End a launch; return the seconds until all workers took a step, None if no worker sees steps."""
        firsts: list[float | None] = []
        for process in self.processes:
            place = process.launches[launch]
            process.wait((place / "through").exists, LAUNCH_SECONDS, "The end")
            for report in process.reports(launch, 0):
                firsts.append(report["first_step_at"] and report["first_step_at"] - process.launched_at(launch))
            checksums = {path.read_text() for path in place.glob("checksum-*")}
            if len(checksums) > 1:
                raise MeasurementError(
                    f"Expected equal weights on all workers of {self.subject}; got checksums {checksums}."
                )
        seconds = None if None in firsts else max(first for first in firsts if first is not None)
        return {"kind": "launch", "subject": str(self.subject), "warm": launch > 0, "seconds_to_first_step": seconds}

    def end(self) -> Iterator[dict[str, Any]]:
        for process in self.processes:

            def ended(process: _Process = process) -> bool:
                return process.handle.poll() == 0

            process.wait(ended, LAUNCH_SECONDS, "The end")
            told = json.loads(process.spec.with_suffix(".result").read_text())
            yield {"kind": "process", "subject": str(self.subject), **told}


@contextmanager
def _started(scenario: Scenario, subject: Subject, folder: Path, delay_seconds: float) -> Iterator[_Running]:
    """Start the processes of a subject, and end them when the block ends."""
    processes: list[_Process] = []
    try:
        for index in range(subject.processes):
            place = folder / f"{str(subject).replace(':', '-')}-{index}"
            again = 0 if subject.alone or subject.told_by_driver else scenario.warm_launches
            launches = [place / f"launch-{i}" for i in range(1 + again)]
            for each in launches:
                each.mkdir(parents=True)
            spec, log = place / "spec.json", place / "log"
            told = {
                "scenario": dataclasses.asdict(scenario),
                "subject": str(subject),
                "launches": [str(each) for each in launches],
                "delay_seconds": delay_seconds,
            }
            spec.write_text(json.dumps(told))
            with log.open("wb") as output:
                handle = subprocess.Popen(
                    [sys.executable, "-m", "dlspark_bench.subject", str(spec)],
                    stdin=subprocess.PIPE,  # closes however this process ends
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    cwd=place,
                    env={**os.environ, "DLSPARK_BENCH_INDEX": str(index)},
                )
            reporters = 1 if subject.alone or subject.told_by_driver else subject.workers
            processes.append(_Process(subject, spec, launches, reporters, handle, log))
        yield _Running(subject, processes)
    finally:
        for process in processes:
            if process.handle.poll() is None:
                process.handle.terminate()
        for process in processes:
            try:
                process.handle.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                process.handle.kill()
                process.handle.wait()
