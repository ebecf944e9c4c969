"""Copies that are refused or called off, and dispatches while experts come and go; float64 decides."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import pytest

from experts.protocol.orders import CopyOrder, CopyResult
from experts.shard.server import ShardServer
from tests.support.copying_shards import (
    HIDDEN,
    NUM_EXPERTS,
    NUM_LAYERS,
    PAIRS,
    SLOW,
    WIDTH,
    check_right,
    copy,
    elsewhere,
    orders,
    placement,
    server,
)
from tests.support.small_mesh import (
    Mesh,
    Shard,
    assert_matches,
    mesh_of,
    oracle,
    random_batch,
    run,
    write_checkpoint,
)
from tests.support.waiting import await_true, join


def test_strangers_and_other_layouts_are_refused_and_the_checkpoint_is_read(
    model: Path, sources: dict[int, Shard], target: ShardServer, tmp_path: Path
) -> None:
    restarted = dataclasses.replace(sources[0].endpoint, incarnation="an earlier life")
    nobody = dataclasses.replace(sources[0].endpoint, port=1)
    other = write_checkpoint(
        tmp_path / "other", num_experts=NUM_EXPERTS, hidden_size=HIDDEN, intermediate_size=WIDTH, seed=1
    )
    with server(model, 0, kernel="native") as native, server(other, 1) as stranger:
        assert native.endpoint is not None
        assert stranger.endpoint is not None
        pairs = [(0, 0), (0, 1), (0, 2), (0, 3)]
        wanted = [
            CopyOrder(*pair, (endpoint,))
            for pair, endpoint in zip(pairs, (restarted, nobody, native.endpoint, stranger.endpoint), strict=True)
        ]
        assert [(r.source, r.error) for r in copy(target, wanted)] == [("checkpoint", "")] * 4
        assert (native.status().handed_out, stranger.status().handed_out) == (0, 0)
    assert {r.source for r in copy(target, orders(sources[0].endpoint, pairs=PAIRS[4:]))} == {"process"}
    check_right(target, model)


def test_a_cancelled_copy_leaves_no_slot_behind_and_can_be_repeated(
    model: Path, sources: dict[int, Shard], target: ShardServer
) -> None:
    results: list[CopyResult] = []
    wanted = orders(sources[0].endpoint)
    target.copy(wanted, results.append, max_bytes_per_s=SLOW, cancelled=lambda: bool(results))
    done = {(r.layer, r.expert) for r in results if not r.error}
    assert {r.error for r in results if r.error} == {"cancelled"}
    assert 1 <= len(done) < len(PAIRS)
    status = target.status()
    assert (status.loaded_experts, status.free_slots) == (len(done), len(PAIRS) - len(done))
    copy(target, wanted)
    check_right(target, model)


def test_no_more_than_so_many_readers(
    model: Path, sources: dict[int, Shard], target: ShardServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experts.shard.hand_out.MAX_READERS", 1)
    with server(model, 0) as source, server(model, 2) as first:
        assert source.endpoint is not None
        assert {r.source for r in copy(first, orders(source.endpoint, pairs=PAIRS[:1]))} == {"process"}
        assert {r.source for r in copy(target, orders(source.endpoint, pairs=PAIRS[:1]))} == {"checkpoint"}
        first.stop()
        await_true(
            lambda: (
                "process" in {r.source for r in copy(target, orders(source.endpoint, pairs=PAIRS[1:2]))}
                or not target.release(PAIRS[1:2])
            ),
            "room for another reader",
        )


def test_dispatches_are_answered_right_while_experts_come_and_go(model: Path) -> None:
    """Shard 0 serves experts 0 to 2 and all the while copies and releases the others; shard 1 is the source."""
    wide = placement([0, 1, 2, -1, -1, -1], [0, 1, 2, 3, 4, 5])
    served = placement([0, 1, 2, -1, -1, -1], [3, 4, 5, -1, -1, -1])
    mesh: Mesh
    with mesh_of(model, wide) as mesh:
        router = mesh.router(apply=False)
        answer = router.apply_membership(dataclasses.replace(mesh.membership(), placement=served))
        assert answer.lost == {}
        target, source = mesh.shards[0], mesh.shards[1].endpoint
        others = [(layer, expert) for layer in range(NUM_LAYERS) for expert in (3, 4, 5)]
        rounds: list[set[str]] = []
        over = threading.Event()

        def move() -> None:
            while not over.is_set():
                place = (source, elsewhere(source))[len(rounds) % 2]
                rounds.append({f"{r.source}{r.error}" for r in target.copy(orders(place, pairs=others))})
                assert target.call("release", others) == len(others)

        mover = threading.Thread(target=move, daemon=True)
        mover.start()
        expected = {}
        for number in range(60):
            layer, seed = number % NUM_LAYERS, number % 6
            batch = random_batch(16, num_experts=NUM_EXPERTS, hidden_size=HIDDEN, seed=seed)
            if (layer, seed) not in expected:
                expected[layer, seed] = oracle(mesh.checkpoint, layer, batch)
            assert_matches(run(router, layer, batch), expected[layer, seed])
        await_true(lambda: len(rounds) >= 2 or not mover.is_alive(), "two rounds of copies")
        over.set()
        join(mover, "the last round")
        assert rounds[:2] == [{"process"}, {"tcp"}]
        status = router.status()
        assert (status.lost, status.fallback_pairs, status.failovers) == ({}, 0, 0)
        held = target.call("held_Ls")
        assert sorted(held[0].tolist()) == [-1, -1, -1, 0, 1, 2]
