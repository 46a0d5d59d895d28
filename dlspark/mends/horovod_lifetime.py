"""Every run of Horovod on Spark ends with three seconds of sleep.

A task keeps its service for three seconds after it has started its command, because the client that has started it connects
again to wait for the result. ``SparkTaskService._run_command`` starts that clock when the command has ended (Horovod 0.28.1,
horovod/spark/task/task_service.py). Needed until it starts the clock before the command.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

_lock = threading.Lock()


def mend() -> None:
    """Let the tasks of later runs of this driver mend themselves; once per process."""
    from horovod.spark import runner

    def make_mapper(*arguments: Any) -> Callable[[int, Any], Iterator[Any]]:
        mapper = original(*arguments)  # bound below, before any launch

        def mended(index: int, rows: Any) -> Iterator[Any]:
            mend_task()
            yield from mapper(index, rows)

        return mended

    with _lock:
        original = runner._make_mapper
        if original.__name__ != make_mapper.__name__:  # not mended yet
            runner._make_mapper = make_mapper


def mend_task() -> None:
    """Start the clock before the command in the tasks of this process."""
    from horovod.runner.common.service.task_service import BasicTaskService
    from horovod.runner.common.util.timeout import Timeout
    from horovod.spark.task.task_service import SparkTaskService

    def _run_command(self: Any, *arguments: Any, **keywords: Any) -> None:
        if self._minimum_command_lifetime_s is not None:
            self._minimum_command_lifetime = Timeout(self._minimum_command_lifetime_s, message="the start of a command")
        BasicTaskService._run_command(self, *arguments, **keywords)

    SparkTaskService._run_command = _run_command
