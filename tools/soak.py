#!/usr/bin/env python3
"""Send random signals to workers of real runs: no run may hang, return wrong weights or leave anything behind.

    python tools/soak.py --runs 20              20 more runs; each prints and records its seed
    python tools/soak.py --runs 1 --seed 1234   repeat one run

A run trains on two workers and may restart once. A random signal hits a random worker at a random moment. The weights and
the history must equal those of an undisturbed run, bit for bit. A run of more than five minutes counts as a hang and ends
the soak. Each run appends one line of JSON to tests/faults/soak.jsonl; at the end, a table of all recorded runs is printed.

Exit code: 0 all recorded runs passed; 1 one failed, hung, returned wrong weights or left something behind.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import os
import random
import secrets
import signal
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "tests" / "faults" / "soak.jsonl"
ENGINES = ("mirrored", "horovod", "elephas")
SIGNALS = ("SIGKILL", "SIGSTOP", "SIGTERM", "SIGSEGV")
EPOCHS, STEPS_AN_EPOCH = 3, 16
HEARTBEAT_SECONDS = 6.0  # on a busy machine, importing TensorFlow can block for some seconds
HANG_SECONDS = 300.0
SETTLE_SECONDS = 20.0


def main() -> int:
    """Run the soak and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=20, help="number of runs (default: 20)")
    parser.add_argument("--seed", type=int, help="seed of the first run; later runs add 1 each")
    options = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    first = secrets.randbelow(10**9) if options.seed is None else options.seed
    spark, expected = start()
    try:
        for number in range(options.runs):
            line = run(spark, first + number, expected)
            keep(line)
            sys.stdout.write(f"{number + 1}/{options.runs} {json.dumps(line)}\n")
            sys.stdout.flush()
    finally:
        spark.stop()
    return table()


def start() -> tuple[Any, dict[str, Any]]:
    """Return the Spark session and each engine's undisturbed result."""
    from dlspark.spark import get_session

    spark = get_session(2, app_name="dlspark-soak")
    with tempfile.TemporaryDirectory() as folder:
        expected = {engine: train(engine, Path(folder) / engine, None) for engine in ENGINES}
    return spark, expected


def train(engine: str, folder: Path, fault: Any) -> Any:
    """Train once; with ``fault`` None, no fault happens."""
    from dlspark import Trainer
    from dlspark.testing import toys
    from dlspark.testing.faults import Fault, disturbed_classifier

    fault = fault or Fault(action="raise", marker=str(folder / "never"), step=1 << 30)
    timeouts = {
        "heartbeat_seconds": HEARTBEAT_SECONDS,
        "launch_seconds": 60.0,  # also limits a task that Spark gives to a stopped idle Python worker
        "first_step_seconds": 90.0,
        "step_seconds": 30.0,
        "end_seconds": 8.0,
    }
    return Trainer(engine, num_workers=2, store=folder / "store", max_restarts=1, timeouts=timeouts).fit(
        disturbed_classifier(fault),
        toys.separable(1003),
        validation_data=toys.separable(257, seed=9),
        epochs=EPOCHS,
        batch_size=64,
        seed=3,
        verbose=0,
    )


def run(spark: Any, seed: int, expected: dict[str, Any]) -> dict[str, Any]:
    """Run one disturbed training; return the fault and the outcome."""
    import psutil

    draw = random.Random(seed)
    engine, rank, name = draw.choice(ENGINES), draw.randrange(2), draw.choice(SIGNALS)
    # The signal follows one of the worker's reports after a random delay, so it hits start-up, the first step, later steps,
    # validation or the writing of a checkpoint.
    kind = draw.choice(("connected", "started", "step", "step", "step", "epoch", "checkpoint"))
    epoch, delay = draw.randrange(EPOCHS), draw.uniform(0, 0.5)
    line: dict[str, Any] = {"seed": seed, "engine": engine, "rank": rank, "signal": name, "after": kind, "epoch": epoch}
    before = surroundings()
    with tempfile.TemporaryDirectory(prefix="soak-") as temporary:
        folder = Path(temporary)
        sent: list[float] = []
        ended = threading.Event()

        def strike() -> None:
            pid = None
            while not ended.wait(0.05):
                for event in events(folder):
                    if event.get("rank") == rank and "pid" in event:
                        pid = event["pid"]
                    own = event["kind"] == kind and (event.get("rank") == rank or kind in ("epoch", "checkpoint"))
                    if own and event.get("epoch", epoch) >= epoch and pid:
                        time.sleep(delay)
                        mine = {child.pid for child in psutil.Process().children(recursive=True)}
                        if pid in mine and not ended.is_set():
                            os.kill(pid, getattr(signal, name))
                            sent.append(time.time())
                        return

        striker = threading.Thread(target=strike)
        hang = threading.Timer(HANG_SECONDS, hung, [line])
        hang.start()
        striker.start()
        began = time.monotonic()
        try:
            result, error = train(engine, folder, None), None
        except Exception as failure:  # any outcome is recorded
            result, error = None, f"{type(failure).__name__}: {str(failure)[:300]}"
        finally:
            ended.set()
            striker.join()
            hang.cancel()
        told = [
            event["time"] for event in events(folder) if event["kind"] == "failure" and sent and event["time"] >= sent[0]
        ]
        again = [event["time"] for event in events(folder) if event["kind"] == "step" and told and event["time"] > told[0]]
        line |= {
            "seconds": round(time.monotonic() - began, 1),
            "struck": bool(sent),
            "seconds_to_error": round(told[0] - sent[0], 2) if told else None,
            "seconds_to_resume": round(again[0] - told[0], 2) if again else None,
            "restarts": None if result is None else result.restarts,
            "error": error,
            "right": result is not None and equal(result, expected[engine]),
        }
    line["left"] = leftovers(before)
    clear(spark)
    return line


