"""From one placement to another in rounds of copies, with every expert served at every moment.

L layers, E experts, R ranks, s slots of a rank in the frame of the migration, S = R * s.

In a round, retired slots first leave the map that routers dispatch by. Once the last router has moved on, the round's
copies are written; then the map with the new slots, and without the dropped ones, is published. So a slot is written
only while nobody reads it, and every source is live and unchanged during the round: copies of one round may run in any
order or in parallel. The migration may stop for good between any two rounds.

This requires, in each layer:

- A slot is retired only if its expert has another live slot in the map that remains. Routers serve it from there.
- Where every slot that must make room holds the last replica of its expert (a cycle), one of those experts is parked:
  it is first copied to a spare slot. That is an empty slot, else one whose expert does not belong there and is live
  elsewhere, else a replica of an expert that has another one, which is restored afterwards.
- So there must be one slot more than there are experts. If as many slots as experts are all full, nothing can move
  without leaving an expert unserved, whatever the source. `plan_migration` then refuses and says that one spare slot on
  some shard is enough; one on every shard (`scratch_slots=1`: shards of `slots_per_rank + 1` slots) lets shards change
  in parallel, without parking.

A target says which experts a rank holds. Which of its slots they take is decided here, so experts that stay on a rank
are not copied. Only experts without a live slot, on ranks that were lost, come from the checkpoint.

A round costs what it does: copies wait in a heap by urgency, and those that have no slot beside their rank until one of
its slots may be written.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from placement.migration.frame import common_frame
from placement.migration.layer import Arrival, LayerState, MigrationError, Slot
from placement.migration.rounds import Copy, MigrationPlan, Nearness, Round
from placement.migration.urgency import Urgencies
from placement.placement import EMPTY, Placement
from placement.topology import Topology

UNBOUNDED = 1 << 62
_NEARNESS: tuple[Nearness, ...] = ("rank", "node", "rack", "cluster")
_CHECKPOINT: Slot = (-1, -1)
_Entry = tuple[int, int, float, int, int, int]  # tier, place of its layer, urgency; layer, rank, expert


class Migration:
    """The copies that turn `current` into `target`, one round at a time; who wants no more of it drops it.

    Args:
        current, target: of the same model; `current` may be partial. Ranks keep their numbers and may be anywhere in
            either. The target leaves a draining rank empty.
        expert_bytes: weights of one expert, one number for all layers or one for each.
        round_bytes: most bytes copied in one round; None: as many as the slots allow.
        rank_bytes: most bytes that one rank sends in a round, and most that it receives; None: no bound.
        room: slots of a layer that ranks have memory for, one number for all ranks or one for each, 0 for a rank that
            is not there; None: as in the larger placement. See `Topology.slots_per_rank`.
        scratch_slots: with `room` None, further slots that every rank has memory for. They are empty before and after,
            and let full shards exchange experts. 1 is enough for any migration.
        lost_ranks: ranks of `current` whose slots are gone; the target must leave them empty.
        topology: which ranks share a node or a rack; None: nodes as in the placements, one rack.
        layer_order: which layers go first, as far as their slots allow; None: none before another.
        load_LE: how much each expert is used [L, E], in any unit; None: all the same.
        value_LE: what a copy of each expert buys [L, E]; None: the load that it takes off the heaviest holder.

    The most valuable copies come first: experts that nobody holds, the most used of them first, then those that only a
    leaving rank holds, then what buys most per byte. Raises MigrationError, a ValueError of one line that names layer
    or rank, if the placements do not fit together or no legal order exists.
    """

    def __init__(
        self,
        current: Placement,
        target: Placement,
        *,
        expert_bytes: int | Sequence[int],
        round_bytes: int | None = None,
        rank_bytes: int | None = None,
        room: int | Sequence[int] | None = None,
        scratch_slots: int = 0,
        lost_ranks: Collection[int] = (),
        topology: Topology | None = None,
        layer_order: Sequence[int] | None = None,
        load_LE: np.ndarray | None = None,
        value_LE: np.ndarray | None = None,
    ) -> None:
        if scratch_slots < 0 or (scratch_slots and room is not None):
            raise MigrationError(f"scratch_slots is {scratch_slots}, expected 0 or more, and 0 where room is given")
        if scratch_slots:
            room = max(current.slots_per_rank, target.slots_per_rank) + scratch_slots
        self.frame = common_frame(current, target, room, lost_ranks, topology)
        self.num_experts = current.num_experts
        num_layers = current.num_layers
        sizes_L = np.broadcast_to(np.asarray(expert_bytes, np.int64), (num_layers,))
        if sizes_L.min() < 1:
            raise MigrationError(f"expert_bytes is {int(sizes_L.min())}, expected at least 1")
        for name, bound in (("round_bytes", round_bytes), ("rank_bytes", rank_bytes)):
            if bound is not None and bound < sizes_L.max():
                raise MigrationError(f"{name} is {bound}, less than one expert's {int(sizes_L.max())}")
        order = list(range(num_layers)) if layer_order is None else list(layer_order)
        if sorted(order) != list(range(num_layers)):
            raise MigrationError(f"layer_order must name each of {num_layers} layers once, got {order}")
        self._place = dict.fromkeys(order, 0) if layer_order is None else {layer: n for n, layer in enumerate(order)}
        self._sizes: list[int] = sizes_L.tolist()
        self._round_bytes = UNBOUNDED if round_bytes is None else round_bytes
        self._rank_bytes = UNBOUNDED if rank_bytes is None else rank_bytes
        self._distance: list[list[int]] = self.frame.distance_RR.tolist()
        start, wanted = self.frame.start_LRs, self.frame.target_LRs
        self._urgencies = Urgencies(start, wanted, sizes_L, self.num_experts, load_LE, value_LE)
        room_list = self.frame.room_R.tolist()
        self._layers = [
            LayerState(layer, held, want, room_list, self.num_experts)
            for layer, (held, want) in enumerate(zip(start.tolist(), wanted.tolist(), strict=True))
        ]
        self._ready: list[_Entry] = [
            self._entry(state.index, rank, expert) for state in self._layers for rank, expert in state.arrivals
        ]
        heapq.heapify(self._ready)
        # Copies without a slot, by layer and rank. They come back when a slot there may be written.
        self._waiting: list[dict[int, list[_Entry]]] = [{} for _ in self._layers]
        for state in self._layers:
            self._check_solvable(state)

    def _check_solvable(self, state: LayerState) -> None:
        slots, orphans = state.num_slots, any(not state.holders(e) for e in range(self.num_experts))
        if state.num_wanted and slots <= self.num_experts and not orphans:
            raise MigrationError(
                f"layer {state.index}: {self.num_experts} experts fill all {slots} slots, so none can be written "
                f"without leaving an expert unserved; give shards slots_per_rank + 1 = "
                f"{self.frame.start_LRs.shape[2] + 1} slots (scratch_slots=1), or one of them a spare slot (room)"
            )

    @property
    def done(self) -> bool:
        return all(state.done for state in self._layers)

    @property
    def copies_left(self) -> int:
        """Copies still to plan, those left out that only make room for others."""
        return sum(state.num_wanted for state in self._layers)

    @property
    def bytes_left(self) -> int:
        """Bytes of `copies_left`."""
        return sum(state.num_wanted * size for state, size in zip(self._layers, self._sizes, strict=True))

    def next_round(self) -> Round | None:
        """The next round, as if all before it had been carried out; None if nothing is left.

        Raises MigrationError if what is left has no legal order. All that could be done has been planned by then.
        """
        if self.done:
            return None
        work = _RoundInWork(self._round_bytes)
        put_off: list[_Entry] = []
        least = min(self._sizes)
        while self._ready and work.left >= least:
            entry = heapq.heappop(self._ready)
            tier, place, _, layer, rank, expert = entry
            state, size = self._layers[layer], self._sizes[layer]
            if not state.wants(rank, expert):
                continue
            if tier == 0 and state.holders(expert):
                # It is held again: this replica is no more urgent than others.
                heapq.heappush(self._ready, (2, place, 0.0, layer, rank, expert))
                continue
            if size > work.left or work.received[rank] + size > self._rank_bytes:
                put_off.append(entry)
                continue
            slot = state.slot_to_write(rank)
            if slot is None:
                self._waiting[layer].setdefault(rank, []).append(entry)
                continue
            source = self._source(state, expert, rank, work)
            if source is None:
                put_off.append(entry)
                continue
            self._copy(state, expert, source, slot, work)
        for entry in put_off:
            heapq.heappush(self._ready, entry)
        stuck = self._park(work)
        result = self._finish(work)
        if not result.copies and not result.dropped:
            raise MigrationError(
                f"layer {stuck}: no slot is spare, so no expert can move; give shards slots_per_rank + 1 slots "
                "(scratch_slots=1)"
            )
        return result

    def _entry(self, layer: int, rank: int, expert: int) -> _Entry:
        tier, urgency = self._urgencies.of(layer, expert, rank)
        return tier, self._place[layer], urgency, layer, rank, expert

    def _source(self, state: LayerState, expert: int, rank: int, work: _RoundInWork) -> Slot | None:
        """Where to copy an expert from: the nearest holder, of these the one that sends least; None: not this round."""
        holders = state.holders(expert)
        if not holders:
            # A further replica of what comes from the checkpoint is copied from there, once it has arrived.
            return None if (state.index, expert) in work.fetched else _CHECKPOINT
        size, distance = self._sizes[state.index], self._distance
        allowed = [slot for slot in holders if work.sent[slot[0]] + size <= self._rank_bytes]
        return min(
            allowed,
            key=lambda slot: (distance[slot[0]][rank], work.sent[slot[0]], state.is_leaving(slot), slot),
            default=None,
        )

    def _copy(self, state: LayerState, expert: int, source: Slot, slot: Slot, work: _RoundInWork) -> None:
        layer, size = state.index, self._sizes[state.index]
        nearness: Nearness = "checkpoint"
        if source == _CHECKPOINT:
            work.fetched.add((layer, expert))
            retires = state.take(slot, None)
        else:
            nearness = _NEARNESS[self._distance[source[0]][slot[0]]]
            retires = state.take(slot, source)
            work.sent[source[0]] += size
        if retires:
            work.retired.append((layer, *slot))
        work.copies.append(Copy(layer, expert, *source, *slot, size, nearness))
        work.arrivals[layer].append((expert, slot, state.claim(slot[0], expert)))
        work.received[slot[0]] += size
        work.left -= size

    def _park(self, work: _RoundInWork) -> int:
        """Break the cycle of each layer in which all copies wait for a slot. Returns a layer where none is spare."""
        stuck = -1
        for state, waiting in zip(self._layers, self._waiting, strict=True):
            layer, size = state.index, self._sizes[state.index]
            if not waiting or layer in work.arrivals or sum(map(len, waiting.values())) < state.num_wanted:
                continue
            if work.left < size:
                continue
            ranks = sorted(waiting, key=lambda rank: min(waiting[rank]))
            parking = state.choose_parking(ranks, lambda one, other: self._distance[one][other])
            if parking is None:
                stuck = layer
                continue
            source, spare = parking
            if max(work.sent[source[0]], work.received[spare[0]]) + size > self._rank_bytes:
                continue
            expert = state.expert_in(source)
            displaced = state.borrow(spare)
            if displaced != EMPTY:
                heapq.heappush(self._ready, self._entry(layer, spare[0], displaced))
            self._copy(state, expert, source, spare, work)
            work.parked.add(layer)
        return stuck

    def _finish(self, work: _RoundInWork) -> Round:
        for layer, arrivals in work.arrivals.items():
            state = self._layers[layer]
            for rank in state.arrive(arrivals):
                for entry in self._waiting[layer].pop(rank, ()):
                    tier, place, urgency, _, _, expert = entry
                    if layer in work.parked and state.frees_a_slot(expert):
                        urgency = -np.inf  # what goes on with the cycle; else the parking was for nothing
                    heapq.heappush(self._ready, (tier, place, urgency, layer, rank, expert))
        dropped = [
            (state.index, *slot) for state in self._layers if not state.num_wanted for slot in state.drop_leaving()
        ]
        return Round(tuple(work.retired), tuple(work.copies), tuple(dropped))


@dataclass
class _RoundInWork:
    left: int  # bytes
    sent: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))  # bytes by rank
    received: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))
    fetched: set[tuple[int, int]] = field(default_factory=set)  # layer, expert: from the checkpoint
    parked: set[int] = field(default_factory=set)  # layers
    retired: list[tuple[int, int, int]] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    arrivals: defaultdict[int, list[Arrival]] = field(default_factory=lambda: defaultdict(list))  # by layer


def plan_migration(current: Placement, target: Placement, **arguments: Any) -> MigrationPlan:
    """All rounds of a `Migration`, which has the same arguments, at once."""
    migration = Migration(current, target, **arguments)
    rounds = tuple(iter(migration.next_round, None))
    frame = migration.frame
    num_ranks = frame.start_LRs.shape[1]
    speeds = None if target.speeds is None else (*target.speeds, *(1.0,) * (num_ranks - target.num_ranks))
    return MigrationPlan(frame.num_nodes, frame.nodes, migration.num_experts, frame.start_LRs, rounds, speeds)


__all__ = ["Copy", "Migration", "MigrationError", "MigrationPlan", "Round", "plan_migration"]
