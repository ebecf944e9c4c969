"""What a traced step notes of real shards: every message, in order, in the compiled form and in Python's."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from experts.dispatch.dispatcher import Dispatcher
from experts.dispatch.rows import pick
from experts.dispatch.rows.native_mover import NativeRowMover
from experts.dispatch.tracing.dispatcher import TracedDispatcher
from experts.dispatch.tracing.times import (
    T_BEGIN,
    T_COMBINED,
    T_POSTED,
    T_WAIT,
    T_WAITED,
    StepTimes,
    choose_layers,
)
from experts.native.library import data_plane
from tests.support.small_mesh import Mesh, mesh_of, random_batch, replicated, run, write_checkpoint

NUM_LAYERS, NUM_RANKS = 2, 3
TRACES = {"request": {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def mesh(model: Path) -> Iterator[Mesh]:
    with mesh_of(model, replicated(NUM_LAYERS, 6, NUM_RANKS, 2)) as mesh:
        yield mesh


def traced_step(router, num_tokens: int = 12, layers_per_step: int = NUM_LAYERS) -> StepTimes:
    dispatcher = router.dispatcher
    assert isinstance(dispatcher, TracedDispatcher)
    dispatcher.start_step(TRACES, layers_per_step)
    for layer in range(NUM_LAYERS):
        run(router, layer, random_batch(num_tokens, seed=layer))
    step = dispatcher.end_step()
    assert step is not None
    return step


@pytest.mark.parametrize("compiled", [True, False])
def test_times_of_a_step_lie_inside_each_other(mesh: Mesh, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(pick, "data_plane", lambda: None)
    elif data_plane() is None:
        pytest.skip("no C++ compiler")
    router = mesh.router(tracing={})
    assert isinstance(router.dispatcher.mover, NativeRowMover) is compiled
    before = router.dispatcher.stats.shard_rows.copy()
    step = traced_step(router)
    assert [layer.layer for layer in step.layers] == [0, 1]
    assert step.num_tokens == 12
    assert step.transports == dict.fromkeys(range(NUM_RANKS), "shm")
    rows_R, end_ns = np.zeros(NUM_RANKS, np.int64), step.begin_ns
    for layer in step.layers:
        assert end_ns <= layer.begin_ns
        [exchange] = layer.exchanges
        words = exchange.words
        order = [layer.begin_ns, *(int(words[at]) for at in (T_BEGIN, T_POSTED, T_WAIT, T_WAITED, T_COMBINED))]
        assert order == sorted(order)
        asked_R = exchange.rows_R > 0
        assert asked_R.any()
        assert ((exchange.arrived_R > 0) == asked_R).all()
        assert (exchange.arrived_R[asked_R] >= words[T_POSTED]).all()
        assert exchange.arrived_R.max() <= words[T_WAITED]
        # The shard's own clock: it cannot have computed for longer than the router waited.
        took_R = exchange.arrived_R - words[T_BEGIN]
        assert (exchange.compute_R[asked_R] > 0).all()
        assert (exchange.compute_R[asked_R] <= took_R[asked_R]).all()
        assert exchange.failed == {}
        end_ns = layer.end_ns
        rows_R += exchange.rows_R
    assert end_ns <= step.end_ns
    assert (router.dispatcher.stats.shard_rows - before == rows_R).all(), "the messages are those that were counted"


def test_a_large_layer_has_an_exchange_for_each_batch(mesh: Mesh) -> None:
    router = mesh.router(tracing={}, max_rows_per_dispatch=5)
    step = traced_step(router, num_tokens=12)
    assert [len(layer.exchanges) for layer in step.layers] == [3, 3]
    for layer in step.layers:
        posted = [int(exchange.words[T_POSTED]) for exchange in layer.exchanges]
        combined = [int(exchange.words[T_COMBINED]) for exchange in layer.exchanges]
        assert all(end <= begin for end, begin in zip(combined, posted[1:], strict=False))


def test_a_lost_shard_and_its_repeat_are_in_the_trace(mesh: Mesh) -> None:
    router = mesh.router(tracing={})
    run(router, 0, random_batch(12))
    mesh.shards[1].signal(signal.SIGKILL)
    step = traced_step(router)
    first = step.layers[0].exchanges
    assert len(first) == 2
    assert set(first[0].failed) == {1}
    assert first[1].failed == {}
    assert first[1].rows_R[1] == 0
    assert (first[0].rows_R[1] > 0) == (first[1].rows_R.sum() > 0)
    assert len(step.layers[1].exchanges) == 1, "the next layer does not ask it any more"


def test_what_the_router_computes_itself_has_a_time(model: Path) -> None:
    with mesh_of(model, replicated(NUM_LAYERS, 6, 2, 1)) as mesh:
        router = mesh.router(tracing={})
        mesh.shards[0].signal(signal.SIGKILL)
        step = traced_step(router)
        assert all(layer.fallback_ns > 0 for layer in step.layers)


def test_sums_are_the_same_bits_with_and_without(mesh: Mesh) -> None:
    batch = random_batch(12)
    plain, traced = mesh.router(), mesh.router(tracing={})
    assert type(plain.dispatcher) is Dispatcher
    expected_TD = run(plain, 0, batch)
    assert torch.equal(run(traced, 0, batch), expected_TD), "between traced steps"
    traced.dispatcher.start_step(TRACES, 2)  # type: ignore[attr-defined]
    assert torch.equal(run(traced, 0, batch), expected_TD)
    traced.dispatcher.end_step()  # type: ignore[attr-defined]


def test_chosen_layers_go_around(mesh: Mesh) -> None:
    router = mesh.router(tracing={})
    assert [[layer.layer for layer in traced_step(router, layers_per_step=1).layers] for _ in range(3)] == [
        [0],
        [1],
        [0],
    ]
    assert traced_step(router, layers_per_step=0).layers == []


@pytest.mark.parametrize(("num_layers", "wanted"), [(58, 4), (4, 4), (3, 7), (5, 1), (7, 3)])
def test_every_layer_has_its_turn(num_layers: int, wanted: int) -> None:
    chosen = [choose_layers(num_layers, wanted, turn) for turn in range(num_layers)]
    assert all(len(layers) == min(wanted, num_layers) for layers in chosen)
    assert frozenset().union(*chosen) == frozenset(range(num_layers))


def test_steps_that_are_not_traced_leave_nothing(mesh: Mesh) -> None:
    router = mesh.router(tracing={})
    run(router, 0, random_batch(12))
    assert router.dispatcher.end_step() is None  # type: ignore[attr-defined]
    if isinstance(router.dispatcher.mover, NativeRowMover):
        assert router.dispatcher.mover._router.times is None
        traced_step(router)
        assert router.dispatcher.mover._router.times is None, "memory of a step that is over is not written to"