def keep(line: dict[str, Any]) -> None:
    """Append a run to the results file."""
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def hung(line: dict[str, Any]) -> None:
    """Record the run as a hang, print the stacks of all threads, and end this process, which is blocked."""
    nothing = dict.fromkeys(("seconds_to_error", "seconds_to_resume", "restarts"))
    keep({**line, **nothing, "seconds": HANG_SECONDS, "struck": True, "error": "hang", "right": False, "left": []})
    faulthandler.dump_traceback()
    os._exit(1)


def clear(spark: Any) -> None:
    """Let Spark discard dead idle Python workers; otherwise the next run could get one."""
    from py4j.protocol import Py4JJavaError

    for _ in range(5):
        with contextlib.suppress(Py4JJavaError):
            spark.sparkContext.parallelize(range(4), 4).map(abs).count()
            return
    raise RuntimeError("Expected a usable Spark session; got errors in five jobs. Restart the soak.")


def events(folder: Path) -> list[dict[str, Any]]:
    """Return the run's events so far."""
    lines = [line for path in folder.glob("store/run-*/events.jsonl") for line in path.read_text().splitlines()]
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue  # this line is still being written
    return found


def equal(result: Any, expected: Any) -> bool:
    """Return whether weights and history are bit-identical."""
    same = all((mine == theirs).all() for mine, theirs in zip(result.weights, expected.weights, strict=True))
    return same and result.history == expected.history


def surroundings() -> dict[str, set[Any]]:
    """Return what a run could leave behind: threads, listening ports, stopped processes, guards, temporary folders."""
    import psutil

    me = psutil.Process()
    stopped, guards = set(), set()
    for child in me.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # the process has just ended
            if child.status() == psutil.STATUS_STOPPED:
                stopped.add(child.pid)
            if "The guard: a small process" in " ".join(child.cmdline()):
                guards.add(child.pid)
    return {
        "threads": {thread.name for thread in threading.enumerate() if thread.name.startswith("dlspark")},
        "ports": {c.laddr.port for c in me.net_connections("tcp") if c.status == psutil.CONN_LISTEN},
        "stopped": stopped,
        "guards": guards,
        "folders": {path.name for path in Path(tempfile.gettempdir()).glob("dlspark-*")},
    }


def leftovers(before: dict[str, set[Any]]) -> list[str]:
    """Return what the run has left behind, after up to `SETTLE_SECONDS` for it to disappear."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        now = surroundings()
        found = [f"{name}: {sorted(map(str, more))}" for name in now if (more := now[name] - before[name])]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


def table() -> int:
    """Print the table of all recorded runs; return the exit code."""
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    by_engine: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        by_engine[line["engine"]].append(line)
        by_engine["all"].append(line)
    sys.stdout.write(
        "| engine | runs | struck | hung | failed | wrong weights | left behind "
        "| to error, median | p95 | to resume, median |\n"
    )
    sys.stdout.write("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n")
    for engine, runs in sorted(by_engine.items()):
        told = sorted(run["seconds_to_error"] for run in runs if run["seconds_to_error"] is not None)
        resumed = sorted(run["seconds_to_resume"] for run in runs if run["seconds_to_resume"] is not None)
        cells = [
            engine,
            len(runs),
            sum(run["struck"] for run in runs),
            sum(run["error"] == "hang" for run in runs),
            sum(run["error"] not in (None, "hang") for run in runs),
            sum(not run["right"] and run["error"] is None for run in runs),
            sum(bool(run["left"]) for run in runs),
            quantile(told, 0.5),
            quantile(told, 0.95),
            quantile(resumed, 0.5),
        ]
        sys.stdout.write(f"| {' | '.join(map(str, cells))} |\n")
    wrong = [line["seed"] for line in lines if not line["right"] or line["left"]]
    if wrong:
        sys.stdout.write(f"Seeds of failed runs: {wrong}\n")
    return 1 if wrong else 0


def quantile(values: list[float], fraction: float) -> str:
    """Format the quantile of sorted ``values``."""
    return f"{values[min(len(values) - 1, int(fraction * len(values)))]:.1f} s" if values else "–"


if __name__ == "__main__":
    sys.exit(main())
