"""Opens the two ends of a pair: the one place that knows all transports (base.py says how to add one)."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from experts.protocol.errors import ShardRejectedError
from experts.protocol.membership import ShardEndpoint
from experts.protocol.secret import MeshSecret
from experts.transports.base import Doorbell, RouterLink, ShardChannel
from experts.transports.control import Control, Hello, LifeLine, choose_transport, open_control, shake_hands
from experts.transports.cuda_ipc.links import connect_cuda_ipc, open_cuda_ipc_channel
from experts.transports.cuda_ipc.rows import CannotMapError
from experts.transports.shared_region import FdMailbox
from experts.transports.shm import ShmDoorbell, ShmRouterLink, ShmShardChannel
from experts.transports.tcp.links import connect_tcp, open_tcp_channel
from experts.transports.tls.identity import TlsIdentity

logger = logging.getLogger(__name__)


def connect(
    endpoint: ShardEndpoint,
    hello: Hello,
    device: str,
    spin_us: float,
    deadline_s: float,
    secret: MeshSecret | None = None,
    tls: TlsIdentity | None = None,
) -> RouterLink:
    """A link to the shard at `endpoint`, ready to post.

    `hello.transport` may be "auto". `device` holds the router's activations; `deadline_s` is an instant on
    time.monotonic(); `secret` None: the environment has it. Raises a ShardError: lost, timed out, or rejected with the
    shard's reason.
    """
    transport = choose_transport(hello.transport, endpoint, device)
    if tls is not None and transport == "nccl":
        raise ShardRejectedError(
            endpoint.rank, "nccl does not encrypt rows: with transport.tls, run the shards on CPUs, or encrypt below"
        )
    first = replace(hello, transport=transport, incarnation=endpoint.incarnation)
    try:
        return _connect(endpoint, first, device, spin_us, deadline_s, secret, tls)
    except CannotMapError as error:
        if hello.transport != "auto" or tls is not None:
            reason = f"no {transport} pair, its memory cannot be mapped here: {error}; use nccl, or auto"
            raise ShardRejectedError(endpoint.rank, reason) from error
        logger.warning("shard %d: rows go over NCCL, since its memory cannot be mapped: %s", endpoint.rank, error)
    return _connect(endpoint, replace(first, transport="nccl"), device, spin_us, deadline_s, secret, tls)


def _connect(
    endpoint: ShardEndpoint,
    hello: Hello,
    device: str,
    spin_us: float,
    deadline_s: float,
    secret: MeshSecret | None,
    tls: TlsIdentity | None,
) -> RouterLink:
    """Over `hello.transport`. A ShardError, or CannotMapError."""
    control = open_control(endpoint, secret, deadline_s, tls=tls)
    line = LifeLine(control.socket)
    try:
        link = _connect_over(endpoint, hello, line, control, device, spin_us, deadline_s)
    except BaseException:
        line.close()
        raise
    link.wants_hints = bool(control.answer.get("wants_hints"))
    return link


def _connect_over(
    endpoint: ShardEndpoint,
    hello: Hello,
    line: LifeLine,
    control: Control,
    device: str,
    spin_us: float,
    deadline_s: float,
) -> RouterLink:
    transport = hello.transport
    if transport in ("cuda_ipc", "shm_split"):
        return connect_cuda_ipc(endpoint, hello, line, control, device, spin_us, deadline_s)
    if transport == "shm":
        return _connect_shm(endpoint, hello, line, control, spin_us, deadline_s)
    if transport == "tcp":
        answer = shake_hands(control, endpoint.rank, hello, deadline_s)
        return connect_tcp(endpoint.rank, hello, line, answer, spin_us)
    from experts.transports.torch_pair import connect_torch

    return connect_torch(endpoint, hello, line, control, device, deadline_s)


def _connect_shm(
    endpoint: ShardEndpoint, hello: Hello, line: LifeLine, control: Control, spin_us: float, deadline_s: float
) -> RouterLink:
    rank = endpoint.rank
    mailbox = FdMailbox()
    try:
        shake_hands(control, rank, replace(hello, details={"mailbox": mailbox.name}), deadline_s)
        bell, pair = mailbox.receive(deadline_s)
        return ShmRouterLink.attach(rank, (bell, pair), hello.request_capacity, hello.reply_capacity, spin_us, line)
    except (OSError, ValueError) as error:
        raise ShardRejectedError(rank, f"its shared memory cannot be mapped: {error}") from error
    finally:
        mailbox.close()


def open_shard_channel(
    hello: Hello, line: LifeLine, bell: Doorbell, device: str, deadline_s: float
) -> tuple[ShardChannel, dict[str, Any]]:
    """The shard's end of the pair that `hello` asks for, and the fields of the answer. ValueError to refuse it."""
    channel, answer = _open(hello, line, bell, device, deadline_s)
    if hello.deferred:
        channel.defer()
    return channel, answer


def _open(
    hello: Hello, line: LifeLine, bell: Doorbell, device: str, deadline_s: float
) -> tuple[ShardChannel, dict[str, Any]]:
    if hello.transport == "shm":
        if not isinstance(bell, ShmDoorbell):
            raise ValueError("this shard has no shared memory; use transport tcp or nccl")
        mailbox = str(hello.details.get("mailbox", ""))
        channel = ShmShardChannel(hello.router_id, mailbox, bell, hello.request_capacity, hello.reply_capacity, line)
        return channel, {}
    if hello.transport == "tcp":
        if not isinstance(bell, ShmDoorbell):
            raise ValueError("this shard hears no sockets; use transport shm or nccl")
        return open_tcp_channel(hello, line, bell)
    if hello.transport in ("cuda_ipc", "shm_split"):
        return open_cuda_ipc_channel(hello, line, bell, device)
    if hello.transport in ("nccl", "gloo_split"):
        from experts.transports.torch_pair import open_torch_channel

        return open_torch_channel(hello, line, bell, device, deadline_s)
    raise ValueError(f"unknown transport {hello.transport!r}, expected shm, tcp, cuda_ipc or nccl")
