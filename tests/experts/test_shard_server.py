"""One shard: what it refuses and survives, what it reports, and slots that change while it serves."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_mesh import (
    Mesh,
    assert_matches,
    await_true,
    local,
    mesh_of,
    oracle,
    random_batch,
    replicated,
    run,
    write_checkpoint,
)

from experts.checkpoint import CheckpointError
from experts.errors import ShardRejectedError
from experts.kernels import ExpertKernel, KernelShape
from experts.link import RouterLink, ShardChannel
from experts.membership import ShardEndpoint
from experts.settings import ShardSettings
from experts.shard_loop import ShardLoop
from experts.shard_server import ShardServer
from experts.slots import SlotTable
from experts.transports.connect import connect
from experts.transports.control import Hello
from experts.transports.shm import ShmDoorbell
from experts.wire import (
    DTYPE_CODES,
    H_DTYPE,
    H_HIDDEN,
    H_LAYER,
    H_MAGIC,
    H_PAIRS,
    H_ROWS,
    H_SEQ,
    H_STATUS,
    HEADER_BYTES,
    MAGIC,
    STATUS_OK,
    STATUS_REJECTED,
    error_text,
    header_of,
    request_layout,
)
from placement.tables import Placement

NUM_LAYERS, NUM_EXPERTS, TOP_K, HIDDEN = 2, 6, 3, 24
ROW_BYTES = 4 * HIDDEN
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def mesh(model: Path) -> Iterator[Mesh]:
    """Two shards of three experts a layer."""
    with mesh_of(model, Placement.linear(NUM_LAYERS, NUM_EXPERTS, 2)) as mesh:
        yield mesh


def hello_with(endpoint: ShardEndpoint, **changes: Any) -> Hello:
    fields = {
        "router_id": "by-hand",
        "transport": "shm",
        "incarnation": endpoint.incarnation,
        "dtype": "float32",
        "hidden_size": HIDDEN,
        "top_k": TOP_K,
        "num_layers": NUM_LAYERS,
        "request_capacity": 1 << 16,
        "reply_capacity": 1 << 14,
    }
    return Hello(**{**fields, **changes})


def open_link(endpoint: ShardEndpoint, **changes: Any) -> RouterLink:
    return connect(endpoint, hello_with(endpoint, **changes), "cpu", 20.0, time.monotonic() + 30)


@pytest.fixture
def link(mesh: Mesh) -> Iterator[RouterLink]:
    link = open_link(mesh.shards[0].endpoint)
    yield link
    link.close()


def pack(link: RouterLink, seq: int, experts: list[int], layer: int = 0, x_D: torch.Tensor | None = None) -> int:
    """One row that wants `experts`, each at weight 1, in the link's send buffer; returns the length."""
    buffer = link.send_buffer
    offsets_at, experts_at, weights_at, rows_at, nbytes = request_layout(1, len(experts), ROW_BYTES)
    header = header_of(buffer)
    header[:] = 0
    header[H_MAGIC], header[H_SEQ], header[H_LAYER] = MAGIC, seq, layer
    header[H_ROWS], header[H_PAIRS] = 1, len(experts)
    header[H_DTYPE], header[H_HIDDEN] = DTYPE_CODES[torch.float32], HIDDEN
    buffer[offsets_at : offsets_at + 8].view(np.int32)[:] = [0, len(experts)]
    buffer[experts_at : experts_at + 4 * len(experts)].view(np.int32)[:] = experts
    buffer[weights_at : weights_at + 4 * len(experts)].view(np.float32)[:] = 1
    row = torch.ones(HIDDEN) if x_D is None else x_D
    buffer[rows_at:nbytes].view(np.float32)[:] = row.numpy()
    return nbytes


def ask(link: RouterLink, nbytes: int) -> np.ndarray:
    """The header of the answer."""
    link.post(nbytes)
    link.wait(time.monotonic() + 30)
    return header_of(link.recv_buffer)


