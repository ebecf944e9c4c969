"""One shard: what it refuses, survives and reports, and slots that change while it serves."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experts.checkpoint import CheckpointError
from experts.protocol.errors import ShardLostError, ShardRejectedError
from experts.protocol.membership import ShardEndpoint
from experts.protocol.secret import SECRET_ENV
from experts.protocol.settings import ShardSettings
from experts.protocol.wire import (
    H_DTYPE,
    H_HIDDEN,
    H_LAYER,
    H_MAGIC,
    H_NO_SLOT_EXPERT,
    H_NO_SLOT_LAYER,
    H_PAIRS,
    H_ROWS,
    H_SEQ,
    H_STATUS,
    HEADER_BYTES,
    STATUS_NO_SLOT,
    STATUS_REJECTED,
    error_text,
    header_of,
    request_layout,
)
from experts.shard.server import ShardServer
from experts.transports.base import RouterLink
from placement.placement import Placement
from tests.support.by_hand import NUM_EXPERTS, NUM_LAYERS, ask, check_serves, open_link
from tests.support.packed_request import HIDDEN, ROW_BYTES, pack
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

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def mesh(model: Path) -> Iterator[Mesh]:
    """Two shards of three experts a layer."""
    with mesh_of(model, Placement.linear(NUM_LAYERS, NUM_EXPERTS, 2)) as mesh:
        yield mesh


@pytest.fixture
def link(mesh: Mesh) -> Iterator[RouterLink]:
    link = open_link(mesh.model, mesh.shards[0].endpoint)
    yield link
    link.close()


def put(word: int, value: int) -> Any:
    """A way to spoil a request: one word of its header."""

    def spoil(link: RouterLink, nbytes: int) -> int:
        header_of(link.send_buffer)[word] = value
        return nbytes

    return spoil


def spoil_offsets(link: RouterLink, nbytes: int) -> int:
    link.send_buffer[HEADER_BYTES : HEADER_BYTES + 8].view(np.int32)[:] = [77, -5]
    return nbytes


def spoil_all(link: RouterLink, nbytes: int) -> int:
    link.send_buffer[:] = 0xFF
    return nbytes


BAD_REQUESTS = {
    "magic": (put(H_MAGIC, 0xDEAD), "magic number 0xdead, expected 0x45584d31"),
    "layer": (put(H_LAYER, 9), "layer 9, this model has MoE layers 0 to 1"),
    "dtype": (put(H_DTYPE, 2), "dtype code 2"),
    "hidden": (put(H_HIDDEN, 25), "hidden size 25"),
    "rows": (put(H_ROWS, 1 << 40), f"{1 << 40} rows"),
    "pairs": (put(H_PAIRS, -1), "-1 pairs"),
    "many pairs": (put(H_PAIRS, 4), "4 pairs in 1 rows, this model has 3 experts for a row"),
    "truncated": (lambda link, nbytes: nbytes - 1, "bytes, the message has"),
    "no header": (lambda link, nbytes: 5, "a message of 5 bytes, expected 128"),
    "nothing": (lambda link, nbytes: 0, "a message of 0 bytes"),
    "offsets": (spoil_offsets, "row offsets do not count up from 0 to 2"),
    "garbage": (spoil_all, "magic number"),
}


@pytest.mark.parametrize("kind", BAD_REQUESTS)
def test_a_bad_request_goes_back_and_the_loop_lives_on(mesh: Mesh, model: Path, link: RouterLink, kind: str) -> None:
    spoil, text = BAD_REQUESTS[kind]
    errors = mesh.shards[0].status().errors
    header = ask(link, spoil(link, pack(link.send_buffer, 7, [0, 1])))
    assert header[H_STATUS] == STATUS_REJECTED
    assert error_text(link.recv_buffer).startswith("BadRequestError: ")
    assert text in error_text(link.recv_buffer)
    check_serves(link, model)
    status = mesh.shards[0].status()
    assert (status.errors, status.alive) == (errors + 1, True)
    assert text in status.last_error


def test_an_expert_of_another_shard_is_named(mesh: Mesh, model: Path, link: RouterLink) -> None:
    header = ask(link, pack(link.send_buffer, 3, [0, 5], layer=1))
    assert (header[H_SEQ], header[H_STATUS]) == (3, STATUS_NO_SLOT)
    assert (header[H_NO_SLOT_LAYER], header[H_NO_SLOT_EXPERT]) == (1, 5)
    assert error_text(link.recv_buffer) == "NoSlotError: expert 5 of layer 1 has no slot on this shard"
    check_serves(link, model)


def test_rows_that_do_not_fit_the_reply_are_refused(mesh: Mesh, model: Path, link: RouterLink) -> None:
    """Rows without experts need less of the request than rows with all of theirs, so more of them fit."""
    nbytes = request_layout(120, 0, ROW_BYTES)[-1]
    assert nbytes <= len(link.send_buffer)
    pack(link.send_buffer, 1, [0])
    link.send_buffer[HEADER_BYTES:] = 0
    header_of(link.send_buffer)[[H_ROWS, H_PAIRS]] = 120, 0
    assert ask(link, nbytes)[H_STATUS] == STATUS_REJECTED
    assert error_text(link.recv_buffer) == "BadRequestError: 120 rows do not fit the reply buffer"
    check_serves(link, model)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"dtype": "bfloat16"}, "router by-hand has dtype bfloat16, this shard has float32"),
        ({"hidden_size": 32}, "has hidden size 32, this shard has 24"),
        ({"num_layers": 3}, "has number of MoE layers 3, this shard has 2"),
        ({"top_k": 20_000}, "has top-k 20000, this shard has 3"),
        ({"top_k": 2}, "has top-k 2, this shard has 3"),
        (
            {"max_rows": 2049},
            r"sends up to 2049 rows in a message, this shard takes up to 2048 \(max_rows",
        ),
        ({"weights": "A" * (1 << 17)}, "handshake failed"),
    ],
)
def test_a_router_that_does_not_fit_is_refused_at_the_door(mesh: Mesh, changes: dict[str, Any], text: str) -> None:
    endpoint = mesh.shards[0].endpoint
    with pytest.raises((ShardRejectedError, ShardLostError), match=text):
        open_link(mesh.model, endpoint, **changes)


def test_a_router_that_looks_for_an_earlier_incarnation_is_not_refused_for_itself(mesh: Mesh) -> None:
    stale = replace(mesh.shards[0].endpoint, incarnation="stale")
    with pytest.raises(ShardLostError, match=r"this is another incarnation of the shard, the router wants stale$"):
        open_link(mesh.model, stale)


def test_status_tells_what_was_done(mesh: Mesh, model: Path) -> None:
    before = mesh.shards[1].status()
    assert (before.rank, before.epoch, before.kernel) == (1, 1, "torch_loop")
    assert before.loaded_experts == NUM_LAYERS * 3
    assert before.loaded_bytes == NUM_LAYERS * 3 * 4 * 3 * HIDDEN * 40
    assert before.pid == mesh.shards[1].process.pid
    assert before.weights_digest != mesh.shards[0].status().weights_digest
    assert os.environ[SECRET_ENV] not in repr(before)
    router, batch = mesh.router(router_id="counted"), random_batch(9)
    run(router, 0, batch)
    after = mesh.shards[1].status()
    assert after.requests == before.requests + 1
    assert after.rows == before.rows + int((batch.ids_TK >= 3).any(1).sum())
    assert after.pairs == before.pairs + int((batch.ids_TK >= 3).sum())
    assert "counted" in after.routers
    router.close()
    await_true(lambda: "counted" not in mesh.shards[1].status().routers, "the router's leaving")


def test_a_shard_is_given_a_placement_once_and_only_what_it_can_hold(model: Path, tmp_path: Path) -> None:
    placement = Placement.linear(NUM_LAYERS, NUM_EXPERTS, 2)

    def server(**settings: Any) -> ShardServer:
        values = {"model_path": str(model), "dtype": "float32", "kernel": "torch_loop", **settings}
        return ShardServer(ShardSettings(**values))

    with pytest.raises(RuntimeError, match=r"is not started yet; call start\(\) first"):
        server().status()
    with pytest.raises(ValueError, match="rank is 2, expected one of the placement's ranks, 0 to 1"):
        server().start(placement, 2, 1)
    with pytest.raises(ValueError, match="slots_per_rank is 2, the placement needs at least 3"):
        server(slots_per_rank=2).start(placement, 0, 1)
    with pytest.raises(ValueError, match="the placement is for 3 layers"):
        server().start(Placement.linear(3, NUM_EXPERTS, 2), 0, 1)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        server(model_path=str(tmp_path)).start(placement, 0, 1)
    running = server()
    running.start(placement, 0, 1)
    with pytest.raises(RuntimeError, match="was started before"):
        running.start(placement, 0, 1)
    running.stop()
    running.stop()
    assert not running.status().alive


def test_stopping_a_shard_is_seen_by_its_routers(model: Path) -> None:
    with mesh_of(model, replicated(NUM_LAYERS, NUM_EXPERTS, 2, 2)) as mesh:
        router, batch = mesh.router(), random_batch(6)
        mesh.shards[0].call("stop")
        assert_matches(run(router, 0, batch), oracle(mesh.checkpoint, 0, batch))
        assert_matches(run(router, 0, batch), oracle(mesh.checkpoint, 0, batch))
        assert list(router.status().lost) == [0]


def test_the_command_line_prints_its_endpoint_and_ends_with_its_parent(model: Path, tmp_path: Path) -> None:
    placement = Placement.linear(NUM_LAYERS, NUM_EXPERTS, 1)
    placement.save(tmp_path / "placement.json")
    settings = json.dumps({"model_path": str(model), "dtype": "float32", "kernel": "torch_loop"})
    command = [sys.executable, "-m", "experts.shard.server", "--settings", settings, "--rank", "0"]
    command += ["--placement", str(tmp_path / "placement.json"), "--epoch", "3", "--until-stdin-closes"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    try:
        assert process.stdout is not None
        assert select.select([process.stdout], [], [], 60)[0], "the shard printed no endpoint"
        endpoint = ShardEndpoint(**json.loads(process.stdout.readline()))
        assert (endpoint.rank, endpoint.pid) == (0, process.pid)
        link = open_link(model, endpoint)
        check_serves(link, model)
        maps = Path(f"/proc/{process.pid}/maps").read_text()
        assert "/vllm/" not in maps, "a shard needs vllm only if its kernel comes from vllm"
        _, log = process.communicate(timeout=60)  # closes stdin
        assert process.returncode == 0
        assert b"12 of 12 experts loaded" in log
        assert b"router by-hand connected" in log
        assert os.environ[SECRET_ENV].encode() not in log
        with pytest.raises(Exception, match="shard 0"):
            ask(link, pack(link.send_buffer, 1, [0]))
        link.close()
    finally:
        process.kill()
        process.wait(10)


def test_an_unknown_setting_is_an_error_that_names_it(model: Path) -> None:
    with pytest.raises(ValueError, match=r"num_thread\b"):
        ShardSettings(model_path=str(model), dtype="float32", num_thread=2)  # type: ignore[call-arg]
