"""The distributed form against the one-process form: with links that compute in place, and with real shards."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.checkpoint import ExpertCheckpoint
from experts.dispatch.dispatcher import Dispatcher
from experts.dispatch.layer_shape import LayerShape
from experts.protocol.membership import Membership
from experts.protocol.wire import H_PAIRS, header_of
from placement.placement import Placement
from tests.support.fake_links import WAIT_FAULTS, FakeLink, fake_mesh, lost, unhurried
from tests.support.small_mesh import (
    Batch,
    Mesh,
    assert_matches,
    in_processes,
    make_router,
    mesh_of,
    one_process,
    oracle,
    random_batch,
    replicated,
    run,
    write_checkpoint,
)

NUM_LAYERS, NUM_EXPERTS, TOP_K, HIDDEN = 2, 6, 3, 24
FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"))


def expected(model: Path, batch: Batch, layer: int = 0) -> torch.Tensor:
    return oracle(ExpertCheckpoint.open(model), layer, batch)


def linear() -> Placement:
    return Placement.linear(NUM_LAYERS, NUM_EXPERTS, 3)


def test_the_one_process_form_is_the_definition(model: Path) -> None:
    batch = random_batch(9)
    got_TD = one_process(model).forward(1, batch.x_TD, batch.weights_TK, batch.ids_TK)
    assert_matches(got_TD, expected(model, batch, layer=1))


@pytest.mark.parametrize("num_tokens", [0, 1, 7, 64, 65, 200])
def test_any_number_of_tokens(model: Path, num_tokens: int) -> None:
    mesh, batch = fake_mesh(model, linear()), random_batch(num_tokens)
    assert_matches(mesh.forward(batch, layer=1), expected(model, batch, layer=1))
    stats = mesh.dispatcher.stats
    assert (stats.rows, stats.dispatches, stats.fallback_pairs) == (num_tokens, 1, 0)
    assert stats.shard_pairs.sum() == num_tokens * TOP_K
    assert stats.shard_rows.sum() == stats.fan_out_sum
    assert max((len(link.posted) for link in mesh.links.values()), default=0) == -(-num_tokens // 64)


@pytest.mark.parametrize(("dtype", "tolerance"), [(BFLOAT16, 2**-6), (FLOAT16, 2**-9)])
@pytest.mark.parametrize("fault", [None, lost])
@pytest.mark.parametrize("apart", [False, True])
def test_half_precision(model: Path, dtype: torch.dtype, tolerance: float, fault: object, apart: bool) -> None:
    """Inputs and parts are rounded to 8 and 11 bits, so the sum is off by a few of those roundings."""
    mesh, batch = fake_mesh(model, linear(), dtype=dtype, max_rows=5, apart=apart), random_batch(13, dtype=dtype)
    mesh.links[1].wait_faults = [None, fault]
    got_TD = mesh.forward(batch)
    assert got_TD.dtype == dtype
    exact_TD = one_process(model, FLOAT32).forward(0, batch.x_TD.float(), batch.weights_TK, batch.ids_TK)
    scale = exact_TD.abs().max().item()
    torch.testing.assert_close(got_TD.float(), exact_TD, rtol=tolerance, atol=tolerance * scale)


def test_unwanted_pairs_and_repeated_experts(model: Path) -> None:
    mesh, batch = fake_mesh(model, linear()), random_batch(8)
    batch.ids_TK[0] = -1
    batch.ids_TK[1, 1:] = -1
    batch.ids_TK[2] = 4
    got_TD = mesh.forward(batch)
    assert_matches(got_TD, expected(model, batch))
    assert not got_TD[0].any()


def test_inputs_of_other_layouts_and_integer_kinds(model: Path) -> None:
    mesh, batch = fake_mesh(model, linear()), random_batch(8)
    wide = torch.empty(8, 2 * HIDDEN)
    wide[:, ::2] = batch.x_TD
    strided = Batch(
        wide[:, ::2], batch.weights_TK.double().t().contiguous().t(), batch.ids_TK.long().t().contiguous().t()
    )
    assert_matches(mesh.forward(strided), expected(model, batch))


def test_a_call_that_does_not_fit_is_refused_by_name(model: Path) -> None:
    mesh, batch = fake_mesh(model, linear()), random_batch(4)
    x, w, i = batch.x_TD, batch.weights_TK, batch.ids_TK
    for call, text in (
        ((2, x, w, i), r"layer 2, expected 0 to 1"),
        ((-1, x, w, i), r"layer -1"),
        ((0, x.to(BFLOAT16), w, i), r"activations are torch.bfloat16 \[4, 24\], expected torch.float32 \[T, 24\]"),
        ((0, x[:, :20], w, i), r"\[4, 20\]"),
        ((0, x, w[:, :2], i), r"ids \[4, 3\] and weights \[4, 2\], expected both \[4, 3\]"),
        ((0, x[:3], w, i), r"expected both \[3, 3\]"),
    ):
        with pytest.raises(ValueError, match=text):
            mesh.dispatcher.forward(*call)
    assert_matches(mesh.forward(batch), expected(model, batch))


def test_before_the_first_membership_nobody_is_asked(model: Path) -> None:
    dispatcher = Dispatcher(LayerShape(NUM_LAYERS, NUM_EXPERTS, TOP_K, HIDDEN, FLOAT32), 8, 1.0, unhurried(model))
    batch = random_batch(1)
    with pytest.raises(RuntimeError, match="no membership was applied yet"):
        dispatcher.forward(0, batch.x_TD, batch.weights_TK, batch.ids_TK)


def test_a_refused_membership_changes_nothing(model: Path) -> None:
    mesh, batch = fake_mesh(model, linear()), random_batch(4)
    with pytest.raises(ValueError, match=r"for 2 layers of 7 experts, the model for 2 of 6"):
        mesh.dispatcher.apply(Membership(2, Placement.linear(2, 7, 3), (None,) * 3), {}, {})
    other = FakeLink(1, linear(), mesh.dispatcher.shape, 64, one_process(model))
    other.send_tensor = torch.zeros(8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="use one transport for all"):
        mesh.dispatcher.apply(Membership(2, linear(), (None,) * 3), {0: mesh.links[0], 1: other}, {})
    assert not mesh.links[0].closed
    assert_matches(mesh.forward(batch), expected(model, batch))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("ranks", [[0, 1, 2], [0], []])
def test_rows_on_a_gpu_over_links_in_host_memory(model: Path, ranks: list[int]) -> None:
    """Also what a GPU router does while it has no link at all."""
    mesh, batch = fake_mesh(model, linear(), ranks=ranks), random_batch(9)
    on_gpu = Batch(batch.x_TD.cuda(), batch.weights_TK.cuda(), batch.ids_TK.cuda())
    assert_matches(mesh.forward(on_gpu).cpu(), expected(model, batch))


# --- failures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WAIT_FAULTS)
@pytest.mark.parametrize("replicas", [1, 2])
def test_one_shard_fails(model: Path, kind: str, replicas: int) -> None:
    fault, reason = WAIT_FAULTS[kind]
    mesh, batch = fake_mesh(model, replicated(NUM_LAYERS, NUM_EXPERTS, 3, replicas)), random_batch(40)
    mesh.links[1].wait_faults = [fault]
    assert_matches(mesh.forward(batch), expected(model, batch))
    dispatcher = mesh.dispatcher
    assert set(dispatcher.lost) == {1}
    assert reason in dispatcher.lost[1]
    assert mesh.links[1].closed
    assert (dispatcher.stats.failovers, dispatcher.stats.fallback_pairs > 0) == (1, replicas == 1)
    posted = len(mesh.links[1].posted)
    assert_matches(mesh.forward(batch, layer=1), expected(model, batch, layer=1))
    assert (dispatcher.stats.failovers, len(mesh.links[1].posted)) == (1, posted)


def test_a_failed_shard_costs_its_own_rows_alone(model: Path) -> None:
    mesh, batch = fake_mesh(model, replicated(NUM_LAYERS, NUM_EXPERTS, 3, 2)), random_batch(40)
    sound = fake_mesh(model, replicated(NUM_LAYERS, NUM_EXPERTS, 3, 2))
    sound.forward(batch)
    mesh.links[1].wait_faults = [lost]
    mesh.forward(batch)
    repeated = sum(int(header_of(link.send_buffer)[H_PAIRS]) for rank, link in mesh.links.items() if rank != 1)
    assert repeated == sound.dispatcher.stats.shard_pairs[1] > 0
    assert [len(link.posted) for link in mesh.links.values()] == [2, 1, 2]


@pytest.mark.parametrize("kind", ["post", "lost", "refused"])
@pytest.mark.parametrize("replicas", [1, 2])
def test_rows_count_for_the_shard_that_computes_them(model: Path, kind: str, replicas: int) -> None:
    """Not for the one that failed too: each pair once, at a shard or on the router itself."""
    mesh, batch = fake_mesh(model, replicated(NUM_LAYERS, NUM_EXPERTS, 3, replicas)), random_batch(40)
    faults = mesh.links[1].post_faults if kind == "post" else mesh.links[1].wait_faults
    faults.append(lost if kind == "post" else WAIT_FAULTS[kind][0])
    mesh.forward(batch)
    stats = mesh.dispatcher.stats
    assert (stats.shard_rows[1], stats.shard_pairs[1]) == (0, 0)
    assert stats.shard_pairs.sum() + stats.fallback_pairs == 40 * TOP_K
    assert stats.shard_rows.sum() == stats.fan_out_sum


def test_a_post_that_fails_is_repeated_elsewhere(model: Path) -> None:
    mesh, batch = fake_mesh(model, replicated(NUM_LAYERS, NUM_EXPERTS, 3, 2)), random_batch(40)
    mesh.links[0].post_faults = [lost]
    assert_matches(mesh.forward(batch), expected(model, batch))
    assert list(mesh.dispatcher.lost) == [0]
    assert mesh.links[0].posted == []


FAULT_KINDS = ["none", "post", *WAIT_FAULTS]


@settings(max_examples=40)
@given(data=st.data())
def test_any_faults_in_any_round_leave_the_result_alone(model: Path, data: st.DataObject) -> None:
    """Several at once, again during the repetition, in later rounds of a large step, down to no shard at all."""
    num_ranks, replicas = data.draw(st.sampled_from([(3, 1), (3, 2), (3, 3), (4, 2), (1, 1)]))
    dtype, apart = data.draw(st.sampled_from([(FLOAT32, False), (FLOAT32, True), (FLOAT16, False), (FLOAT16, True)]))
    placement = replicated(NUM_LAYERS, NUM_EXPERTS, num_ranks, replicas)
    absent = data.draw(st.sets(st.integers(0, num_ranks - 1), max_size=num_ranks))
    mesh = fake_mesh(
        model,
        placement,
        max_rows=data.draw(st.sampled_from([3, 5, 64])),
        dtype=dtype,
        ranks=[rank for rank in range(num_ranks) if rank not in absent],
        apart=apart,
    )
    for link in mesh.links.values():
        for kind in data.draw(st.lists(st.sampled_from(FAULT_KINDS), max_size=3)):
            link.post_faults.append(lost if kind == "post" else None)
            link.wait_faults.append(WAIT_FAULTS[kind][0] if kind in WAIT_FAULTS else None)
    batch = random_batch(data.draw(st.integers(0, 12)), seed=data.draw(st.integers(0, 5)), dtype=dtype)
    for layer in (0, 1):
        got_TD = mesh.forward(batch, layer)
        exact_TD = one_process(model).forward(layer, batch.x_TD.float(), batch.weights_TK, batch.ids_TK)
        if dtype == FLOAT32:
            assert_matches(got_TD, exact_TD)
        else:
            torch.testing.assert_close(got_TD.float(), exact_TD, rtol=2**-8, atol=2**-5)
    assert set(mesh.dispatcher.links) == {rank for rank, link in mesh.links.items() if not link.closed}
    assert set(mesh.dispatcher.lost) | set(mesh.dispatcher.links) == set(range(num_ranks))


def test_success_is_counted_while_any_shard_answers(model: Path) -> None:
    mesh, batch = fake_mesh(model, linear()), random_batch(8)
    assert mesh.dispatcher.stats.last_success_s is None
    mesh.links[0].wait_faults = [lost]
    mesh.forward(batch)
    first_s = mesh.dispatcher.stats.last_success_s
    assert first_s is not None
    mesh.links[1].wait_faults, mesh.links[2].wait_faults = [lost], [lost]
    mesh.forward(batch)
    assert mesh.dispatcher.stats.last_success_s == first_s


# --- real shards --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mesh(model: Path) -> Iterator[Mesh]:
    with mesh_of(model, replicated(NUM_LAYERS, NUM_EXPERTS, 3, 2), max_rows_per_dispatch=16) as mesh:
        yield mesh


@pytest.mark.parametrize("num_tokens", [0, 1, 16, 17, 50])
def test_shards_give_what_the_definition_gives(mesh: Mesh, num_tokens: int) -> None:
    router = mesh.router(max_rows_per_dispatch=16)
    for layer in range(NUM_LAYERS):
        batch = random_batch(num_tokens, seed=layer)
        assert_matches(run(router, layer, batch), oracle(mesh.checkpoint, layer, batch))
    status = router.status()
    assert (status.failovers, status.fallback_pairs, status.lost) == (0, 0, {})
    assert status.rows == NUM_LAYERS * num_tokens
    assert status.transports == {0: "shm", 1: "shm", 2: "shm"}
    assert status.stage_us.wait.count == NUM_LAYERS * max(1, -(-num_tokens // 16))


def test_all_tokens_on_one_shard(mesh: Mesh) -> None:
    router, batch = mesh.router(max_rows_per_dispatch=16), random_batch(30, among=[1, 4], top_k=2)
    shape_k = torch.full((30, 1), -1, dtype=torch.int32)
    batch = Batch(
        batch.x_TD, torch.cat([batch.weights_TK, torch.ones(30, 1)], 1), torch.cat([batch.ids_TK, shape_k], 1)
    )
    assert_matches(run(router, 0, batch), oracle(mesh.checkpoint, 0, batch))
    assert sorted(router.status().shard_rows)[0] == 0


def test_several_routers_at_once(mesh: Mesh) -> None:
    """Each router in a thread of its own, as each worker has one; every answer belongs to its own question."""
    routers = [mesh.router(router_id=f"router-{n}", max_rows_per_dispatch=16) for n in range(4)]
    start, failures = threading.Barrier(4), []

    def drive(index: int) -> None:
        start.wait(30)
        for step in range(12):
            layer, batch = step % NUM_LAYERS, random_batch(1 + (7 * index + step) % 23, seed=100 * index + step)
            try:
                assert_matches(run(routers[index], layer, batch), oracle(mesh.checkpoint, layer, batch))
            except BaseException as error:
                failures.append(error)

    threads = [threading.Thread(target=drive, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    assert failures == []
    assert {f"router-{n}" for n in range(4)} <= set(mesh.shards[0].status().routers)


def _drive_in_process(mesh_parts: tuple, index: int, pipe: object) -> None:
    """Process body: a router of its own, held against the oracle; sends the largest difference that it saw."""
    model, membership = mesh_parts
    router = make_router(model, router_id=f"process-{index}", max_rows_per_dispatch=16)
    applied = router.apply_membership(Membership.from_dict(membership))
    worst = 0.0
    for step in range(10):
        layer, batch = step % NUM_LAYERS, random_batch(1 + (5 * index + step) % 20, seed=1000 * index + step)
        difference_TD = run(router, layer, batch) - oracle(router.dispatcher.fallback._checkpoint, layer, batch)
        worst = max(worst, difference_TD.abs().max().item())
    pipe.send((applied.lost, router.status().fallback_pairs, worst))


def test_routers_in_processes_of_their_own(mesh: Mesh) -> None:
    parts = (mesh.model, mesh.membership().to_dict())
    answers = in_processes(_drive_in_process, [(parts, index) for index in range(2)])
    for lost_shards, fallback_pairs, worst in answers:
        assert (lost_shards, fallback_pairs) == ({}, 0)
        assert worst < 1e-4