def check_serves(link: RouterLink, model: Path, seq: int = 1000) -> None:
    """The next request is answered, and right."""
    x_D = torch.linspace(-1, 1, HIDDEN)
    header = ask(link, pack(link, seq, [0, 2], layer=1, x_D=x_D))
    assert (header[H_SEQ], header[H_STATUS], header[H_ROWS]) == (seq, STATUS_OK, 1)
    y_D = torch.from_numpy(link.recv_buffer[HEADER_BYTES : HEADER_BYTES + ROW_BYTES].view(np.float32))
    expected = local(model).forward(1, x_D[None], torch.ones(1, 2), torch.tensor([[0, 2]]))
    assert_matches(y_D[None], expected)


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
    "truncated": (lambda link, nbytes: nbytes - 1, "bytes, the message has"),
    "no header": (lambda link, nbytes: 5, "a message of 5 bytes, expected 128"),
    "nothing": (lambda link, nbytes: 0, "a message of 0 bytes"),
    "offsets": (spoil_offsets, "row offsets do not count up from 0 to 2"),
    "garbage": (spoil_all, "magic number"),
}


@pytest.mark.parametrize("kind", BAD_REQUESTS)
def test_a_bad_request_goes_back_and_the_loop_lives_on(mesh: Mesh, model: Path, link: RouterLink, kind: str) -> None:
    spoil, text = BAD_REQUESTS[kind]
    errors = mesh.shards[0].status()["errors"]
    header = ask(link, spoil(link, pack(link, 7, [0, 1])))
    assert header[H_STATUS] == STATUS_REJECTED
    assert error_text(link.recv_buffer).startswith("BadRequestError: ")
    assert text in error_text(link.recv_buffer)
    check_serves(link, model)
    status = mesh.shards[0].status()
    assert (status["errors"], status["alive"]) == (errors + 1, True)
    assert text in status["last_error"]


def test_an_expert_of_another_shard_is_named(mesh: Mesh, model: Path, link: RouterLink) -> None:
    header = ask(link, pack(link, 3, [0, 5], layer=1))
    assert (header[H_SEQ], header[H_STATUS]) == (3, STATUS_REJECTED)
    assert error_text(link.recv_buffer) == "BadRequestError: expert 5 of layer 1 has no slot on this shard"
    check_serves(link, model)


def test_rows_that_do_not_fit_the_reply_are_refused(mesh: Mesh, model: Path) -> None:
    small = open_link(mesh.shards[0].endpoint, reply_capacity=HEADER_BYTES + ROW_BYTES)
    check_serves(small, model)
    tight = open_link(mesh.shards[0].endpoint, reply_capacity=HEADER_BYTES + ROW_BYTES - 4)
    header = ask(tight, pack(tight, 1, [0]))
    assert header[H_STATUS] == STATUS_REJECTED
    assert error_text(tight.recv_buffer) == "BadRequestError: 1 rows do not fit the reply buffer"
    small.close()
    tight.close()


def test_buffers_too_small_for_a_header_cost_their_own_router_alone(mesh: Mesh, model: Path, link: RouterLink) -> None:
    with contextlib.suppress(ShardRejectedError):  # refused at the door is as well
        tiny = open_link(mesh.shards[0].endpoint, request_capacity=8, reply_capacity=8)
        tiny.post(8)
        with pytest.raises(Exception, match="shard 0"):
            tiny.wait(time.monotonic() + 30)
        tiny.close()
    check_serves(link, model)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"incarnation": "another"}, "this is incarnation .* the router wants another"),
        ({"dtype": "bfloat16"}, "router by-hand has dtype bfloat16, this shard has float32"),
        ({"hidden_size": 32}, "has hidden size 32, this shard has 24"),
        ({"num_layers": 3}, "has number of MoE layers 3, this shard has 2"),
        ({"request_capacity": 1 << 30}, r"wants messages of 1073741824 bytes, this shard takes up to \d+"),
        ({"reply_capacity": 1 << 30}, r"max_rows_per_dispatch 2048"),
    ],
)
def test_a_router_that_does_not_fit_is_refused_at_the_door(mesh: Mesh, changes: dict[str, Any], text: str) -> None:
    endpoint = mesh.shards[0].endpoint
    hello = hello_with(endpoint, **changes)
    # connect() fills in the endpoint's incarnation
    stale = ShardEndpoint(**{**endpoint.__dict__, "incarnation": hello.incarnation})
    with pytest.raises(ShardRejectedError, match=text):
        connect(stale, hello, "cpu", 20.0, time.monotonic() + 30)


