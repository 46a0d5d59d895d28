"""What the driver does around a run."""

from __future__ import annotations

from dlspark.driver.events import EventLog
from dlspark.driver.inputs import as_rows, take_model
from dlspark.driver.monitor import RunMonitor

__all__ = [
    "EventLog",
    "RunMonitor",
    "as_rows",
    "take_model",
]
