"""Made-up statuses of routers, shards and the controller, as the processes would report them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from cluster.autopilot.messages import AutopilotCounters, AutopilotView, Decision, WindowView
from cluster.mesh.messages import ControllerStatus, MigrationView, RouterView, SeatView
from experts.dispatch.stats import Histogram
from experts.protocol.membership import ShardEndpoint
from experts.protocol.status import RouterStatus, ShardStatus, StageHistograms


def router_status(router_id: str = "r1", **changes: Any) -> RouterStatus:
    """A router of two ranks that has lost rank 0; every counter has a value of its own."""
    stage = Histogram()
    for microseconds in (5, 15, 15, 10_000_000):
        stage.add(microseconds * 1000)
    status = RouterStatus(
        router_id=router_id,
        epoch=4,
        num_ranks=2,
        connected=[1],
        transports={1: "shm"},
        lost={0: "gone"},
        layers=4,
        steps=10,
        dispatches=40,
        rows=80,
        fan_out_sum=120,
        failovers=1,
        fallback_pairs=2,
        bytes_sent=1000,
        bytes_received=900,
        balancedness=0.75,
        shard_rows=[30, 50],
        shard_pairs=[60, 100],
        last_success_age_s=0.5,
        no_slot_pairs=5,
        uncovered_pairs=12,
        fallback_ms=2.5,
        fallback_cached_bytes=4096,
        refused_requests=6,
        swap_last_us=41.0,
        swap_max_us=70.5,
        stage_us=StageHistograms(plan_pack=Histogram().snapshot(), wait=stage.snapshot(), combine=stage.snapshot()),
        params=7,
        resident_bytes=8,
        term="life",
        pid=9,
        unfinished_requests=3,
    )
    return replace(status, **changes)


def shard_status(rank: int = 1, incarnation: str = "a", **changes: Any) -> ShardStatus:
    """A sound shard that has answered 40 requests."""
    status = ShardStatus(
        rank=rank,
        epoch=4,
        pid=11,
        incarnation=incarnation,
        endpoint=ShardEndpoint(rank, incarnation, "127.0.0.1", 1000 + rank, "host", 11),
        alive=True,
        fault=None,
        routers=["r1"],
        kernel="torch_loop",
        loaded_experts=12,
        loaded_bytes=77,
        weights_digest="d",
        requests=40,
        rows=50,
        pairs=100,
        errors=0,
        compute_ns=6,
        last_error=None,
        last_epoch=4,
        num_slots=8,
        free_slots=3,
        copies={"shm": 6, "checkpoint": 1},
        copied_bytes={"shm": 600, "checkpoint": 100},
        copies_failed=2,
        copies_in_flight=1,
        copy_seconds=1.25,
        handed_out=14,
        handed_out_bytes=1400,
    )
    return replace(status, **changes)


def migration_view(**changes: Any) -> MigrationView:
    """A migration in the midst of a round; every number has a value of its own."""
    view = MigrationView(
        target_version=6,
        origin="command",
        phase="copying",
        moving=True,
        paused=False,
        copies_in_flight=2,
        copies_left=9,
        bytes_left=900_000,
        rounds=3,
        copies=21,
        copied_bytes=2_100_000,
        failed_copies=4,
        sole_copies=13,
        unserved=5,
        problem="",
    )
    return replace(view, **changes)


def seat_view(rank: int = 1, **changes: Any) -> SeatView:
    """A shard that serves and fills up."""
    seat = SeatView(
        shard_id=f"s{rank}",
        node_id="node-one",
        rank=rank,
        serving=True,
        state="filling",
        num_slots=8,
        experts_held=12,
        experts_missing=7,
        silent_s=0.5,
        pid=11,
        status=shard_status(rank),
    )
    return replace(seat, **changes)


def joining_seat(rank: int = 0) -> SeatView:
    """A shard that starts."""
    return SeatView(f"s{rank}", "node-one", rank, False, "joining", 0, 0, 0, 1.5, None, None)


def autopilot_view(**changes: Any) -> AutopilotView:
    """After some windows; frozen, since rank 0 starts."""
    view = AutopilotView(
        mode="auto",
        state="frozen",
        frozen="a shard starts",
        routers=1,
        drifting=2,
        window=WindowView(60.0, 900, {"decode": 7000, "prefill": 500}, 1024, 2.5, 0.75, 300.0, 0.125, 0.01),
        last=Decision(5, 1e9, "plan", "", "helped", 6, 0.125, 0.0625, 0.01, 0.03125, 0.01, 21, 2_100_000, 0.5, 40.0),
        counters=AutopilotCounters(reports=14, tokens=15_000, windows=16, plans=5, moves=4, undone=1, failures=3),
    )
    return replace(view, **changes)


def controller_status(**changes: Any) -> ControllerStatus:
    """Rank 1 serves, rank 0 starts."""
    status = ControllerStatus(
        term="life",
        epoch=5,
        complete=False,
        missing_ranks=[0],
        num_ranks=2,
        migration=migration_view(),
        routers={"r1": RouterView(4, {0: "b"}, 0.25)},
        shards=[joining_seat(0), seat_view(1)],
        autopilot=autopilot_view(),
    )
    return replace(status, **changes)
