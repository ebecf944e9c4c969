"""A shard in a process of its own, which tells its status."""

from __future__ import annotations

from multiprocessing.connection import Connection
from typing import Any

from experts.protocol.settings import ShardSettings
from experts.shard.server import ShardServer
from placement.placement import Placement


def serve(settings: dict[str, Any], placement: str, pipe: Connection) -> None:
    """A shard's process: its endpoint, then its status whenever it is asked for."""
    server = ShardServer(ShardSettings.model_validate(settings))
    pipe.send(server.start(Placement.from_json(placement), 0, 1))
    while pipe.recv():
        pipe.send(server.status())
    server.stop()
