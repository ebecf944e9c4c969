"""What `ControllerClient` offers, in front of a simulated mesh; time passes there with every status asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cluster.config.parse import ConfigError
from cluster.controller import views
from cluster.controller.client import ControllerLostError
from cluster.controller.history import History
from cluster.mesh.messages import ControllerStatus, HistoryEntry, PlacementView, PlanView
from placement.placement import Placement
from tests.support.simulated.mesh import SimulatedMesh


@dataclass(frozen=True)
class Done:
    """Exit status and output of one command."""

    status: int
    out: str
    err: str


Run = Callable[..., Done]


class SimulatedClient:
    """`silent`: so many calls of `status` get no answer."""

    def __init__(self, mesh: SimulatedMesh, step_s: float = 0.2) -> None:
        self.mesh, self.step_s = mesh, step_s
        self.silent = 0
        self.asked = 0
        self._history = History()

    async def status(self, *, timeout_s: float) -> ControllerStatus:
        self.asked += 1
        self.mesh.step(self.step_s)
        if self.silent:
            self.silent -= 1
            raise ControllerLostError(f"the placement controller did not answer status in {timeout_s} s")
        self._history.note(self._mesh.keeper.target, self._mesh.conductor, self.mesh.now_s)
        problem = self._mesh.keeper.problem or self._mesh.conductor.problem
        return views.status(self._mesh, f"life{self.mesh.lives}", {}, problem, "", self.mesh.now_s)

    async def placement(self, *, timeout_s: float) -> PlacementView:
        return views.placement(self._mesh)

    async def apply(self, placement: Placement, dry_run: bool, *, timeout_s: float) -> PlanView:
        try:
            view = views.plan(self._mesh, placement)
        except (ConfigError, ValueError) as error:
            return PlanView(False, 0, 0, 0, {}, 0.0, str(error))
        if dry_run:
            return view
        version = self._mesh.set_target(placement, "command").version
        self._mesh.advance(self.mesh.now_s)
        return PlanView(True, version, view.rounds, view.copies, view.bytes_by_nearness, view.expected_s, "")

    async def drain(self, rank: int, back: bool, *, timeout_s: float) -> str:
        seat = self._mesh.roster.at(rank)
        assert seat is not None
        if back:
            self._mesh.undrain(seat, self.mesh.now_s)
            return ""
        why_not = views.drain_problem(self._mesh, rank)
        if not why_not:
            self._mesh.drain(seat, "told to", self.mesh.now_s)
        return why_not

    async def pause(self, paused: bool, *, timeout_s: float) -> None:
        self._mesh.conductor.pause(paused)

    async def history(self, *, timeout_s: float) -> list[HistoryEntry]:
        return self._history.entries

    @property
    def _mesh(self):  # type: ignore[no-untyped-def]
        return self.mesh.mesh
