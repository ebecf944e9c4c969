"""Whom a shard lets in: who knows its secret, while there is room."""

from __future__ import annotations

from pathlib import Path

import pytest

from experts.protocol.errors import ShardRejectedError
from experts.protocol.membership import Membership
from experts.protocol.secret import SECRET_ENV, MeshSecret, MeshSecretError
from experts.protocol.settings import ShardSettings
from experts.shard.server import ShardServer
from experts.transports.memory_limit import PairRoom
from placement.placement import Placement
from tests.support.by_hand import NUM_EXPERTS, NUM_LAYERS, check_serves, open_link
from tests.support.small_mesh import make_router, write_checkpoint
from tests.support.waiting import await_true


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"))


def test_a_shard_without_a_secret_does_not_start(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SECRET_ENV)
    server = ShardServer(ShardSettings(model_path=str(model), dtype="float32", kernel="torch_loop"))
    with pytest.raises(MeshSecretError, match=f"{SECRET_ENV} holds no secret of the mesh; make one with"):
        server.start(Placement.linear(NUM_LAYERS, NUM_EXPERTS, 2), 0, 1)


def test_another_secret_counts_for_who_comes_then(model: Path) -> None:
    ours, theirs = MeshSecret.from_environment(), MeshSecret.generate()
    server = ShardServer(ShardSettings(model_path=str(model), dtype="float32", kernel="torch_loop"), ours)
    placement = Placement.linear(NUM_LAYERS, NUM_EXPERTS, 1)
    endpoint = server.start(placement, 0, 1)
    try:
        kept = open_link(model, endpoint)
        server.use_secret(theirs)
        check_serves(kept, model)
        router = make_router(model)
        applied = router.apply_membership(Membership(1, placement, (endpoint,)))
        assert "holds another secret of the mesh" in str(applied.refusal)
        router.use_secret(theirs)
        assert router.apply_membership(Membership(2, placement, (endpoint,))).lost == {}
        router.close()
        kept.close()
    finally:
        server.stop()


def test_a_shard_whose_pairs_cannot_fit_does_not_start(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experts.transports.memory_limit.memory_limit", lambda: 1 << 20)
    server = ShardServer(ShardSettings(model_path=str(model), dtype="float32", kernel="torch_loop"))
    try:
        with pytest.raises(ValueError, match=r"1 pair of 0\.\d MB might not fit: 0\.00 GB are left of the 0\.00 GB"):
            server.start(Placement.linear(NUM_LAYERS, NUM_EXPERTS, 2), 0, 1)
    finally:
        server.stop()


def test_the_pairs_of_a_shard_fit_its_memory_together(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = ShardServer(ShardSettings(model_path=str(model), dtype="float32", kernel="torch_loop"))
    endpoint = server.start(Placement.linear(NUM_LAYERS, NUM_EXPERTS, 1), 0, 1)
    try:
        first = open_link(model, endpoint)
        pair_bytes = len(first.send_buffer) + len(first.recv_buffer)
        server._room = PairRoom(limit_bytes=2 * pair_bytes, held_bytes=0)
        server._room.take(pair_bytes)
        second = open_link(model, endpoint)
        with pytest.raises(ShardRejectedError, match=r"1 pair of 0\.0 MB might not fit"):
            open_link(model, endpoint)
        second.close()
        await_true(lambda: server.status().routers == ["by-hand"], "the pair's end")
        check_serves(open_link(model, endpoint), model)
    finally:
        server.stop()
