"""A mesh of made-up shards and routers: cold start, scaling, loss, drain, restarts, and random schedules of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from cluster.config.live_sections import LiveConfig
from tests.support.simulated.mesh import SimulatedMesh

LIVE = LiveConfig.model_validate({"membership": {"replace_after_s": 20, "lost_after_s": 5}})


def started(num_shards: int = 3, slots: int | None = None, live: LiveConfig = LIVE) -> SimulatedMesh:
    sim = SimulatedMesh(num_shards, live, slots=slots)
    sim.run_until_still()
    assert sim.mesh.unserved == 0
    return sim


def test_a_cold_start_loads_each_row_and_then_opens():
    sim = started()
    assert sorted(sim.mesh.holdings.ranks) == [0, 1, 2]
    assert sim.mesh.conductor.counters.copies == 0
    assert all(sim.unserved_by(router) == 0 for router in sim.routers)


def test_routers_are_told_the_speeds_of_the_target():
    sim = started()
    target = sim.mesh.keeper.target
    speeds = (1.0, 2.0, 0.5)
    sim.mesh.keeper.target = replace(target, placement=replace(target.placement, speeds=speeds))
    sim.start_shard()  # whatever raises the epoch
    sim.run_until_still()
    assert sim.mesh.membership.placement.speeds[:3] == speeds
    assert all(router.membership.placement.speeds[:3] == speeds for router in sim.routers)


def test_growing_and_shrinking_keeps_every_expert_served():
    sim = started(slots=7)
    for wanted in (5, 3, 5, 3, 4, 2):
        sim.scale(wanted)
        sim.run_until_still()
        assert len(sim.mesh.holdings.ranks) == wanted
        assert sim.mesh.unserved == 0
        assert all(sim.unserved_by(router) == 0 for router in sim.routers)
        loads = [each.published_LE.sum() for each in sim.mesh.holdings.ranks.values()]
        assert min(loads) > 0, "every shard has experts"


def test_a_lost_shard_is_replaced_by_the_next_one():
    sim = started(slots=4)
    lost = sim.shards["s1"]
    rank = lost.rank
    sim.kill(lost)
    sim.start_shard()
    sim.run_until_still()
    assert sim.shards["s3"].rank == rank
    assert sim.mesh.unserved == 0
    assert sim.mesh.keeper.target.origin == "first", "the replacement has the same experts"


def test_the_others_take_over_from_a_shard_that_is_lost_for_good():
    sim = started(slots=6)
    sim.wanted = sim.mesh.wanted = None
    sim.kill(sim.shards["s2"])
    sim.run(15)
    assert sim.mesh.unserved > 0, "they wait for a replacement first"
    sim.run(20)
    sim.run_until_still()
    assert sim.mesh.unserved == 0
    assert sim.mesh.num_ranks == 2


def test_a_newcomer_beyond_what_serve_wants_waits_to_succeed():
    sim = started(slots=4)
    before = sim.mesh.keeper.target.version
    newcomer = sim.start_shard()
    sim.run(10)
    assert sim.mesh.keeper.target.version == before
    assert not newcomer.held_LE.any()
    old = sim.shards["s0"]
    had_LE = old.held_LE.copy()
    old.leaving = True
    sim.run_until_still()
    assert np.array_equal(newcomer.held_LE, had_LE)
    replicas = 2  # 3, 3 and 2 experts are not even; one replica a layer makes them so
    assert sim.mesh.conductor.counters.copies == had_LE.sum() + replicas, "nothing else moved"
    assert not old.alive


def test_a_restarted_controller_goes_on_in_the_middle():
    sim = started(slots=7, live=LiveConfig.model_validate({"migration": {"max_bytes_per_s": 2e6, "round_s": 0.5}}))
    sim.scale(5)
    sim.run(3)
    assert sim.mesh.conductor.moving
    version = sim.mesh.keeper.target.version
    held = {name: shard.held_LE.copy() for name, shard in sim.shards.items()}
    sim.restart_controller()
    sim.run_until_still()
    assert sim.mesh.keeper.target.version >= version
    assert sim.mesh.unserved == 0
    assert all(sim.shards[name].alive for name in held), "nobody restarted"


FAULTS = st.sampled_from(
    ["kill", "freeze", "thaw", "restart controller", "controller away", "grow", "shrink", "break a copy", "slow router"]
)


# Without shrinking, which takes minutes: a schedule is short as it is.
@settings(max_examples=200, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    data=st.data(),
    slots=st.integers(6, 9),
    min_replicas=st.integers(1, 2),
    faults=st.lists(st.tuples(FAULTS, st.floats(0.05, 4.0)), max_size=8),
)
def test_any_schedule_of_faults_ends_with_every_expert_held(data, slots, min_replicas, faults):
    """Shards are killed, frozen and restarted, the controller too, at any moment of a migration."""
    live = LiveConfig.model_validate(
        {
            "placement": {"min_replicas": min_replicas},
            "migration": {"max_bytes_per_s": 2e6, "round_s": 0.5},
            "membership": {"replace_after_s": 10, "lost_after_s": 5},
        }
    )
    sim = started(3, slots=slots, live=live)
    killed: set[str] = set()
    for fault, pause_s in faults:
        living = [shard for shard in sim.shards.values() if shard.alive and not shard.leaving]
        if fault == "kill" and len(living) > 1:
            victim = data.draw(st.sampled_from(living))
            sim.kill(victim)
            killed.add(victim.name)
            sim.start_shard()
        elif fault == "freeze" and sum(shard.speaks for shard in living) > 1:
            data.draw(st.sampled_from(living)).stopped = True
        elif fault == "thaw":
            for shard in living:
                shard.stopped = False
        elif fault == "restart controller":
            sim.restart_controller()
        elif fault == "controller away":
            sim.controller_alive = False
            sim.run(pause_s)
            sim.restart_controller()
        elif fault == "grow":
            sim.scale(min(sim.wanted + 1, 5))
        elif fault == "shrink":
            sim.scale(max(sim.wanted - 1, 3))
        elif fault == "break a copy" and living:
            shard = data.draw(st.sampled_from(living))
            sim.broken_copies.add((shard.name, data.draw(st.integers(0, 1)), data.draw(st.integers(0, 7))))
        elif fault == "slow router":
            sim.routers[0].slow_s = data.draw(st.floats(0, 3))
        sim.run(pause_s)
    for shard in sim.shards.values():
        shard.stopped = False
    sim.broken_copies.clear()
    sim.run_until_still(step_s=0.25)
    assert sim.mesh.unserved == 0
    assert all(sim.unserved_by(router) == 0 for router in sim.routers)
    for shard in sim.shards.values():
        assert shard.alive or shard.leaving or shard.name in killed, f"{shard.name} restarted, and nobody killed it"
    for rank, each in sim.mesh.holdings.ranks.items():
        assert np.array_equal(each.held_LE, each.published_LE), f"rank {rank} leaks slots"
