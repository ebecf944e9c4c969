"""One layer of a migration: which slots may be written next, from where, and how to break a cycle.

R ranks, s slots of a rank. A slot is settled (its expert belongs there), leaving (it does not), or empty. A parked slot
is a leaving one that keeps its expert until that has arrived where it belongs. A pinned slot is a source of this round.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from placement.placement import EMPTY

Slot = tuple[int, int]  # rank, local slot
Arrival = tuple[int, Slot, bool]  # expert, where it is written, whether it belongs there


class MigrationError(ValueError):
    """A migration that cannot be done as asked. The message is one line for a person."""


class LayerState:
    """What one layer holds and wants between rounds, and what the round in work has taken from it.

    `start` and `target` are the experts of each rank, -1 empty; `room` the slots of each rank.
    """

    def __init__(
        self, index: int, start: list[list[int]], target: list[list[int]], room: list[int], num_experts: int
    ) -> None:
        self.index = index
        self.num_wanted = 0
        self._wanted: Counter[tuple[int, int]] = Counter()  # rank, expert
        self._holds: dict[Slot, int] = {}
        self._settled: set[Slot] = set()
        self._parked: set[Slot] = set()
        self._pinned: set[Slot] = set()
        self._slots_of: list[set[Slot]] = [set() for _ in range(num_experts)]  # live ones, without those retired
        self._empty: list[list[int]] = []  # by rank, the lowest last
        self._leaving: list[set[int]] = [set() for _ in room]
        for rank, (held, wanted, slots) in enumerate(zip(start, target, room, strict=True)):
            left = [expert for expert in wanted if expert != EMPTY]
            empty = []
            for slot, expert in enumerate(held):
                at = (rank, slot)
                if expert == EMPTY:
                    if slot < slots:
                        empty.append(slot)
                    continue
                self._holds[at] = expert
                self._slots_of[expert].add(at)
                if expert in left:
                    left.remove(expert)
                    self._settled.add(at)
                else:
                    self._leaving[rank].add(slot)
            empty.reverse()
            self._empty.append(empty)
            for expert in left:
                self._wanted[rank, expert] += 1
            self.num_wanted += len(left)

    @property
    def num_slots(self) -> int:
        return len(self._holds) + sum(map(len, self._empty))

    @property
    def done(self) -> bool:
        """Whether the layer holds what the target wants, and nothing else."""
        return not self.num_wanted and not any(self._leaving)

    @property
    def arrivals(self) -> Iterable[tuple[int, int]]:
        """Rank and expert of each copy that is wanted."""
        return self._wanted.elements()

    def wants(self, rank: int, expert: int) -> bool:
        return self._wanted[rank, expert] > 0

    def holders(self, expert: int) -> set[Slot]:
        """The live slots of an expert, those of this round's arrivals left out."""
        return self._slots_of[expert]

    def frees_a_slot(self, expert: int) -> bool:
        """Whether an expert's last slot is one that it leaves."""
        holders = self._slots_of[expert]
        return len(holders) == 1 and all(self.is_leaving(slot) for slot in holders)

    def is_leaving(self, slot: Slot) -> bool:
        return slot[1] in self._leaving[slot[0]]

    def slot_to_write(self, rank: int) -> Slot | None:
        """The slot of a rank to write next: an empty one, else that of the expert with most other live slots."""
        if self._empty[rank]:
            return (rank, self._empty[rank][-1])
        best: Slot | None = None
        best_copies = 1
        for local in sorted(self._leaving[rank]):
            slot = (rank, local)
            copies = len(self._slots_of[self._holds[slot]])
            if copies > best_copies and self._may_go(slot):
                best, best_copies = slot, copies
        return best

    def _may_go(self, slot: Slot) -> bool:
        """Whether a leaving slot's expert has another live slot; for a parked slot, one where it belongs."""
        if slot in self._pinned:
            return False
        others = self._slots_of[self._holds[slot]] - {slot}
        return any(other in self._settled for other in others) if slot in self._parked else bool(others)

    def take(self, slot: Slot, source: Slot | None) -> bool:
        """Prepare a slot to be written in this round, from a source that must stay. Returns whether it retires."""
        if source is not None:
            self._pinned.add(source)
        rank, local = slot
        if slot in self._holds:
            self._slots_of[self._holds.pop(slot)].discard(slot)
            self._leaving[rank].discard(local)
            self._parked.discard(slot)
            return True
        self._empty[rank].remove(local)
        return False

    def choose_parking(self, ranks: Iterable[int], distance: Callable[[int, int], int]) -> tuple[Slot, Slot] | None:
        """Where every slot that must make room holds a last replica: one of those, and the spare slot to copy it to.

        `ranks` are those that wait for a slot, the most urgent first. None if no slot is spare.
        """
        leaving = [(rank, local) for rank in ranks for local in sorted(self._leaving[rank])]
        if not leaving:
            return None
        # A parked expert is moved on only if all that wait, wait for slots of parked ones.
        blocked = next((slot for slot in leaving if slot not in self._parked), leaving[0])
        expert = self._holds[blocked]
        spares = [(rank, local) for rank, slots in enumerate(self._empty) for local in slots]
        spares += [
            (rank, local)
            for rank, slots in enumerate(self._leaving)
            for local in slots
            if (rank, local) != blocked and self._may_go((rank, local))
        ]
        if not spares:
            # Costs two more copies: a replica makes way and comes back.
            spares = [
                slot for slot in self._settled
                if len(self._slots_of[self._holds[slot]]) > 1 and slot not in self._pinned
            ]  # fmt: skip
        if not spares:
            return None
        self._parked.discard(blocked)

        def price(slot: Slot) -> tuple[bool, int, Slot]:
            return not self.wants(slot[0], expert), distance(blocked[0], slot[0]), slot

        return blocked, min(spares, key=price)

    def borrow(self, slot: Slot) -> int:
        """Prepare a spare slot for parking. Returns the expert that has to come back to its rank, -1 for none."""
        replica = self._holds[slot] if slot in self._settled else EMPTY
        if replica != EMPTY:
            self._settled.discard(slot)
            self._wanted[slot[0], replica] += 1
            self.num_wanted += 1
        return replica

    def expert_in(self, slot: Slot) -> int:
        return self._holds[slot]

    def claim(self, rank: int, expert: int) -> bool:
        """Count a copy that is made as arrived. Returns whether its rank wants it, else it is parked there."""
        if not self.wants(rank, expert):
            return False
        self._wanted[rank, expert] -= 1
        self.num_wanted -= 1
        return True

    def arrive(self, arrivals: list[Arrival]) -> set[int]:
        """End a round. Returns the ranks that may have a slot to write again."""
        self._pinned.clear()
        for expert, slot, belongs in arrivals:
            self._holds[slot] = expert
            self._slots_of[expert].add(slot)
            self._parked.discard(slot)
            if belongs:
                self._settled.add(slot)
            else:
                self._parked.add(slot)
                self._leaving[slot[0]].add(slot[1])
        return {slot[0] for expert, *_ in arrivals for slot in self._slots_of[expert] if self.is_leaving(slot)}

    def drop_leaving(self) -> list[Slot]:
        """Empty the slots that do not belong, once all that is wanted has arrived."""
        dropped = [(rank, local) for rank, slots in enumerate(self._leaving) for local in sorted(slots)]
        for rank, local in dropped:
            self._slots_of[self._holds.pop((rank, local))].discard((rank, local))
            self._parked.discard((rank, local))
            self._leaving[rank].discard(local)
            self._empty[rank].append(local)
        return dropped
