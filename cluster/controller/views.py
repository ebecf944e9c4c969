"""What people and commands see of the mesh, made from its state; nothing here changes it."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping

import numpy as np

from cluster.autopilot.messages import AutopilotView
from cluster.config.live_sections import LiveConfig
from cluster.config.parse import ConfigError
from cluster.mesh.holdings import experts_by_rank
from cluster.mesh.mesh import Mesh
from cluster.mesh.messages import ControllerStatus, MigrationView, PlacementView, PlanView, PublishedView, SeatView
from cluster.mesh.roster import Seat
from experts.protocol.status import ShardStatus
from placement.migration.price import CopyRates, expected_seconds
from placement.placement import EMPTY, Placement, check_same_model
from placement.search.few_copies.relabel import relabel

ROUND_COST_S = 0.2  # two epochs, until every router is at them


def policy_digest(live: LiveConfig) -> str:
    """Sixteen hex digits that tell two settings of the policy apart."""
    return hashlib.sha256(json.dumps(live.placement.model_dump(), sort_keys=True).encode()).hexdigest()[:16]


def status(
    mesh: Mesh,
    term: str,
    shard_status: Mapping[int, ShardStatus],
    problem: str,
    refusal: str,
    now_s: float,
    autopilot: AutopilotView | None = None,
) -> ControllerStatus:
    """Who is where, and what moves. `refusal`: why no shard may join."""
    count_LE = mesh.holdings.count_LE
    wanted = math.inf if mesh.wanted is None else mesh.wanted
    unfit = (f"shard {rank}: {why}" for rank, why in sorted(mesh.unfit.items()) if rank < wanted)
    return ControllerStatus(
        term=term,
        epoch=mesh.roster.epoch,
        complete=mesh.open and not (count_LE == 0).any(),
        missing_ranks=mesh.missing,
        num_ranks=mesh.num_ranks,
        migration=_migration(mesh, count_LE, problem),
        routers=mesh.routers.views(now_s),
        shards=[_seat(mesh, seat, shard_status.get(seat.rank), now_s) for seat in mesh.roster.seats],
        refusal=refusal or next(unfit, ""),
        autopilot=autopilot or AutopilotView(),
    )


def _migration(mesh: Mesh, count_LE: np.ndarray, problem: str) -> MigrationView:
    conductor, target = mesh.conductor, mesh.keeper.target
    counters = conductor.counters
    return MigrationView(
        target_version=0 if target is None else target.version,
        origin="" if target is None else target.origin,
        phase=conductor.phase,
        moving=conductor.moving,
        paused=conductor.paused,
        copies_in_flight=conductor.copies_in_flight,
        copies_left=conductor.copies_left,
        bytes_left=conductor.copies_left * conductor.expert_bytes,
        rounds=counters.rounds,
        copies=counters.copies,
        copied_bytes=counters.copied_bytes,
        failed_copies=counters.failed_copies,
        sole_copies=int((count_LE == 1).sum()),
        unserved=int((count_LE == 0).sum()),
        problem=problem,
    )


def _seat(mesh: Mesh, seat: Seat, last: ShardStatus | None, now_s: float) -> SeatView:
    holding, row_LE = mesh.holdings.ranks.get(seat.rank), mesh.conductor.row_of(seat.rank)
    missing = 0
    if row_LE is not None and holding is not None:
        missing = int((row_LE & ~holding.published_LE).sum())
    state = "joining" if not seat.serving else "draining" if seat.draining else "filling" if missing else "serving"
    if last is not None and (seat.endpoint is None or last.incarnation != seat.endpoint.incarnation):
        last = None  # of a predecessor
    return SeatView(
        shard_id=seat.shard_id,
        node_id=seat.node_id,
        rank=seat.rank,
        serving=seat.serving,
        state=state,
        num_slots=seat.num_slots,
        experts_held=0 if holding is None else int(holding.held_LE.sum()),
        experts_missing=missing,
        silent_s=now_s - seat.last_heartbeat_s,
        pid=seat.endpoint.pid if seat.endpoint else None,
        status=last,
    )


def placement(mesh: Mesh) -> PlacementView:
    """What is published, and the target."""
    published, target = mesh.holdings.placement(mesh.num_ranks), mesh.keeper.target
    experts_of_rank = [
        [np.flatnonzero(held_E).tolist() for held_E in held_LE] for held_LE in experts_by_rank(published).values()
    ]
    return PlacementView(
        mesh.roster.epoch,
        published,
        experts_of_rank,
        0 if target is None else target.version,
        None if target is None else target.placement,
    )


def published(mesh: Mesh) -> PublishedView:
    """Where experts are, and nothing else."""
    bits = {rank: np.packbits(each.published_LE).tobytes() for rank, each in mesh.holdings.ranks.items()}
    return PublishedView(mesh.roster.epoch, mesh.model.num_layers, mesh.model.num_experts, bits)


def plan(mesh: Mesh, wanted: Placement) -> PlanView:
    """What it takes to get to a placement. ConfigError or ValueError if it does not fit the shards at hand."""
    check_same_model("it", wanted, "the model", mesh.model)
    if wanted.partial:
        raise ConfigError("it lacks experts")
    rows, ranks = experts_by_rank(wanted), mesh.holdings.ranks
    draining = {seat.rank for seat in mesh.roster.seats if seat.draining}
    for rank, row_LE in rows.items():
        most = int(row_LE.sum(1).max())
        if most and (rank not in ranks or rank in draining):
            raise ConfigError(f"it gives experts to rank {rank}; shards take them at {sorted(set(ranks) - draining)}")
        if most and most > ranks[rank].num_slots:
            raise ConfigError(
                f"it needs {most} slots in a layer of rank {rank}, whose shard has {ranks[rank].num_slots}"
            )
    rounds = mesh.conductor.rounds_to(wanted)
    by_nearness: Counter[str] = Counter()
    for each in rounds:
        for copy in each.copies:
            by_nearness[copy.nearness] += copy.size_bytes
    rate = mesh.conductor.pace.bytes_per_s
    rates = CopyRates(rate, rate, rate, ROUND_COST_S)
    copies = sum(len(each.copies) for each in rounds)
    return PlanView(True, 0, len(rounds), copies, dict(by_nearness), expected_seconds(rounds, rates), "")


def drain_problem(mesh: Mesh, rank: int) -> str:
    """Why the other shards cannot take over from the shard at `rank`; empty if they can."""
    draining = {seat.rank for seat in mesh.roster.seats if seat.draining}
    others = {other: each for other, each in mesh.holdings.ranks.items() if other != rank and other not in draining}
    slots, needed = sum(each.num_slots for each in others.values()), mesh.model.num_experts
    if slots < needed:
        return f"without rank {rank}, {len(others)} shards have {slots} slots in a layer for {needed} experts"
    return ""


def on_ranks_at_hand(mesh: Mesh, planned: Placement) -> Placement:
    """A placement planned for ranks 0 and up, on the ranks that shards have, where they need the fewest copies."""
    seats = [seat for seat in mesh.roster.seats if not seat.draining]
    if planned.num_ranks != len(seats):
        raise ConfigError(f"placement: it is for {planned.num_ranks} ranks, there are {len(seats)} shards by now")
    num_ranks, (num_layers, width) = mesh.num_ranks, (planned.num_layers, planned.slots_per_rank)
    map_LRs = np.full((num_layers, num_ranks, width), EMPTY, np.int32)
    kinds: list[tuple[object, ...]] = [("no shard", rank) for rank in range(num_ranks)]
    speed_R = np.ones(num_ranks)
    given_LRs = planned.physical_to_logical_map.reshape(num_layers, planned.num_ranks, width)
    for index, seat in enumerate(seats):
        map_LRs[:, seat.rank] = given_LRs[:, index]
        speed_R[seat.rank] = planned.speed_R[index]
        kinds[seat.rank] = (seat.num_slots, seat.node_id if planned.num_nodes > 1 else "", speed_R[seat.rank])
    target = Placement(num_ranks, 1, planned.num_experts, map_LRs.reshape(num_layers, -1), speeds=tuple(speed_R))
    return relabel(mesh.holdings.held_placement(num_ranks), target, kinds)
