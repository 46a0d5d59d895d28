"""Ctrl-C in the middle of a call to the JVM raises RuntimeError("reentrant call …") in place of KeyboardInterrupt.

PySpark's handler of SIGINT calls the JVM to cancel all jobs, and raises KeyboardInterrupt afterwards. Each Python
thread has one connection to the JVM, so the handler's call fails in the middle of another one: nothing is cancelled,
and programs get an error that they do not expect. Spark 4.2 raises KeyboardInterrupt in any case (SPARK-55404). Needed
until PySpark's handler also cancels the jobs then. Py4j closes the connection of the interrupted call, and logs a
traceback that nobody needs.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from typing import Any, NoReturn

CANCEL_SECONDS = 5.0


def mend() -> None:
    """Replace PySpark's handler, if it is the current one and this is the main thread, where handlers run."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is threading.main_thread() and getattr(handler, "__module__", "").startswith("pyspark."):
        signal.signal(signal.SIGINT, _interrupt)
        logging.getLogger().addFilter(_needed)


def _needed(record: logging.LogRecord) -> bool:
    return record.msg != "KeyboardInterrupt while sending command."


def _interrupt(number: int, frame: Any) -> NoReturn:
    """Cancel all jobs, as PySpark's handler does, through the connection of another thread."""
    from pyspark import SparkContext

    context = SparkContext._active_spark_context
    if context is not None:
        canceller = threading.Thread(target=_cancel, args=[context], name="dlspark-cancel", daemon=True)
        canceller.start()
        canceller.join(CANCEL_SECONDS)
    raise KeyboardInterrupt


def _cancel(context: Any) -> None:
    with contextlib.suppress(Exception):  # the JVM may have ended, by the same Ctrl-C
        context.cancelAllJobs()
