"""Shards that keep some experts in memory answer what shards with all of them do, while experts come, go and move."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experts.kernels.native.kernel import NativeKernel
from experts.protocol.membership import Membership
from experts.protocol.settings import OffloadSettings, ShardSettings
from experts.protocol.wire import H_HINTS, HEADER_WORDS, HINTED_EXPERTS, hint_words, hinted_experts
from experts.shard.kernels import fill_hot_first, places_of
from experts.shard.server import ShardServer
from tests.support.copying_shards import ALL, NUM_EXPERTS, NUM_LAYERS, PAIRS, check_right, copy, orders
from tests.support.kernel_cases import BASE
from tests.support.small_mesh import (
    Batch,
    Mesh,
    Shard,
    make_router,
    mesh_of,
    random_batch,
    replicated,
    run,
    write_checkpoint,
)
from tests.support.waiting import await_true

KERNELS = ["torch_loop"] + ["native"] * (NativeKernel.supports(BASE) is None)
TINY = {"resident_fraction": 0.01}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("small"), num_layers=3)


def rows_of(mesh: Mesh, routers: int, steps: int) -> list[torch.Tensor]:
    """What routers get that ask at the same time, each in a thread."""
    found: list[list[torch.Tensor]] = [[] for _ in range(routers)]
    clients = [mesh.router() for _ in range(routers)]

    def ask(number: int) -> None:
        for step in range(steps):
            for layer in range(3):
                # Each token of a stream has the experts of the one before it, mostly.
                batch = random_batch([1, 1, 0, 1, 7, 60][step % 6], seed=10 * number + step // 8)
                found[number].append(run(clients[number], layer, batch).clone())

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(routers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for client in clients:
        assert (client.status().lost, client.status().fallback_pairs) == ({}, 0)
    return [rows for each in found for rows in each]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("offload", [TINY, {"resident_fraction": 0.5}, {"resident_fraction": 0.6, "prefetch": False}])
def test_rows_are_those_of_shards_with_all_experts_in_memory(small: Path, kernel: str, offload: dict[str, Any]) -> None:
    placement = replicated(3, 6, 2, 1)
    with mesh_of(small, placement, kernel=kernel) as whole:
        expected = rows_of(whole, 2, 24)
    with mesh_of(small, placement, kernel=kernel, offload=offload) as mesh:
        got = rows_of(mesh, 2, 24)
        statuses = [shard.status() for shard in mesh.shards.values()]
    for mine, theirs in zip(got, expected, strict=True):
        if kernel == "native":
            assert torch.equal(mine, theirs)
        else:
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    for status in statuses:
        told = status.offload
        assert told is not None
        assert (status.errors, status.loaded_experts, told.kernel) == (0, 9, kernel)
        assert told.resident_bytes <= told.room_bytes
        assert min(told.misses, told.copied_bytes, told.wait_seconds) > 0
        assert (told.prefetched > 0) == offload.get("prefetch", True)
        assert told.prefetches_wasted <= told.prefetched


def offloading(model: Path, rank: int, **offload: Any) -> ShardServer:
    given = OffloadSettings(**(TINY | offload))
    server = ShardServer(ShardSettings(model_path=str(model), dtype="float32", kernel="torch_loop", offload=given))
    server.start(ALL, rank, 1)
    return server


def test_experts_are_copied_into_it_and_out_of_it_while_they_come_and_go(
    model: Path, sources: dict[int, Shard]
) -> None:
    """From a shard with all in memory to one without, and from there to another one."""
    first, second = offloading(model, 2), offloading(model, 2)
    try:
        assert sources[0].endpoint is not None
        assert first.endpoint is not None
        assert {result.error for result in copy(first, orders(sources[0].endpoint))} == {""}
        check_right(first, model)
        results: list[Any] = []
        copies = threading.Thread(target=lambda: results.extend(copy(second, orders(first.endpoint))))
        copies.start()
        while copies.is_alive():
            check_right(first, model)
        copies.join()
        assert {(result.source, result.error) for result in results} == {("process", "")}
        check_right(second, model)
        assert second.release(PAIRS[:4]) == 4
        await_true(lambda: second.status().free_slots == 4, "the release")
        copy(second, orders(first.endpoint, pairs=PAIRS[:4]))
        check_right(second, model)
        status = second.status()
        assert status.offload is not None
        assert (status.loaded_experts, status.offload.resident_experts) == (NUM_LAYERS * NUM_EXPERTS, NUM_LAYERS)
    finally:
        first.stop()
        second.stop()


def test_recorded_loads_say_which_experts_are_there_first(small: Path) -> None:
    """Divided by replicas, since this shard gets its part of the tokens."""
    placement, offload = replicated(3, 6, 1, 1), OffloadSettings(resident_fraction=0.5)
    load_LE = np.array([[1, 9, 2, 8, 3, 7], [5, 4, 3, 2, 1, 0], [0, 0, 6, 0, 6, 7]], np.float64)
    server = ShardServer(ShardSettings(model_path=str(small), dtype="float32", kernel="torch_loop", offload=offload))
    server.load(placement, 0, load_LE=load_LE)
    try:
        assert server._loop is not None
        kernel: Any = server._loop.kernel
        for layer, hot in enumerate([{1, 3, 5}, {0, 1, 2}, {2, 4, 5}]):
            slots = server._loop.slots.slot_of_expert_LE[layer]
            assert {e for e in range(6) if kernel.residency.is_in(layer, slots[e])} == hot
        with pytest.raises(ValueError, match=r"loads are of \(3, 5\) layers and experts, the model has \(3, 6\)"):
            fill_hot_first(kernel, server._loop.slots, placement, load_LE[:, :5])
    finally:
        server._loop.kernel.close()


def test_hot_experts_are_there_first(small: Path) -> None:
    """Those with replicas, then the others in order."""
    placement = replicated(3, 6, 3, 1)
    map_LS = placement.physical_to_logical_map.copy()
    hot = int(map_LS[0, 1])
    given = ShardSettings(
        model_path=str(small), dtype="float32", kernel="torch_loop", offload=OffloadSettings(resident_fraction=0.4)
    )
    assert given.offload is not None
    wide = type(placement)(3, 1, 6, _with_replica(map_LS, hot))
    server = ShardServer(given)
    server.load(wide, 0)
    try:
        assert server._loop is not None
        slots, kernel = server._loop.slots, server._loop.kernel
        in_places = [layer.tolist() for layer in kernel.residency.place_of_slot_LS >= 0]  # type: ignore[attr-defined]
        slot_of_hot = int(slots.slot_of_expert_LE[0, hot])
        assert sum(in_places[0]) == places_of(given.offload, wide.slots_per_rank) == 2
        assert in_places[0][slot_of_hot]
    finally:
        server._loop.kernel.close()


def _with_replica(map_LS: Any, expert: int) -> Any:
    """Two more slots for each of three ranks; the last rank has a replica of `expert`."""
    ranks = np.split(map_LS, 3, axis=1)
    more = [np.full((len(map_LS), 2), -1, np.int32) for _ in ranks]
    more[2][:, 0] = expert
    return np.concatenate([part for pair in zip(ranks, more, strict=True) for part in pair], axis=1)


def test_all_resident_is_not_offloaded(small: Path) -> None:
    placement = replicated(3, 6, 1, 1)
    with mesh_of(small, placement, offload={"resident_fraction": 1.0}) as mesh:
        assert mesh.shards[0].status().offload is None


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_a_router_hints_at_is_there_when_it_is_asked_for(small: Path, kernel: str) -> None:
    """One expert of six is resident, so each of these would be a miss."""
    placement, given = replicated(3, 6, 1, 1), OffloadSettings(**TINY)
    server = ShardServer(ShardSettings(model_path=str(small), dtype="float32", kernel=kernel, offload=given))
    router = make_router(small)
    try:
        router.apply_membership(Membership(1, placement, (server.start(placement, 0, 1),)))
        assert server._loop is not None
        shard: Any = server._loop.kernel
        mover = router.dispatcher.mover
        assert mover.wants_hints
        slot_of_expert_E = server._loop.slots.slot_of_expert_LE[1]
        for expert in (4, 2, 5, 2):
            mover.hint(hint_words(np.array([expert])))
            run(router, 0, one_row_for(0))
            mover.hint(hint_words(np.empty(0, np.int64)))
            slot = int(slot_of_expert_E[expert])
            await_true(lambda slot=slot: shard.residency.is_in(1, slot), "the expert")  # type: ignore[misc]
            misses = shard.counts.misses
            run(router, 1, one_row_for(expert))
            assert shard.counts.misses == misses, expert
    finally:
        router.close()
        server.stop()


def one_row_for(expert: int) -> Batch:
    return replace(random_batch(1), ids_TK=torch.tensor([[expert, -1, -1]], dtype=torch.int32))


def test_shards_without_offloading_ask_for_no_hints(small: Path) -> None:
    with mesh_of(small, replicated(3, 6, 2, 1)) as mesh:
        assert not mesh.router().dispatcher.mover.wants_hints


@given(experts=st.sets(st.integers(0, HINTED_EXPERTS - 1)))
def test_hints_name_any_experts(experts: set[int]) -> None:
    words = hint_words(np.array(sorted(experts), np.int64))
    assert words.shape == (HEADER_WORDS - H_HINTS,)
    assert hinted_experts(words, HINTED_EXPERTS).tolist() == sorted(experts)
    assert hinted_experts(words, 7).tolist() == sorted(expert for expert in experts if expert < 7)
