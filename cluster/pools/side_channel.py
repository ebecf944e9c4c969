"""A port for NIXL's handshakes, for each router one that nobody else on its host has."""

from __future__ import annotations

import os
from typing import Any

from cluster.serve_environment import free_ports

PORT = "VLLM_NIXL_SIDE_CHANNEL_PORT"


def take_side_channel(kv_transfer: Any) -> int | None:
    """Tell vLLM's NIXL connector a free port, in this process's environment; a port that is there already stays.

    `kv_transfer`: vLLM's `kv_transfer_config`, of which those that do without NIXL need nothing. Ray Serve LLM would
    count from 20000 by the replica's rank, which routers of another pool, or of another model, on this host have too:
    the second one's engine then waits for ever for a listener that could not start.
    """
    if "Nixl" not in str(kv_transfer) or PORT in os.environ:
        return None
    [port] = free_ports(1, "")
    os.environ[PORT] = str(port)
    return port
