"""How driver and workers communicate."""

from __future__ import annotations

from dlspark.wire.client import HEARTBEAT_SECONDS, Endpoint, Reporter, SocketEndpoint, failed
from dlspark.wire.framing import Frames
from dlspark.wire.server import MAX_STRANGERS, ReportServer, Server

__all__ = [
    "HEARTBEAT_SECONDS",
    "MAX_STRANGERS",
    "Endpoint",
    "Frames",
    "ReportServer",
    "Reporter",
    "Server",
    "SocketEndpoint",
    "failed",
]
