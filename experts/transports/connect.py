"""Opens the two ends of a pair over the transport that fits: the one place that knows all transports."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from experts.errors import ShardError
from experts.link import Doorbell, RouterLink, ShardChannel
from experts.membership import ShardEndpoint
from experts.transports.control import Hello, LifeLine, choose_transport, open_control, shake_hands
from experts.transports.shm import ShmDoorbell, ShmRouterLink, ShmShardChannel


def connect(endpoint: ShardEndpoint, hello: Hello, device: str, spin_us: float, deadline_s: float) -> RouterLink:
    """A link to the shard at `endpoint`, ready to post.

    `hello.transport` may be "auto". `device` is where the router's activations live; `deadline_s` is a time of
    time.monotonic(). Raises ShardError: lost, timed out, or rejected with the shard's reason.
    """
    transport = choose_transport(hello.transport, endpoint, device)
    hello = replace(hello, transport=transport, incarnation=endpoint.incarnation)
    connection = open_control(endpoint, deadline_s)
    line = LifeLine(connection)
    try:
        if transport == "shm":
            return _connect_shm(endpoint, hello, line, connection, spin_us, deadline_s)
        from experts.transports.torch_distributed import connect_torch

        return connect_torch(endpoint, hello, line, connection, device, deadline_s)
    except BaseException:
        line.close()
        raise


class _ClosingShmLink(ShmRouterLink):
    """A shared-memory link that also owns its life line."""

    line: LifeLine

    def close(self) -> None:
        super().close()
        self.line.close()


def _connect_shm(
    endpoint: ShardEndpoint, hello: Hello, line: LifeLine, connection: Any, spin_us: float, deadline_s: float
) -> RouterLink:
    link = _ClosingShmLink(endpoint.rank, hello.request_capacity, hello.reply_capacity, spin_us, line.gone)
    link.line = line
    try:
        answer = shake_hands(
            connection, endpoint.rank, replace(hello, details={"path": link.region.path}), deadline_s
        )
        link.attach_bell(answer["bell"])
    except OSError as error:
        raise ShardError(endpoint.rank, f"shared memory of the shard cannot be mapped: {error}") from error
    finally:
        link.region.unlink()
    return link


def open_shard_channel(
    hello: Hello, line: LifeLine, bell: Doorbell, device: str, deadline_s: float
) -> tuple[ShardChannel, dict[str, Any]]:
    """The shard's end of the pair that `hello` asks for, and what to answer. ValueError refuses it."""
    if hello.transport == "shm":
        if not isinstance(bell, ShmDoorbell):
            raise ValueError("this shard has no shared memory")
        path = str(hello.details.get("path", ""))
        channel = ShmShardChannel(hello.router_id, path, hello.request_capacity, hello.reply_capacity)
        return channel, {"bell": bell.region.path}
    if hello.transport in ("gloo", "nccl"):
        from experts.transports.torch_distributed import open_torch_channel

        return open_torch_channel(hello, line, bell, device, deadline_s)
    raise ValueError(f"unknown transport {hello.transport!r}, expected shm, gloo or nccl")


def deadline_in(seconds: float) -> float:
    """A deadline on time.monotonic()'s clock."""
    return time.monotonic() + seconds
