"""EventLog: the events of a run, as JSON lines and TensorBoard scalars in the run's folder of the store."""

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
from dlspark.wire import messages

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 60.0  # limit for the last upload


class EventLog:
    """Appends messages with the time of their arrival (``time``, seconds UTC).

    A local store has every line at once. A remote store cannot append: it gets the lines at the end of every epoch and at
    the end of the run. Scalars are written only if the package tensorboard is installed. A thread uploads lines and writes
    scalars, so that `add` does not wait.

    Args:
        store: the run's folder.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.RLock()
        self._folder: Path  # since `open`
        self._file: IO[str] | None = None
        self._scalars: Any = None
        self._complained = False
        self._epochs: queue.SimpleQueue[messages.EpochEnded | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._follow, name="dlspark-events", daemon=True)

    def __enter__(self) -> EventLog:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self) -> None:
        """Open the log of the run to append to it, or create it."""
        if self._store.is_local:
            self._folder = Path(self._store.uri)
            self._folder.mkdir(parents=True, exist_ok=True)
        else:
            self._folder = Path(tempfile.mkdtemp(prefix="dlspark-events-"))
            if self._store.exists(EVENTS_FILE):
                (self._folder / EVENTS_FILE).write_bytes(self._store.read_bytes(EVENTS_FILE))
        path = self._folder / EVENTS_FILE
        torn = path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
        self._file = path.open("a", encoding="utf-8", errors="backslashreplace")  # "\\udcff" is an escape of JSON too
        if torn:  # the driver was killed while it wrote
            self._file.write("\n")
        self._thread.start()
        if importlib.util.find_spec("tensorboard") is None:
            logger.info("No TensorBoard scalars: the package tensorboard is not installed.")

    def add(self, message: messages.Message) -> None:
        """Append ``message``, and the scalars of an `EpochEnded`."""
        with self._lock:
            if self._file is None:
                return
            with self._tolerated():
                line = {"time": round(time.time(), 3), **messages.plain(message)}
                self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
                self._file.flush()
                if isinstance(message, messages.EpochEnded) and message.rank == 0:
                    self._epochs.put(message)

    def close(self) -> None:
        """Close the files, and upload the rest to a remote store."""
        with self._lock:
            if self._file is None:
                return
            file, self._file = self._file, None
            with self._tolerated():
                file.close()
        self._epochs.put(None)
        self._thread.join(CLOSE_SECONDS)
        if not self._store.is_local:
            shutil.rmtree(self._folder, ignore_errors=self._thread.is_alive())

    def _follow(self) -> None:
        """After every epoch, and at the end: write the scalars, and upload."""
        while (epoch := self._epochs.get()) is not None:
            with self._tolerated():
                self._add_scalars(epoch)
                self._publish()
        with self._tolerated():
            if self._scalars is not None:
                self._scalars.close()
        with self._tolerated():
            self._publish()

    def _add_scalars(self, epoch: messages.EpochEnded) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            return
        if self._scalars is None:
            from tensorboard.summary import Writer

            self._scalars = Writer(str(self._folder / TENSORBOARD_FOLDER))
        for name, value in {**epoch.logs, "epoch_seconds": epoch.seconds}.items():
            self._scalars.add_scalar(name, value, step=epoch.epoch)
        self._scalars.flush()

    @contextlib.contextmanager
    def _tolerated(self) -> Iterator[None]:
        """Tolerate a log that cannot be written, for example on a full disk: warn once, and let the run continue."""
        try:
            yield
        except Exception as error:  # TensorBoard's writer also raises TensorFlow's errors
            if not self._complained:
                self._complained = True
                logger.warning("The events of the run cannot be written: %s", error)

    def _publish(self) -> None:
        """Upload the files to a remote store."""
        if self._store.is_local:
            return
        for path in [self._folder / EVENTS_FILE, *sorted(self._folder.glob(f"{TENSORBOARD_FOLDER}/*"))]:
            self._store.write_bytes(str(path.relative_to(self._folder)), path.read_bytes())
