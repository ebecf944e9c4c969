"""A dispatcher's compiled form against its Python form: the same batches, the same faults, the same bits and counts."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experts.dispatch.dispatcher import Dispatcher
from experts.dispatch.rows import pick
from experts.dispatch.rows.host_mover import HostRowMover
from experts.dispatch.rows.native_mover import NativeRowMover
from experts.native.library import data_plane
from experts.protocol.membership import Membership
from placement.placement import Placement
from tests.support.fake_links import WAIT_FAULTS, FakeLink, FakeMesh, fake_mesh, unhurried
from tests.support.shm_fakes import behind_shared_memory
from tests.support.small_mesh import Batch, assert_matches, one_process, random_batch, replicated, write_checkpoint

pytestmark = pytest.mark.skipif(data_plane() is None, reason="no C++ compiler")

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
NUM_RANKS, MAX_ROWS = 3, 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"))


def unlike(replicas: int) -> Placement:
    """With two replicas on ranks of unlike speeds, else on ranks that are alike."""
    return replace(replicated(2, 6, NUM_RANKS, replicas), speeds=(1.0, 0.3, 2.0) if replicas == 2 else None)


@contextmanager
def compiled_mesh(model: Path, replicas: int, dtype: torch.dtype, timeout_s: float = 20.0) -> Iterator[FakeMesh]:
    """Fakes behind shared memory, and a dispatcher that knows only that."""
    placement = unlike(replicas)
    mesh = fake_mesh(model, placement, max_rows=MAX_ROWS, dtype=dtype)
    dispatcher = Dispatcher(mesh.dispatcher.shape, MAX_ROWS, timeout_s, unhurried(model, dtype))
    with behind_shared_memory(mesh.links) as links:
        dispatcher.apply(Membership(1, placement, (None,) * NUM_RANKS), dict(links), {})
        assert isinstance(dispatcher.mover, NativeRowMover)
        yield FakeMesh(dispatcher, mesh.links)


@contextmanager
def python_mesh(model: Path, replicas: int, dtype: torch.dtype) -> Iterator[FakeMesh]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pick, "data_plane", lambda: None)
        mesh = fake_mesh(model, unlike(replicas), max_rows=MAX_ROWS, dtype=dtype)
    assert type(mesh.dispatcher.mover) is HostRowMover
    yield mesh


def outcome(mesh: FakeMesh, batches: list[Batch], faults: dict[int, list[Any]]) -> dict[str, Any]:
    for rank, names in faults.items():
        mesh.links[rank].wait_faults = [None if name is None else WAIT_FAULTS[name][0] for name in names]
    sums = [mesh.forward(batch, layer).clone() for layer, batch in enumerate(batches)]
    stats = mesh.dispatcher.stats
    return {
        "bits": [y_TD.view(torch.int32 if y_TD.dtype == FLOAT32 else torch.int16).tolist() for y_TD in sums],
        "counts": (stats.rows, stats.fan_out_sum, stats.failovers, stats.fallback_pairs, stats.bytes_sent),
        "received": stats.bytes_received,
        "by rank": (stats.shard_rows.tolist(), stats.shard_pairs.tolist()),
        "stages": [stage.count for stage in (stats.plan_pack, stats.wait, stats.combine)],
        "sums": [stage.buckets.sum() for stage in (stats.plan_pack, stats.wait, stats.combine)],
        "lost": sorted(mesh.dispatcher.lost),
        "answered": stats.last_success_s is not None,
        "loads": mesh.dispatcher.mover._load_LR.tolist(),  # type: ignore[attr-defined]
    }


# Those that end a wait at once, so that no example waits for a deadline.
QUICK_FAULTS = [None, *(name for name in WAIT_FAULTS if name != "silent")]


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_both_forms_come_to_the_same_bits_and_counts(model: Path, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([FLOAT32, BFLOAT16]))
    replicas = data.draw(st.integers(1, NUM_RANKS))
    sizes = data.draw(st.tuples(*[st.sampled_from([0, 1, 2, 7, 8, 9, 20])] * 2))
    seed = data.draw(st.integers(0, 1000))
    faults = data.draw(
        st.dictionaries(st.integers(0, NUM_RANKS - 1), st.lists(st.sampled_from(QUICK_FAULTS), max_size=4), max_size=2)
    )
    batches = [random_batch(size, dtype=dtype, seed=seed + i) for i, size in enumerate(sizes)]
    for batch in batches:
        batch.ids_TK[torch.rand(batch.ids_TK.shape, generator=torch.Generator().manual_seed(seed)) < 0.1] = -1
    with python_mesh(model, replicas, dtype) as mesh:
        expected = outcome(mesh, batches, faults)
    with compiled_mesh(model, replicas, dtype) as mesh:
        assert outcome(mesh, batches, faults) == expected


@pytest.mark.parametrize("fault", sorted(WAIT_FAULTS))
def test_each_fault_costs_its_shard_and_no_row(model: Path, fault: str) -> None:
    with compiled_mesh(model, 2, FLOAT32, timeout_s=3.0 if fault == "silent" else 20.0) as mesh:
        batch = random_batch(6)
        mesh.links[1].wait_faults = [WAIT_FAULTS[fault][0]]
        expected_TD = one_process(model).forward(0, batch.x_TD, batch.weights_TK, batch.ids_TK)
        assert_matches(mesh.forward(batch), expected_TD)
        assert list(mesh.dispatcher.lost) == [1]
        assert_matches(mesh.forward(batch), expected_TD)


@pytest.mark.parametrize("form", [compiled_mesh, python_mesh])
def test_a_stale_choice_of_a_lost_rank_is_a_failure_and_touches_no_memory(model: Path, form: Any) -> None:
    """Tables that still name a rank whose link is gone: its rows are computed elsewhere, its buffers are left alone."""
    with form(model, 2, FLOAT32) as mesh:
        dispatcher, batch = mesh.dispatcher, random_batch(6)
        expected_TD = one_process(model).forward(0, batch.x_TD, batch.weights_TK, batch.ids_TK)
        mesh.links[0].wait_faults = [WAIT_FAULTS["lost"][0]]
        stale_LER = dispatcher._slots.chosen_from_LER.copy()
        link = dispatcher.links[0]
        assert_matches(mesh.forward(batch), expected_TD)
        assert list(dispatcher.lost) == [0]
        link.send_buffer[:] = 0xEE  # freed, in a process that keeps no reference
        dispatcher._slots.chosen_from_LER[:] = stale_LER
        assert_matches(mesh.forward(batch), expected_TD)
        assert (link.send_buffer == 0xEE).all()
        assert dispatcher.stats.failovers == 2


def test_the_memory_of_a_lost_link_is_freed(model: Path) -> None:
    with compiled_mesh(model, 2, FLOAT32) as mesh:
        mesh.links[0].wait_faults = [WAIT_FAULTS["lost"][0]]
        batch = random_batch(6)
        mesh.forward(batch)
        mover = mesh.dispatcher.mover
        assert isinstance(mover, NativeRowMover)
        for table_R in (mover._send_address_R, mover._reply_address_R, mover._link_address_R):
            assert [bool(address) for address in table_R] == [False, True, True]


def test_links_without_a_compiled_form_are_posted_and_waited_for_by_python(model: Path) -> None:
    """The rest is compiled all the same, also where only some of the links are."""
    with compiled_mesh(model, 1, FLOAT32) as mesh:
        dispatcher, batch = mesh.dispatcher, random_batch(7)
        links: dict[int, Any] = {**dispatcher.links, 1: mesh.links[1]}
        assert isinstance(links[1], FakeLink)
        membership = dispatcher.membership
        assert membership is not None
        fresh = Dispatcher(dispatcher.shape, MAX_ROWS, 20.0, None)
        fresh.apply(dataclasses.replace(membership, epoch=2), links, {})
        expected_TD = one_process(model).forward(0, batch.x_TD, batch.weights_TK, batch.ids_TK)
        got_TD = fresh.forward(0, batch.x_TD, batch.weights_TK, batch.ids_TK)
        assert_matches(got_TD, expected_TD)
        assert len(mesh.links[1].posted) == 1
        gc.collect()
