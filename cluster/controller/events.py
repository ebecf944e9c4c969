"""What happened to the mesh, for people: found by comparing it with how it was at the last look."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from cluster.mesh.mesh import Mesh
from cluster.mesh.messages import MeshEvent
from cluster.mesh.roster import Seat

LONGEST = 200
DRAINING = {
    "": "it takes experts again",
    "stops": "it stops, and hands on its experts first",
    "told to": "it drains, as it was told to",
}


@dataclass(frozen=True)
class _Seen:
    """A seat as it was at the last look."""

    shard_id: str
    incarnation: str  # empty while the shard starts
    given_up: bool
    draining: str

    @classmethod
    def of(cls, seat: Seat) -> _Seen:
        incarnation = "" if seat.endpoint is None else seat.endpoint.incarnation
        return cls(seat.shard_id, incarnation, seat.given_up_s is not None, seat.draining)


class EventLog:
    """The events of one life of the controller, oldest first. Times are seconds since 1970."""

    def __init__(self) -> None:
        self._events: deque[MeshEvent] = deque(maxlen=LONGEST)
        self._seen: dict[int, _Seen] = {}
        self._routers: frozenset[str] = frozenset()
        self._lost_at: dict[int, float] = {}  # when a rank was last given up or taken out
        self._epoch, self._target_version, self._unserved = -1, 0, 0
        self._first_epoch = 0  # of the event of kind "epoch" that may go on
        self._number = 0

    @property
    def events(self) -> list[MeshEvent]:
        """A copy."""
        return list(self._events)

    def note(self, mesh: Mesh, now: float) -> None:
        """Look at the mesh."""
        if not self._number:
            self._add("start", "the placement controller starts", mesh, now)
        now_seen = {seat.rank: _Seen.of(seat) for seat in mesh.roster.seats}
        if now_seen != self._seen:
            for rank in sorted(self._seen.keys() | now_seen.keys()):
                self._compare(rank, self._seen.get(rank), now_seen.get(rank), mesh, now)
            self._seen = now_seen
        self._note_routers(mesh, now)
        target = mesh.keeper.target
        if target is not None and target.version != self._target_version:
            self._add("target", f"target {target.version}: {target.origin}", mesh, now)
            self._target_version = target.version
        if mesh.roster.epoch != self._epoch:
            self._note_epoch(mesh, now)

    def _note_routers(self, mesh: Mesh, now: float) -> None:
        routers = mesh.routers.ids
        if routers == self._routers:
            return
        for name in sorted(routers - self._routers):
            self._add("router", f"router {name} follows the mesh", mesh, now)
        for name in sorted(self._routers - routers):
            self._add("router", f"router {name} is gone", mesh, now)
        self._routers = routers

    def _note_epoch(self, mesh: Mesh, now: float) -> None:
        """After what else a look found, which has the same epoch and says why it rose."""
        self._epoch = mesh.roster.epoch
        if mesh.open:
            unserved = mesh.unserved
            if unserved and unserved != self._unserved:
                self._add("unserved", f"{unserved} experts are served by no shard; routers compute them", mesh, now)
            elif self._unserved and not unserved:
                self._add("served", "every expert is served again", mesh, now)
            self._unserved = unserved
        last = self._events[-1]
        if last.kind == "epoch":  # while experts move, epochs follow one another several times a second
            self._events.pop()
            text = f"what is published changes, from epoch {self._first_epoch}"
            self._add("epoch", text, mesh, now)
        elif last.epoch != self._epoch:
            self._first_epoch = self._epoch
            self._add("epoch", "what is published changes", mesh, now)

    def _compare(self, rank: int, old: _Seen | None, new: _Seen | None, mesh: Mesh, now: float) -> None:
        if old is not None and (new is None or new.shard_id != old.shard_id):
            if old.draining == "stops":
                self._add("left", "it handed on its experts and stopped", mesh, now, rank)
            elif old.incarnation:
                self._lost_at.setdefault(rank, now)
                self._add("lost", "its process is gone, or silent for too long; it is taken out", mesh, now, rank)
            old = None
        if new is None:
            return
        if old is None and not new.incarnation:
            self._add("join", "a shard starts", mesh, now, rank)
        if new.incarnation and (old is None or old.incarnation != new.incarnation):
            self._add("serve", f"it serves{self._after(rank, now)}", mesh, now, rank)
        elif old is not None and new.given_up and not old.given_up:
            self._lost_at[rank] = now
            self._add("lost", "a router gave it up and goes on without it", mesh, now, rank)
        elif old is not None and old.given_up and not new.given_up:
            self._add("back", f"it is alive; routers try it again{self._after(rank, now)}", mesh, now, rank)
        if new.draining != ("" if old is None else old.draining):
            self._add("drain", DRAINING[new.draining], mesh, now, rank)

    def _after(self, rank: int, now: float) -> str:
        """How long the rank was away, if it was."""
        since = self._lost_at.pop(rank, None)
        return "" if since is None else f", {now - since:.1f} s after the loss"

    def _add(self, kind: str, text: str, mesh: Mesh, now: float, rank: int | None = None) -> None:
        self._number += 1
        self._events.append(MeshEvent(self._number, now, kind, text, mesh.roster.epoch, rank))
