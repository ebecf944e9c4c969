"""The fallback's budget: what it computes is right, what it has no time for is named, and reading holds nobody up."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from experts.checkpoint import ExpertCheckpoint
from experts.dispatch import fallback_budget
from experts.dispatch.fallback_budget import FallbackBudget
from experts.protocol.membership import Membership
from placement.placement import Placement
from tests.support.fake_links import FakeMesh, fake_mesh
from tests.support.small_mesh import assert_matches, oracle, random_batch, write_checkpoint
from tests.support.waiting import AWAIT_S, await_true

EXPERT_BYTES = 3 * 24 * 40 * 4
LINEAR = Placement.linear(2, 6, 3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"))


def budget(
    model: Path, cache_bytes: int, max_ms: float, before_reading: Callable[[], None] = lambda: None
) -> FallbackBudget:
    checkpoint = ExpertCheckpoint.open(model)

    def read_expert(*arguments: Any) -> Any:
        before_reading()
        return checkpoint.read_expert(*arguments)

    source: Any = SimpleNamespace(spec=checkpoint.spec, read_expert=read_expert)
    return FallbackBudget(source, torch.float32, "cpu", cache_bytes, max_ms)


def without_rank_1(model: Path, fallback: FallbackBudget) -> FakeMesh:
    """Experts 2 and 3 are nowhere."""
    mesh = fake_mesh(model, LINEAR, ranks=[0, 2], max_rows=4)
    mesh.dispatcher.fallback = fallback
    return mesh


@pytest.mark.parametrize("experts_cached", [0, 1, 2, 12])
def test_with_time_it_is_the_definition_whatever_fits_the_cache(model: Path, experts_cached: int) -> None:
    fallback = budget(model, experts_cached * EXPERT_BYTES, 1e6)
    checkpoint = ExpertCheckpoint.open(model)
    for layer in (0, 1, 0):
        batch = random_batch(90, seed=layer)
        fallback.start_step()
        y_TD, refused_T = fallback.forward(layer, batch.x_TD, batch.weights_TK, batch.ids_TK)
        assert_matches(y_TD, oracle(checkpoint, layer, batch))
        assert not refused_T.any()
        assert fallback.cached_bytes <= experts_cached * EXPERT_BYTES
    assert fallback.spent_ns > 0
    if experts_cached == 12:
        assert fallback.cached_bytes == 12 * EXPERT_BYTES


def test_without_time_just_the_rows_that_need_it_are_refused(model: Path) -> None:
    mesh, batch = without_rank_1(model, budget(model, 1 << 20, 0)), random_batch(11, seed=1)
    y_TD = mesh.forward(batch)
    needs_T = np.isin(batch.ids_TK.numpy(), [2, 3]).any(1)
    assert 0 < needs_T.sum() < 11
    np.testing.assert_array_equal(mesh.dispatcher.take_refused(), needs_T)
    assert mesh.dispatcher.take_refused() is None
    expected_TD = oracle(ExpertCheckpoint.open(model), 0, batch)
    assert_matches(y_TD[torch.from_numpy(~needs_T)], expected_TD[torch.from_numpy(~needs_T)])
    assert mesh.dispatcher.stats.fallback_pairs == 0


def test_refused_rows_cost_nothing_in_later_layers_and_the_next_step_begins_anew(model: Path) -> None:
    mesh, batch = without_rank_1(model, budget(model, 1 << 20, 0)), random_batch(11, seed=1)
    needs_T = np.isin(batch.ids_TK.numpy(), [2, 3]).any(1)
    mesh.forward(batch)
    before = mesh.dispatcher.stats.shard_pairs.sum()
    mesh.forward(batch, 1)
    assert mesh.dispatcher.stats.shard_pairs.sum() - before == 3 * (~needs_T).sum()
    np.testing.assert_array_equal(mesh.dispatcher.take_refused(), needs_T)
    mesh.forward(batch)
    mesh.dispatcher.apply(Membership(2, LINEAR, (None,) * 3), {**fake_mesh(model, LINEAR).links}, {})
    assert_matches(mesh.forward(batch), oracle(ExpertCheckpoint.open(model), 0, batch))
    assert mesh.dispatcher.take_refused() is None


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Reading an expert takes until this is set."""
    gate = threading.Event()
    yield gate
    gate.set()


def test_a_slow_disk_costs_requests_and_not_steps_and_what_it_brought_serves_the_next(
    model: Path, gate: threading.Event
) -> None:
    fallback = budget(model, 1 << 20, 20, lambda: check_set(gate))
    mesh, batch = without_rank_1(model, fallback), random_batch(11, seed=1)
    mesh.forward(batch)  # ends although nothing was read
    assert mesh.dispatcher.take_refused().any()  # type: ignore[union-attr]
    assert mesh.dispatcher.uncovered_pairs == 4
    gate.set()
    await_true(lambda: fallback.cached_bytes == 2 * EXPERT_BYTES, "what the step asked for")
    fallback.max_ns_per_step = 10**12
    y_TD = mesh.forward(batch)
    assert mesh.dispatcher.take_refused() is None
    assert_matches(y_TD, oracle(ExpertCheckpoint.open(model), 0, batch))


def check_set(gate: threading.Event) -> None:
    assert gate.wait(AWAIT_S)


def test_a_budget_is_for_all_layers_of_a_step(model: Path, gate: threading.Event) -> None:
    fallback = budget(model, 1 << 20, 20, lambda: check_set(gate))
    mesh, batch = without_rank_1(model, fallback), random_batch(4, seed=1, among=[1, 2, 4])
    mesh.forward(batch)
    spent = fallback.spent_ns
    assert spent >= 20e6
    others = random_batch(4, seed=1, among=[0, 3, 5])
    fallback.forward(1, others.x_TD, others.weights_TK, others.ids_TK)  # has nothing left to wait with
    assert fallback.spent_ns - spent < spent, "a wait would have taken all of another step's time"
    fallback.start_step()
    fallback.forward(1, others.x_TD, others.weights_TK, others.ids_TK)
    assert fallback.spent_ns - spent >= 20e6


def test_an_expert_that_cannot_be_read_costs_its_requests_until_it_can(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = threading.Event()
    away.set()

    def damaged() -> None:
        if away.is_set():
            raise OSError("the disk is away")

    mesh, batch = without_rank_1(model, budget(model, 1 << 20, 1e6, damaged)), random_batch(11, seed=1)
    mesh.forward(batch)
    np.testing.assert_array_equal(mesh.dispatcher.take_refused(), np.isin(batch.ids_TK.numpy(), [2, 3]).any(1))
    away.clear()
    monkeypatch.setattr(fallback_budget, "RETRY_S", 0.0)
    assert_matches(mesh.forward(batch), oracle(ExpertCheckpoint.open(model), 0, batch))
    assert mesh.dispatcher.take_refused() is None
