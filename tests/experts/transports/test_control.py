"""Hellos: bad ones are refused with the reason, and what a pair of two live or dead ends costs the other."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import pytest

from experts.protocol.errors import ShardLostError, ShardRejectedError, ShardTimeoutError
from experts.protocol.membership import ShardEndpoint, host_id
from experts.transports.connect import connect
from experts.transports.control import Control, choose_transport, open_control, shake_hands
from tests.support.echo_shard import (
    EchoShard,
    context,
    counted_up,
    deadline_in,
    echo_shard,
    hello_for,
    post_body,
    reply_body,
)

LONG_S = 30.0


@pytest.fixture(scope="module")
def shard() -> Iterator[EchoShard]:
    with echo_shard() as shard:
        yield shard


def control_of(shard: EchoShard) -> Control:
    return open_control(shard.endpoint, None, deadline_in(LONG_S))


def still_serves(shard: EchoShard) -> None:
    link = shard.connect("shm", "after")
    nbytes = post_body(link, b"abc")
    assert link.wait(deadline_in(LONG_S)) == nbytes
    assert reply_body(link, nbytes) == counted_up(b"abc")
    link.close()


def hello_of(**changes: Any) -> dict[str, Any]:
    return {**asdict(hello_for("shm")), **changes}


@pytest.mark.parametrize(
    ("hello", "reason"),
    [
        (hello_of(transport="pigeon"), "unknown transport 'pigeon', expected shm, tcp, cuda_ipc or nccl"),
        (hello_of(surprise=1), "unexpected keyword argument 'surprise'"),
        ({"router_id": "r"}, "missing"),
        (hello_of(max_rows=-1), "max_rows is -1, expected an integer of 1 to"),
        (hello_of(top_k="many"), "top_k is 'many', expected an integer"),
        (hello_of(top_k=True), "top_k is True, expected an integer"),
        (hello_of(hidden_size=1 << 60), "hidden_size is 1152921504606846976"),
        (hello_of(max_rows=1 << 20, hidden_size=1 << 20), "1048576 rows of 4194304 bytes and 1 experts in one message"),
        (hello_of(max_rows=1 << 20, top_k=1 << 10), "1048576 rows of 64 bytes and 1024 experts in one message"),
        (hello_of(router_id=7), "router_id is 7, expected a string"),
        (hello_of(router_id="r" * 257), "router_id has 257 characters, expected up to 256"),
        (hello_of(weights=7), "weights is 7, expected a string"),
        (hello_of(facts=[1]), "facts is \\[1\\], expected an object"),
        (hello_of(details=[1]), "details is \\[1\\], expected an object"),
        (hello_of(transport="nccl"), "transport nccl joins GPUs, this end computes on 'cpu'"),
        (hello_of(transport="cuda_ipc"), "transport cuda_ipc joins GPUs, this end computes on 'cpu'"),
        (hello_of(details={"mailbox": "nobody"}), "shared memory cannot be handed over, is this another host"),
        (hello_of(dtype="int3", transport="tcp"), "unknown dtype 'int3'"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_what_no_router_would_say_is_refused_with_the_reason(
    shard: EchoShard, hello: dict[str, Any], reason: str
) -> None:
    control = control_of(shard)
    control.socket.settimeout(LONG_S)
    control.socket.sendall(control.handshake.seal(hello))
    with pytest.raises(ShardRejectedError, match=reason):
        read_answer(control)
    assert control.socket.recv(1) == b"", "a refused router keeps no connection"
    still_serves(shard)


def read_answer(control: Control) -> dict[str, Any]:
    """What `shake_hands` returns or raises, once the hello is sent."""

    class Sent:
        def seal(self, _: Any) -> bytes:
            return b""

        def __getattr__(self, name: str) -> Any:
            return getattr(control.handshake, name)

    return shake_hands(Control(control.socket, Sent()), 0, hello_for("shm"), deadline_in(LONG_S))  # type: ignore[arg-type]


@pytest.mark.parametrize("transport", ["shm", "tcp", "gloo_split"])
def test_a_router_that_dies_in_the_handshake_leaves_no_channel(transport: str) -> None:
    with echo_shard(handshake_timeout_s=1.0) as shard:
        control = control_of(shard)
        control.socket.sendall(control.handshake.seal(asdict(hello_for(transport, "dead"))))
        if transport != "shm":
            assert read_answer(control)["ok"] is True
        control.socket.close()
        if transport != "shm":
            assert shard.event() == ("left", "dead")
        still_serves(shard)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_killed_routers_leave_nothing_behind(transport: str) -> None:
    names_before = set(os.listdir("/dev/shm"))
    with echo_shard() as shard:
        for number in range(3):
            ours, theirs = context().Pipe()
            process = context().Process(target=_route_until_killed, args=(shard.endpoint, transport, theirs))
            process.start()
            theirs.close()
            assert ours.poll(LONG_S), "the router did not connect"
            assert ours.recv() == "waiting"
            assert shard.event() == ("held", f"router{process.pid}")
            process.kill()
            process.join(LONG_S)
            assert shard.event() == ("left", f"router{process.pid}"), number
            ours.close()
        shard.pipe.send("release")
        assert shard.event() == ("released", 3)
        still_serves(shard)
        shard.process.kill()
        shard.process.join(LONG_S)
    ours_left = {name for name in set(os.listdir("/dev/shm")) - names_before if "expertmesh" in name}
    assert not ours_left


def _route_until_killed(endpoint: ShardEndpoint, transport: str, pipe: Any) -> None:
    from tests.support.echo_shard import HOLD

    link = connect(endpoint, hello_for(transport, f"router{os.getpid()}"), "cpu", 20.0, deadline_in(LONG_S))
    post_body(link, b"abc", HOLD)
    pipe.send("waiting")
    link.wait(deadline_in(3600))


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    endpoint = ShardEndpoint(3, "1", "127.0.0.1", port, host_id(), 0)
    with pytest.raises(ShardLostError, match=f"shard 3: cannot connect to 127.0.0.1:{port}"):
        connect(endpoint, hello_for("shm"), "cpu", 20.0, deadline_in(LONG_S))


@pytest.mark.parametrize("transport", ["shm", "tcp", "gloo_split"])
def test_a_stopped_shard_costs_the_connect_deadline(transport: str) -> None:
    with echo_shard() as shard:
        shard.stop()
        deadline_s = deadline_in(0.3)
        with pytest.raises(ShardTimeoutError, match="no answer to the handshake before the connect deadline"):
            connect(shard.endpoint, hello_for(transport), "cpu", 20.0, deadline_s)
        assert time.monotonic() >= deadline_s
        shard.resume()
        still_serves(shard)


def test_refusals_reach_the_router_with_the_reason(shard: EchoShard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.is_nccl_available", lambda: False)
    with pytest.raises(ShardRejectedError, match="transport nccl: this build of torch has no NCCL"):
        connect(shard.endpoint, hello_for("nccl"), "cuda", 20.0, deadline_in(LONG_S))
    with pytest.raises(ShardRejectedError, match="transport nccl joins GPUs, this end computes on 'cpu'"):
        connect(shard.endpoint, hello_for("nccl"), "cpu", 20.0, deadline_in(LONG_S))


def test_auto_follows_the_devices_of_both_ends() -> None:
    here = ShardEndpoint(0, "1", "127.0.0.1", 1, host_id(), 1)
    there = replace(here, host_id="elsewhere")
    assert choose_transport("auto", here, "cpu") == "shm"
    assert choose_transport("auto", there, "cpu") == "tcp"
    assert choose_transport("auto", here, "cuda:1") == "shm", "a shard without a GPU"
    assert choose_transport("auto", there, "cuda") == "tcp"
    on_gpu = replace(here, device="GPU-1")
    assert choose_transport("auto", on_gpu, "cuda:1") == "cuda_ipc"
    assert choose_transport("auto", replace(on_gpu, host_id="elsewhere"), "cuda:1") == "nccl"
    assert choose_transport("auto", on_gpu, "cpu") == "shm", "a router without one"
    assert choose_transport("tcp", here, "cpu") == "tcp"


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_a_shard_may_listen_on_another_address_of_the_host(transport: str) -> None:
    with echo_shard(bind_host="127.0.0.7") as shard:
        link = shard.connect(transport)
        nbytes = post_body(link, b"abc")
        assert link.wait(deadline_in(LONG_S)) == nbytes
        link.close()
