#!/usr/bin/env python3
"""Trainings with a random victim, moment and signal: nothing may hang, no weight may be wrong, nothing may be left behind.

    python tools/soak.py --runs 20              twenty more; their seeds are printed and kept
    python tools/soak.py --runs 1 --seed 1234   that very one again

One line of JSON a run is appended to tests/faults/soak.jsonl; the table of all of them is printed at the end. A run is a
training on two workers that may start again once. Its oracle is the undisturbed training: weights and history are equal to
the bit. A run that takes more than five minutes hangs, and ends the soak.

Exit status: 0 all went well; 1 one hung, had wrong weights or left something behind.
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
HEARTBEAT_SECONDS = 6.0  # an import of TensorFlow may hold a busy machine for some seconds
HANG_SECONDS = 300.0
SETTLE_SECONDS = 20.0


def main() -> int:
    """Soak, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=20, help="how many (default: 20)")
    parser.add_argument("--seed", type=int, help="of the first run; the next ones count from it")
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
    """The session, and the undisturbed result of every engine."""
    from dlspark.spark import get_session

    spark = get_session(2, app_name="dlspark-soak")
    with tempfile.TemporaryDirectory() as folder:
        expected = {engine: train(engine, Path(folder) / engine, None) for engine in ENGINES}
    return spark, expected


def train(engine: str, folder: Path, fault: Any) -> Any:
    """The training; ``fault`` None is one that never happens."""
    from dlspark import Trainer
    from dlspark.testing import toys
    from dlspark.testing.faults import Fault, disturbed_classifier

    fault = fault or Fault(action="raise", marker=str(folder / "never"), step=1 << 30)
    timeouts = {
        "heartbeat_seconds": HEARTBEAT_SECONDS,
        "launch_seconds": 60.0,  # also of a task that Spark gives to an idle Python worker which has been stopped
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
    """One disturbed training: what was done to it, and what came of it."""
    import psutil

    draw = random.Random(seed)
    engine, rank, name = draw.choice(ENGINES), draw.randrange(2), draw.choice(SIGNALS)
    # A moment is a report of the victim, and a while after it: before and in the first step, in the epochs, in validation,
    # while a checkpoint is written.
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
        except Exception as failure:  # whatever came out is what is to be known
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
    """Append a run to the file."""
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def hung(line: dict[str, Any]) -> None:
    """Keep the run as one that hangs, say where all threads stand, and end this process, which cannot go on."""
    nothing = dict.fromkeys(("seconds_to_error", "seconds_to_resume", "restarts"))
    keep({**line, **nothing, "seconds": HANG_SECONDS, "struck": True, "error": "hang", "right": False, "left": []})
    faulthandler.dump_traceback()
    os._exit(1)


def clear(spark: Any) -> None:
    """Leave no dead idle Python worker: Spark would hand one that was struck after its work to the next run."""
    from py4j.protocol import Py4JJavaError

    for _ in range(5):
        with contextlib.suppress(Py4JJavaError):
            spark.sparkContext.parallelize(range(4), 4).map(abs).count()
            return
    raise RuntimeError("The Spark session is not usable any more.")


def events(folder: Path) -> list[dict[str, Any]]:
    """The run's events so far."""
    lines = [line for path in folder.glob("store/run-*/events.jsonl") for line in path.read_text().splitlines()]
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue  # it is being written
    return found


def equal(result: Any, expected: Any) -> bool:
    """Weights and history, to the bit."""
    same = all((mine == theirs).all() for mine, theirs in zip(result.weights, expected.weights, strict=True))
    return same and result.history == expected.history


def surroundings() -> dict[str, set[Any]]:
    """What a run could leave behind: threads and listening ports of this process, guards, temporary folders."""
    import psutil

    me = psutil.Process()
    stopped, guards = set(), set()
    for child in me.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended while it was looked at
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
    """What is there that was not, after a while in which it may go."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        now = surroundings()
        found = [f"{name}: {sorted(map(str, more))}" for name in now if (more := now[name] - before[name])]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


def table() -> int:
    """Print what all runs so far came to; 1 if one of them went wrong."""
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
        sys.stdout.write(f"went wrong: seeds {wrong}\n")
    return 1 if wrong else 0


def quantile(values: list[float], fraction: float) -> str:
    """The smallest value that this fraction of ``values``, which are sorted, does not exceed."""
    return f"{values[min(len(values) - 1, int(fraction * len(values)))]:.1f} s" if values else "–"


if __name__ == "__main__":
    sys.exit(main())
