"""EventLog: what happened in a run, as JSON lines and TensorBoard scalars in the run's folder of the store."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import queue
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from dlspark.job import EVENTS_FILE, TENSORBOARD_FOLDER
from dlspark.storage import Store
from dlspark.wire import Report

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 60.0  # for the last upload


class EventLog:
    """Appends every report of the workers, heartbeats left out, with the time at which it came (``time``, seconds UTC).

    In a local store lines are there as soon as they happen. A remote one has no appending: there they appear at the end of
    every epoch, and when the run ends. Scalars need the package tensorboard; without it they are left out. Both are the work
    of a thread, as whoever adds a report must not wait for them.

    Args:
        store: the run's folder.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.RLock()
        self._folder: Path | None = None
        self._file: IO[str] | None = None
        self._scalars: Any = None
        self._complained = False
        self._epochs: queue.SimpleQueue[Report | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._follow, name="dlspark-events", daemon=True)

    def __enter__(self) -> EventLog:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self) -> None:
        """Go on with the log that is there, or begin one."""
        if self._store.is_local:
            self._folder = Path(self._store.uri)
            self._folder.mkdir(parents=True, exist_ok=True)
        else:
            self._folder = Path(tempfile.mkdtemp(prefix="dlspark-events-"))
            if self._store.exists(EVENTS_FILE):
                (self._folder / EVENTS_FILE).write_bytes(self._store.read_bytes(EVENTS_FILE))
        path = self._folder / EVENTS_FILE
        torn = path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
        self._file = path.open("a", encoding="utf-8")
        if torn:  # the driver was killed while it wrote
            self._file.write("\n")
        self._thread.start()
        if importlib.util.find_spec("tensorboard") is None:
            logger.info("No TensorBoard scalars: the package tensorboard is not installed.")

    def add(self, report: Report) -> None:
        """Append ``report``; the scalars of an epoch's end, too."""
        with self._lock:
            if self._file is None:
                return
            with self._tolerated():
                self._file.write(json.dumps({"time": round(time.time(), 3), **report}, ensure_ascii=False) + "\n")
                self._file.flush()
                if report["kind"] == "epoch" and report["rank"] == 0:
                    self._epochs.put(report)

    def close(self) -> None:
        """Close the files, and leave what is not yet in a remote store there."""
        with self._lock:
            if self._file is None:
                return
            file, self._file = self._file, None
            with self._tolerated():
                file.close()
        self._epochs.put(None)
        self._thread.join(CLOSE_SECONDS)
        if not self._store.is_local and self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=self._thread.is_alive())

    def _follow(self) -> None:
        """After every epoch, and at the end: the scalars, and what a remote store does not have yet."""
        while (report := self._epochs.get()) is not None:
            with self._tolerated():
                self._add_scalars(report)
                self._publish()
        with self._tolerated():
            if self._scalars is not None:
                self._scalars.close()
        with self._tolerated():
            self._publish()

    def _add_scalars(self, report: Report) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            return
        if self._scalars is None:
            from tensorboard.summary import Writer

            self._scalars = Writer(str(self._path / TENSORBOARD_FOLDER))
        values = {**report["logs"], "epoch_seconds": report["seconds"]}
        for name, value in values.items():
            self._scalars.add_scalar(name, value, step=report["epoch"])
        self._scalars.flush()

    @contextlib.contextmanager
    def _tolerated(self) -> Iterator[None]:
        """A log that cannot be kept (a full disk) does not end a run that can go on; it is said once."""
        try:
            yield
        except Exception as error:  # TensorBoard's writer raises errors of TensorFlow's own
            if not self._complained:
                self._complained = True
                logger.warning("The events of the run cannot be kept: %s", error)

    @property
    def _path(self) -> Path:
        return self._folder or Path(self._store.uri)

    def _publish(self) -> None:
        """Copy what has been written to a remote store."""
        if self._store.is_local:
            return
        for path in [self._path / EVENTS_FILE, *sorted(self._path.glob(f"{TENSORBOARD_FOLDER}/*"))]:
            self._store.write_bytes(str(path.relative_to(self._path)), path.read_bytes())
