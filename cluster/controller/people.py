"""What the console, the command and tests ask of the controller, and tell it."""

from __future__ import annotations

import time

from cluster.autopilot.messages import Decision
from cluster.config.parse import ConfigError
from cluster.controller import views
from cluster.controller.autopilot import Autopilot
from cluster.controller.events import EventLog
from cluster.controller.history import History
from cluster.controller.planner import Planner
from cluster.mesh.mesh import Mesh
from cluster.mesh.messages import ControllerStatus, HistoryEntry, PlacementView, PlanView, WatchView
from experts.protocol.status import ShardStatus
from placement.placement import Placement

LAST = 20  # targets and decisions that the live page shows


class PeopleCalls:
    """Calls of `PlacementController`, which has the state."""

    _mesh: Mesh
    _autopilot: Autopilot
    _planner: Planner
    _history: History
    _events: EventLog
    _term: str
    _shard_status: dict[int, ShardStatus]

    async def status(self) -> ControllerStatus:
        """Who is where."""
        return views.status(
            *(self._mesh, self._term, self._shard_status, self._problem, self._planner.refusal, time.monotonic()),
            autopilot=self._autopilot.view(),
        )

    async def placement(self) -> PlacementView:
        """What is published, the target, and the experts of each rank."""
        return views.placement(self._mesh)

    async def apply(self, placement: Placement, dry_run: bool) -> PlanView:
        """Work towards a placement, or say what that would take. Not accepted if it does not fit the shards."""
        try:
            view = views.plan(self._mesh, placement)
        except (ConfigError, ValueError) as error:
            return PlanView(False, 0, 0, 0, {}, 0.0, str(error))
        if dry_run:
            return view
        target = self._mesh.set_target(placement, "command")
        self._advance()
        return PlanView(True, target.version, view.rounds, view.copies, view.bytes_by_nearness, view.expected_s, "")

    async def drain(self, rank: int, back: bool = False) -> str:
        """Let the other shards take over what the shard at `rank` has; `back` undoes it. Returns why not, or ""."""
        seat = self._mesh.roster.at(rank)
        if seat is None or not seat.serving:
            return f"no shard serves at rank {rank}; there are {sorted(self._mesh.holdings.ranks)}"
        if back:
            if seat.draining == "stops":
                return f"the shard at rank {rank} stops"
            self._mesh.undrain(seat, time.monotonic())
        else:
            why_not = views.drain_problem(self._mesh, rank)
            if why_not:
                return why_not
            self._mesh.drain(seat, "told to", time.monotonic())
        self._announce()
        return ""

    async def pause(self, paused: bool) -> None:
        """Stop moving experts after the round at hand, or go on."""
        self._mesh.conductor.pause(paused)
        self._advance()

    async def watch(self, term: str, epoch: int) -> WatchView:
        """What the live page shows. Where experts are is left out for who knows it of `epoch` in this life, `term`."""
        same = (term, epoch) == (self._term, self._mesh.roster.epoch)
        return WatchView(
            status=await self.status(),
            published=None if same else views.published(self._mesh),
            history=self._history.entries[-LAST:],
            decisions=self._autopilot.decisions[-LAST:],
            events=self._events.events,
        )

    async def history(self) -> list[HistoryEntry]:
        """The targets of this controller's life, oldest first."""
        return self._history.entries

    async def decisions(self) -> list[Decision]:
        """What the autopilot planned in this controller's life and what came of it, oldest first."""
        return self._autopilot.decisions

    # What `PlacementController` brings along; a class without them fails at the first call.

    @property
    def _problem(self) -> str:
        raise NotImplementedError

    def _advance(self) -> None:
        raise NotImplementedError

    def _announce(self) -> None:
        raise NotImplementedError