def test_status_tells_what_was_done(mesh: Mesh, model: Path) -> None:
    before = mesh.shards[1].status()
    assert (before["rank"], before["epoch"], before["kernel"]) == (1, 1, "torch_loop")
    assert before["loaded_experts"] == NUM_LAYERS * 3
    assert before["loaded_bytes"] == NUM_LAYERS * 3 * 4 * 3 * HIDDEN * 40
    assert before["pid"] == mesh.shards[1].process.pid
    assert before["weights_digest"] != mesh.shards[0].status()["weights_digest"]
    router, batch = mesh.router(router_id="counted"), random_batch(9)
    run(router, 0, batch)
    after = mesh.shards[1].status()
    assert after["requests"] == before["requests"] + 1
    assert after["rows"] == before["rows"] + int((batch.ids_TK >= 3).any(1).sum())
    assert after["pairs"] == before["pairs"] + int((batch.ids_TK >= 3).sum())
    assert "counted" in after["routers"]
    router.close()
    await_true(lambda: "counted" not in mesh.shards[1].status()["routers"], "the router's leaving")


def test_a_later_placement_is_loaded_while_the_old_one_is_served(model: Path) -> None:
    first = Placement.linear(NUM_LAYERS, NUM_EXPERTS, 2)
    flipped = np.flip(first.physical_to_logical_map.reshape(NUM_LAYERS, 2, 3), 1).reshape(NUM_LAYERS, 6)
    second = Placement(2, 1, NUM_EXPERTS, flipped.copy())
    batch = random_batch(12)
    with mesh_of(model, first, slots_per_rank=6) as mesh:
        router = mesh.router()
        for shard in mesh.shards.values():
            assert shard.call("apply_placement", second.to_json(), 5) == {"loaded": NUM_LAYERS * 3, "epoch": 5}
        assert_matches(run(router, 0, batch), oracle(mesh.checkpoint, 0, batch))
        assert router.status()["lost"] == {}, "the old epoch is served until the slots are needed"
        mesh.placement, mesh.epoch = second, 5
        router.apply_membership(mesh.membership())
        assert_matches(run(router, 1, batch), oracle(mesh.checkpoint, 1, batch))
        assert router.status()["lost"] == {}
        shard = mesh.shards[0]
        with pytest.raises(ValueError, match="epoch 4 is older than this shard's 5"):
            shard.call("apply_placement", first.to_json(), 4)
        with pytest.raises(ValueError, match="the placement is for 2 layers of 8 experts, the checkpoint has 2 of 6"):
            shard.call("apply_placement", Placement.linear(NUM_LAYERS, 8, 2).to_json(), 6)
        assert shard.status()["epoch"] == 5


def test_a_shard_is_given_a_placement_once_and_only_what_it_can_hold(model: Path, tmp_path: Path) -> None:
    placement = Placement.linear(NUM_LAYERS, NUM_EXPERTS, 2)

    def server(**settings: Any) -> ShardServer:
        values = {"model_path": str(model), "dtype": "float32", "kernel": "torch_loop", **settings}
        return ShardServer(ShardSettings(**values))

    with pytest.raises(RuntimeError, match="was not started yet"):
        server().status()
    with pytest.raises(ValueError, match="rank 2 is not among the placement's ranks 0 to 1"):
        server().start(placement, 2, 1)
    with pytest.raises(ValueError, match="slots_per_rank is 2, the placement needs 3"):
        server(slots_per_rank=2).start(placement, 0, 1)
    with pytest.raises(ValueError, match="the placement is for 3 layers"):
        server().start(Placement.linear(3, NUM_EXPERTS, 2), 0, 1)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        server(model_path=str(tmp_path)).start(placement, 0, 1)
    running = server()
    running.start(placement, 0, 1)
    with pytest.raises(RuntimeError, match="was started before, as rank 0"):
        running.start(placement, 0, 1)
    running.stop()
    running.stop()
    assert not running.status()["alive"]


def test_stopping_a_shard_is_seen_by_its_routers(model: Path) -> None:
    with mesh_of(model, replicated(NUM_LAYERS, NUM_EXPERTS, 2, 2)) as mesh:
        router, batch = mesh.router(), random_batch(6)
        mesh.shards[0].call("stop")
        assert_matches(run(router, 0, batch), oracle(mesh.checkpoint, 0, batch))
        assert_matches(run(router, 0, batch), oracle(mesh.checkpoint, 0, batch))
        assert list(router.status()["lost"]) == [0]


