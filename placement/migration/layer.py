"""One layer of a migration: which slots may be written next, from where, and how to break a cycle.

R ranks, s slots of a rank. A slot is settled (its expert belongs there), leaving (it does not), or empty. A parked slot
is a leaving one that keeps its expert until that has arrived where it belongs.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from placement.placement import EMPTY

Slot = tuple[int, int]  # rank, local slot


class MigrationError(ValueError):
    """A migration that cannot be done as asked. The message is one line for a person."""


@dataclass(frozen=True)
class Move:
    """One copy within a layer; source -1, -1 is the checkpoint."""

    expert: int
    source_rank: int
    source_slot: int
    rank: int
    slot: int


@dataclass
class Step:
    """What one layer does in one round."""

    retired: list[Slot] = field(default_factory=list)
    moves: list[Move] = field(default_factory=list)
    dropped: list[Slot] = field(default_factory=list)


class LayerMigration:
    """The state of one layer between rounds; `advance` moves it on by one round.

    `start_Rs` and `target_Rs` int32 [R, s] (experts, -1 empty), `room_R` int64 [R], `distance_RR` int8 [R, R]. Raises
    MigrationError if no legal order exists.
    """

    def __init__(
        self,
        index: int,
        start_Rs: np.ndarray,
        target_Rs: np.ndarray,
        room_R: np.ndarray,
        num_experts: int,
        distance_RR: np.ndarray,
    ) -> None:
        self.index = index
        self._distance_RR = distance_RR
        self._holds: dict[Slot, int] = {}
        self._settled: set[Slot] = set()
        self._parked: set[Slot] = set()
        self._slots_of: list[set[Slot]] = [set() for _ in range(num_experts)]
        self._empty: list[set[int]] = []  # by rank
        self._leaving: list[set[int]] = []
        self._arriving: list[Counter[int]] = []
        for rank, (start, target) in enumerate(zip(start_Rs.tolist(), target_Rs.tolist(), strict=True)):
            wanted = Counter(expert for expert in target if expert != EMPTY)
            empty, leaving = set(), set()
            for slot, expert in enumerate(start):
                if expert == EMPTY:
                    if slot < room_R[rank]:
                        empty.add(slot)
                    continue
                self._holds[rank, slot] = expert
                self._slots_of[expert].add((rank, slot))
                if wanted[expert]:
                    wanted[expert] -= 1
                    self._settled.add((rank, slot))
                else:
                    leaving.add(slot)
            self._empty.append(empty)
            self._leaving.append(leaving)
            self._arriving.append(+wanted)
        num_slots = len(self._holds) + sum(map(len, self._empty))
        if self._needs_moves and num_slots <= num_experts and not self.has_orphans:
            raise MigrationError(
                f"layer {index}: {num_experts} experts fill all {num_slots} slots, so none can be written without "
                f"leaving an expert unserved; give shards slots_per_rank + 1 = {len(start_Rs[0]) + 1} slots "
                "(scratch_slots=1), or one of them a spare slot (room)"
            )

    @property
    def _needs_moves(self) -> bool:
        return any(self._arriving)

    @property
    def done(self) -> bool:
        """Whether the layer holds what the target wants."""
        return not self._needs_moves and not any(self._leaving)

    @property
    def has_orphans(self) -> bool:
        """Whether an expert has no live slot."""
        return not all(self._slots_of)

    def advance(self, max_moves: int) -> Step:
        """One round of at most `max_moves` copies."""
        step = Step()
        serving = [set(slots) for slots in self._slots_of]
        chosen: list[tuple[int, Slot]] = []
        if max_moves > 0 and self._needs_moves:
            self._choose_arrivals(serving, chosen, step, max_moves)
            if not chosen:
                self._choose_parking(serving, chosen, step)
        sent: Counter[int] = Counter()
        for expert, (rank, slot) in chosen:
            source = min(
                serving[expert],
                key=lambda at: (int(self._distance_RR[at[0], rank]), sent[at[0]], at),
                default=(-1, -1),
            )
            sent[source[0]] += 1
            step.moves.append(Move(expert, *source, rank, slot))
        self._apply(chosen, step)
        return step

    def _choose_arrivals(
        self, serving: list[set[Slot]], chosen: list[tuple[int, Slot]], step: Step, max_moves: int
    ) -> None:
        """Copy experts to where they belong: into empty slots first, then over experts that are live elsewhere too."""
        wanted = [(expert, rank) for rank, experts in enumerate(self._arriving) for expert in experts.elements()]
        # Unserved experts first, then those whose arrival frees another slot.
        wanted.sort(key=lambda pair: (len(serving[pair[0]]) > 0, len(serving[pair[0]]) > 1))
        for expert, rank in wanted:
            if len(chosen) >= max_moves:
                return
            slot = self._slot_to_write(rank, serving)
            if slot is None:
                continue
            self._take(slot, serving, step)
            chosen.append((expert, slot))

    def _slot_to_write(self, rank: int, serving: list[set[Slot]]) -> Slot | None:
        if self._empty[rank]:
            return (rank, min(self._empty[rank]))
        best: Slot | None = None
        best_copies = 1
        for local in sorted(self._leaving[rank]):
            slot = (rank, local)
            expert = self._holds[slot]
            if not self._may_go(slot, serving):
                continue
            if len(serving[expert]) > best_copies:
                best, best_copies = slot, len(serving[expert])
        return best

    def _may_go(self, slot: Slot, serving: list[set[Slot]]) -> bool:
        """Whether a leaving slot's expert has another live slot; for a parked slot, one where it belongs."""
        others = serving[self._holds[slot]] - {slot}
        if slot in self._parked:
            return any(other in self._settled for other in others)
        return bool(others) and slot in serving[self._holds[slot]]

    def _take(self, slot: Slot, serving: list[set[Slot]], step: Step) -> None:
        """Prepare a slot to be written in this round."""
        rank, local = slot
        if slot in self._holds:
            serving[self._holds[slot]].discard(slot)
            step.retired.append(slot)
            self._leaving[rank].discard(local)
        else:
            self._empty[rank].discard(local)

    def _choose_parking(self, serving: list[set[Slot]], chosen: list[tuple[int, Slot]], step: Step) -> None:
        """Every slot that must make room holds a last replica: copy one of those to the nearest spare slot."""
        blocked = [
            (rank, local)
            for rank, experts in enumerate(self._arriving)
            if experts
            for local in sorted(self._leaving[rank])
            if (rank, local) not in self._parked
        ]
        spares = [(0, (rank, local)) for rank, slots in enumerate(self._empty) for local in slots]
        spares += [
            (0, (rank, local))
            for rank, slots in enumerate(self._leaving)
            for local in slots
            if self._may_go((rank, local), serving)
        ]
        if not spares:
            # Costs two more copies: a replica makes way and comes back.
            spares = [(1, slot) for slot in self._settled if len(serving[self._holds[slot]]) > 1]
        if not blocked or not spares:
            raise MigrationError(
                f"layer {self.index}: no slot is spare, so no expert can move; give shards slots_per_rank + 1 slots "
                "(scratch_slots=1)"
            )
        _, _, source, spare = min(
            (cost, int(self._distance_RR[source[0], spare[0]]), source, spare)
            for source in blocked
            for cost, spare in spares
        )
        replica = self._holds.get(spare) if spare in self._settled else None
        self._take(spare, serving, step)
        if replica is not None:
            self._settled.discard(spare)
            self._arriving[spare[0]][replica] += 1
        self._parked.add(spare)
        chosen.append((self._holds[source], spare))

    def _apply(self, chosen: list[tuple[int, Slot]], step: Step) -> None:
        for slot in step.retired:
            self._slots_of[self._holds.pop(slot)].discard(slot)
        parked_now = set()
        for expert, slot in chosen:
            rank, local = slot
            self._holds[slot] = expert
            self._slots_of[expert].add(slot)
            if slot in self._parked and self._arriving[rank][expert] == 0:
                parked_now.add(slot)
                self._leaving[rank].add(local)
                continue
            self._arriving[rank][expert] -= 1
            self._arriving[rank] = +self._arriving[rank]
            self._settled.add(slot)
        self._parked = {slot for slot in self._parked if slot[1] in self._leaving[slot[0]]} | parked_now
        if not self._needs_moves:
            for rank, slots in enumerate(self._leaving):
                for local in sorted(slots):
                    step.dropped.append((rank, local))
                    self._slots_of[self._holds.pop((rank, local))].discard((rank, local))
                    self._empty[rank].add(local)
                slots.clear()
