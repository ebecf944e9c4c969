"""What happened to the mesh, as people read it: on a simulated mesh, whose shards are killed, drained and added."""

from __future__ import annotations

import itertools

import numpy as np

from cluster.controller import views
from cluster.controller.events import LONGEST, EventLog
from cluster.mesh.messages import MeshEvent
from cluster.mesh.planning import ModelFacts
from tests.support.simulated.mesh import SimulatedMesh


class Noted(SimulatedMesh):
    """A mesh whose controller looks for events after every step."""

    def __init__(self, shards: int, slots: int | None = None) -> None:
        self.log = EventLog()
        super().__init__(shards, model=ModelFacts(2, 8), slots=slots)
        self.run_until_still()

    def step(self, seconds: float = 0.1) -> None:
        super().step(seconds)
        self.log.note(self.mesh, self.now_s)

    def since(self, number: int) -> list[MeshEvent]:
        return [event for event in self.log.events if event.number > number]

    @property
    def last(self) -> int:
        return self.log.events[-1].number


def kinds(events: list[MeshEvent], rank: int | None = None) -> list[str]:
    return [event.kind for event in events if rank is None or event.rank == rank]


def test_a_start_is_told_and_then_nothing_more() -> None:
    mesh = Noted(3)
    found = mesh.log.events
    assert found[0].kind == "start"
    assert {event.rank for event in found if event.kind == "serve"} == {0, 1, 2}
    assert sum(event.kind == "router" for event in found) == 2
    assert [event.number for event in found] == sorted({event.number for event in found})
    assert [event.at for event in found] == sorted(event.at for event in found)
    before = mesh.last
    mesh.run(5.0)
    assert mesh.since(before) == []


def test_a_killed_shard_is_lost_and_its_successor_returns_with_the_time_it_took() -> None:
    mesh = Noted(3)
    before, epoch = mesh.last, mesh.mesh.roster.epoch
    [victim] = [shard for shard in mesh.shards.values() if shard.rank == 1]
    mesh.kill(victim)
    mesh.run(1.0)
    mesh.start_shard()
    mesh.run_until_still()
    events = mesh.since(before)
    assert kinds(events, 1)[0] == "lost"
    assert "serve" in kinds(events, 1)
    [served] = [event for event in events if event.kind == "serve" and event.rank == 1]
    [lost] = [event for event in events if event.kind == "lost" and event.rank == 1][:1]
    assert f"{served.at - lost.at:.1f} s after the loss" in served.text
    assert served.epoch > epoch


def test_experts_that_no_shard_has_are_told_and_told_again_when_they_are_back() -> None:
    mesh = Noted(2, slots=5)
    before = mesh.last
    [victim] = [shard for shard in mesh.shards.values() if shard.rank == 1]
    mesh.kill(victim)
    mesh.run(10.0)
    mesh.start_shard()
    mesh.run_until_still()
    events = mesh.since(before)
    order = [event.kind for event in events if event.kind in ("unserved", "served")]
    assert order[0] == "unserved"
    assert order[-1] == "served"


def test_a_drain_and_its_end_are_told_and_a_run_of_epochs_is_one_event() -> None:
    mesh = Noted(3, slots=9)
    before, epoch = mesh.last, mesh.mesh.roster.epoch
    seat = mesh.mesh.roster.at(2)
    assert seat is not None
    mesh.mesh.drain(seat, "told to", mesh.now_s)
    mesh.run_until_still()
    events = mesh.since(before)
    assert kinds(events, 2)[0] == "drain"
    assert "target" in kinds(events)
    assert mesh.mesh.roster.epoch - epoch >= 1
    order = kinds(events)
    assert all(pair != ("epoch", "epoch") for pair in itertools.pairwise(order))
    assert events[-1].epoch == mesh.mesh.roster.epoch
    before = mesh.last
    mesh.mesh.undrain(seat, mesh.now_s)
    mesh.run_until_still()
    [back] = [event for event in mesh.since(before) if event.rank == 2]
    assert back.text == "it takes experts again"


def test_the_log_is_bounded() -> None:
    mesh = Noted(3)
    for _ in range(LONGEST):
        mesh.mesh.routers.note("r9", 1, {}, mesh.now_s)
        mesh.log.note(mesh.mesh, mesh.now_s)
        mesh.mesh.routers.forget("r9")
        mesh.log.note(mesh.mesh, mesh.now_s)
    assert len(mesh.log.events) == LONGEST


def test_what_is_published_is_told_in_bits() -> None:
    mesh = Noted(3)
    view = views.published(mesh.mesh)
    for rank, holding in mesh.mesh.holdings.ranks.items():
        held = np.unpackbits(np.frombuffer(view.bits[rank], np.uint8), count=view.num_layers * view.num_experts)
        np.testing.assert_array_equal(held.reshape(2, 8).astype(bool), holding.published_LE)
