"""Routers and shards with TLS: rows, copies of weights, ends of processes, and who is turned away."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from experts.protocol.errors import ShardError
from experts.protocol.membership import ShardEndpoint
from experts.protocol.orders import CopyOrder
from experts.protocol.secret import MeshSecret
from experts.transports.control import open_control
from experts.transports.control_port.listener import ControlListener
from experts.transports.tls.identity import TlsIdentity
from tests.support.certificates import Authority
from tests.support.echo_shard import deadline_in
from tests.support.small_mesh import (
    Mesh,
    assert_matches,
    mesh_of,
    oracle,
    random_batch,
    replicated,
    run,
    write_checkpoint,
)
from tests.support.waiting import await_true

SECRET = MeshSecret.generate()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"), "ours")


@pytest.fixture(scope="module")
def mesh(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    model = write_checkpoint(tmp_path_factory.mktemp("tls") / "model")
    with mesh_of(model, replicated(2, 6, 2, 2), tls=authority.issue("shard").model_dump()) as mesh:
        yield mesh


@pytest.mark.parametrize("transport", ["tcp", "shm"])
@pytest.mark.parametrize("tokens", [1, 700])
def test_rows_are_right(mesh: Mesh, authority: Authority, transport: str, tokens: int) -> None:
    router = mesh.router(transport=transport, tls=authority.issue("router").model_dump())
    batch = random_batch(tokens)
    for layer in (0, 1):
        assert_matches(run(router, layer, batch), oracle(mesh.checkpoint, layer, batch))
    assert router.status().failovers == 0
    assert set(router.status().transports.values()) == {transport}
    router.close()
    await_true(lambda: mesh.shards[0].status().routers == [], "the shard to notice the router's end")


def test_a_router_without_tls_is_told_what_to_do(mesh: Mesh) -> None:
    applied = mesh.router(apply=False, transport="tcp").apply_membership(mesh.membership())
    assert "it wants TLS, and this side has none: set mesh.tls for the shards and transport.tls" in applied.refusal


def test_what_cannot_be_encrypted_is_refused(mesh: Mesh, authority: Authority) -> None:
    router = mesh.router(apply=False, transport="nccl", tls=authority.issue("router").model_dump())
    assert "nccl does not encrypt rows" in router.apply_membership(mesh.membership()).refusal


def test_experts_are_copied_and_a_killed_shard_is_noticed(tmp_path: Path) -> None:
    files = Authority(tmp_path / "ca", "ours").issue("any").model_dump()
    model = write_checkpoint(tmp_path / "model")
    with mesh_of(model, replicated(2, 6, 2, 1), slots_per_rank=6, tls=files) as mesh:
        elsewhere = replace(mesh.shards[0].endpoint, host_id="elsewhere")  # or it would read the memory itself
        missing = [(layer, expert) for layer in (0, 1) for expert in (0, 2, 4)]
        found = mesh.shards[1].copy([CopyOrder(layer, expert, (elsewhere,)) for layer, expert in missing])
        assert [(result.source, result.error) for result in found] == [("tcp", "")] * 6
        mesh.placement = replicated(2, 6, 2, 2)
        router = mesh.router(transport="tcp", tls=files)
        batch = random_batch(5)
        expected_TD = oracle(mesh.checkpoint, 0, batch)
        assert_matches(run(router, 0, batch), expected_TD)
        mesh.shards[0].signal(signal.SIGKILL)
        assert_matches(run(router, 0, batch), expected_TD)
        status = router.status()
        assert (status.failovers > 0, list(status.lost), status.fallback_pairs) == (True, [0], 0)


class Port:
    """A shard's control port in this process, which lets nobody open anything."""

    def __init__(self, tls: TlsIdentity | None) -> None:
        self.listener = ControlListener(
            "127.0.0.1",
            lambda hello, line: 1 / 0,
            print,
            print,
            30.0,
            secret=lambda: SECRET,
            tls=tls,  # type: ignore
        )
        self.endpoint = ShardEndpoint(0, "1", "127.0.0.1", self.listener.port, "elsewhere", os.getpid())


@pytest.mark.parametrize(
    ("shards", "routers", "router_says", "shard_says"),
    [
        ("ours", "other", "certificate is refused: self-signed", "it refuses this side's certificate"),
        ("ours", "trusts both", "it refuses this side's .*unknown ca", "certificate is refused: self-signed"),
        ("ours", None, "it wants TLS, and this side has none: set", "it speaks without TLS, and this side with it"),
        (None, "ours", "it does not speak TLS, and this side does: set", "it speaks TLS, and this side does not"),
    ],
)  # fmt: skip
def test_the_two_sides_have_to_trust_each_other(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    shards: str | None,
    routers: str | None,
    router_says: str,
    shard_says: str,
) -> None:
    ours, other = Authority(tmp_path / "ours", "ours"), Authority(tmp_path / "other", "other")
    both = tmp_path / "both.pem"
    both.write_bytes(ours.file.read_bytes() + other.file.read_bytes())
    identities = {
        None: None,
        "ours": TlsIdentity(ours.issue("a")),
        "other": TlsIdentity(other.issue("b")),
        "trusts both": TlsIdentity(other.issue("c").model_copy(update={"ca_file": str(both)})),
    }
    port = Port(identities[shards])
    try:
        with pytest.raises(ShardError, match=router_says):
            open_control(port.endpoint, SECRET, deadline_in(30), tls=identities[routers])
        await_true(lambda: "turned" in caplog.text, "the shard's complaint")
        assert any(re.search(shard_says, line) for line in caplog.messages), caplog.messages
    finally:
        port.listener.stop()


def test_the_secret_decides_inside_the_tunnel(tmp_path: Path) -> None:
    ours = Authority(tmp_path, "ours")
    port = Port(TlsIdentity(ours.issue("shard")))
    try:
        asking = TlsIdentity(ours.issue("router"))
        with pytest.raises(ShardError, match="holds another secret of the mesh"):
            open_control(port.endpoint, MeshSecret.generate(), deadline_in(30), tls=asking)
        control = open_control(port.endpoint, SECRET, deadline_in(30), tls=asking)
        assert control.handshake.proven
        control.socket.close()
    finally:
        port.listener.stop()
