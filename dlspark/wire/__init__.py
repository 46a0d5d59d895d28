"""How driver and workers talk to each other."""

from __future__ import annotations

from dlspark.wire.client import HEARTBEAT_SECONDS, Endpoint, Reporter, SocketEndpoint, failure_fields
from dlspark.wire.framing import Report
from dlspark.wire.server import MAX_STRANGERS, ReportServer

__all__ = [
    "HEARTBEAT_SECONDS",
    "MAX_STRANGERS",
    "Endpoint",
    "Report",
    "ReportServer",
    "Reporter",
    "SocketEndpoint",
    "failure_fields",
]