def test_the_command_line_prints_its_endpoint_and_ends_with_its_parent(model: Path, tmp_path: Path) -> None:
    placement = Placement.linear(NUM_LAYERS, NUM_EXPERTS, 1)
    placement.save(tmp_path / "placement.json")
    settings = json.dumps({"model_path": str(model), "dtype": "float32", "kernel": "torch_loop"})
    command = [sys.executable, "-m", "experts.shard_server", "--settings", settings, "--rank", "0"]
    command += ["--placement", str(tmp_path / "placement.json"), "--epoch", "3", "--until-stdin-closes"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    try:
        assert process.stdout is not None
        endpoint = ShardEndpoint(**json.loads(process.stdout.readline()))
        assert (endpoint.rank, endpoint.pid) == (0, process.pid)
        link = open_link(endpoint)
        check_serves(link, model)
        maps = Path(f"/proc/{process.pid}/maps").read_text()
        assert "/vllm/" not in maps, "a shard needs vllm only where its kernel comes from there"
        _, log = process.communicate(timeout=60)  # closes stdin
        assert process.returncode == 0
        assert b"12 of 12 experts loaded" in log
        assert b"router by-hand connected" in log
        with pytest.raises(Exception, match="shard 0"):
            ask(link, pack(link, 1, [0]))
        link.close()
    finally:
        process.kill()
        process.wait()


def test_an_unknown_setting_is_an_error_that_names_it(model: Path) -> None:
    with pytest.raises(ValueError, match=r"num_thread\b"):
        ShardSettings(model_path=str(model), dtype="float32", num_thread=2)  # type: ignore[call-arg]


# --- the loop itself ----------------------------------------------------------------------------------------------


class FakeChannel(ShardChannel):
    """A router in the same thread: one request at a time."""

    def __init__(self, router_id: str) -> None:
        self.router_id = router_id
        self.recv_buffer = np.zeros(1 << 14, np.uint8)
        self.send_buffer = np.zeros(1 << 14, np.uint8)
        self.waiting = -1
        self.answers: list[int] = []
        self.broken: Exception | None = None

    def poll(self) -> int:
        nbytes, self.waiting = self.waiting, -1
        if nbytes >= 0 and self.broken is not None:
            raise self.broken
        return nbytes

    def reply(self, nbytes: int) -> None:
        self.answers.append(nbytes)

    def close(self) -> None:
        self.closed = True


class GatedKernel(ExpertKernel):
    """Writes the slot's stamp before and after a gate; a request that saw its slot refilled has two different ones."""

    name = "gated"

    @classmethod
    def supports(cls, shape: KernelShape) -> str | None:
        return None

    def __init__(self, shape: KernelShape) -> None:
        super().__init__(shape)
        self.stamps_LS = np.zeros((shape.num_layers, shape.num_slots))
        self.inside, self.gate = threading.Event(), threading.Event()
        self.gate.set()
        self.error: Exception | None = None

    def _pack(self, layer: int, slot: int, weights: Any) -> None:
        self.stamps_LS[layer, slot] = float(weights.w13_2ID[0, 0])

    def _weight_tensors(self) -> list[torch.Tensor]:
        return []

    def forward(self, layer: int, rows_MD: Any, offsets: Any, slots_N: Any, weights_N: Any, out_MD: Any) -> None:
        if self.error is not None:
            raise self.error
        out_MD[:, 0] = self.stamps_LS[layer, slots_N[0]]
        self.inside.set()
        assert self.gate.wait(60)
        out_MD[:, 1] = self.stamps_LS[layer, slots_N[0]]


@pytest.fixture
def gated(model: Path) -> Iterator[tuple[ShardLoop, GatedKernel]]:
    """A loop whose 3 slots a layer hold the experts 0 to 2."""
    checkpoint = Mesh(model, Placement.linear(NUM_LAYERS, NUM_EXPERTS, 2), {}).checkpoint
    spec = checkpoint.spec
    shape = KernelShape(NUM_LAYERS, 3, HIDDEN, spec.intermediate_size, spec.activation)
    kernel = GatedKernel(shape)
    slots = SlotTable(checkpoint, kernel, 3, torch.float32)
    slots.load(Placement.linear(NUM_LAYERS, NUM_EXPERTS, 2), 0)
    loop = ShardLoop(slots, kernel, ShmDoorbell(0), torch.float32, 1)
    loop.start()
    yield loop, kernel
    kernel.gate.set()
    loop.stop()


def post(loop: ShardLoop, channel: FakeChannel, seq: int, experts: list[int]) -> None:
    class Ends:
        send_buffer = channel.recv_buffer

    channel.waiting = pack(Ends, seq, experts)  # type: ignore[arg-type]
    loop.bell.ring()


def test_a_slot_in_use_is_refilled_only_when_its_request_is_done(gated: tuple[ShardLoop, GatedKernel]) -> None:
    loop, kernel = gated
    channel = FakeChannel("router")
    loop.add(channel)
    kernel.inside.clear()
    kernel.gate.clear()
    stamp = kernel.stamps_LS[0, loop.slots.slot_of_expert_LE[0, 1]]
    post(loop, channel, 1, [1])
    assert kernel.inside.wait(60)
    other = Placement.linear(NUM_LAYERS, NUM_EXPERTS, 2)
    loading = threading.Thread(target=loop.slots.load, args=(other, 1))
    loading.start()
    await_true(lambda: (loop.slots.slot_of_expert_LE[0] < 0).sum() > 3, "the first expert's leaving the table")
    loading.join(0.05)
    assert loading.is_alive(), "the slot was refilled under the request"
    kernel.gate.set()
    loading.join(60)
    assert not loading.is_alive()
    await_true(lambda: channel.answers, "the answer")
    row = channel.send_buffer[HEADER_BYTES : HEADER_BYTES + 8].view(np.float32)
    np.testing.assert_array_equal(row, np.float32([stamp, stamp]))
    assert (loop.slots.slot_of_expert_LE >= 0).tolist() == [[False] * 3 + [True] * 3] * NUM_LAYERS


def test_a_kernel_that_fails_is_reported_to_the_sender_and_not_the_end(gated: tuple[ShardLoop, GatedKernel]) -> None:
    loop, kernel = gated
    channel = FakeChannel("router")
    loop.add(channel)
    kernel.error = RuntimeError("out of memory")
    post(loop, channel, 1, [0])
    await_true(lambda: len(channel.answers) == 1, "the error")
    assert header_of(channel.send_buffer)[H_STATUS] == STATUS_REJECTED
    assert error_text(channel.send_buffer) == "RuntimeError: out of memory"
    kernel.error = None
    post(loop, channel, 2, [0])
    await_true(lambda: len(channel.answers) == 2, "the answer")
    header = header_of(channel.send_buffer)
    assert (header[H_SEQ], header[H_STATUS]) == (2, STATUS_OK)


def test_a_broken_pair_ends_its_own_service_alone(gated: tuple[ShardLoop, GatedKernel]) -> None:
    loop, _ = gated
    broken, sound = FakeChannel("broken"), FakeChannel("sound")
    broken.broken = OSError("connection reset")
    loop.add(broken)
    loop.add(sound)
    broken.waiting = 1
    post(loop, sound, 1, [0])
    await_true(lambda: sound.answers and broken.closed, "the sound router's answer")
    assert loop.alive
    assert "router broken: connection reset" in str(loop.counters.last_error)
    loop.remove(broken)
    assert loop.router_ids == ["sound"]


def test_slots_that_do_not_suffice_are_named(gated: tuple[ShardLoop, GatedKernel]) -> None:
    loop, _ = gated
    with pytest.raises(ValueError, match="layer 0 wants more experts than the 3 slots of this shard"):
        loop.slots.load(Placement.linear(NUM_LAYERS, NUM_EXPERTS, 1), 0)


def test_the_digest_tells_other_weights_apart(model: Path, tmp_path: Path) -> None:
    def digest_of(folder: Path, rank: int = 0) -> str:
        placement = Placement.linear(NUM_LAYERS, NUM_EXPERTS, 2)
        checkpoint = Mesh(folder, placement, {}).checkpoint
        shape = KernelShape(NUM_LAYERS, 3, HIDDEN, 40, checkpoint.spec.activation)
        slots = SlotTable(checkpoint, GatedKernel(shape), 3, torch.float32)
        slots.load(placement, rank)
        return slots.digest()

    other = write_checkpoint(tmp_path / "other", seed=1)
    assert digest_of(model) == digest_of(model)
    assert len({digest_of(model), digest_of(model, 1), digest_of(other)}) == 3
