"""What the controller tells shards and routers for their statistics: the calls about how many there should be."""

from __future__ import annotations

import time
from functools import cached_property

from cluster.autoscaling.told import Pace, Paces, ScalingFacts, mean_pace
from cluster.mesh.mesh import Mesh


class ScalingDesk:
    """The part of the controller that routers tell their pace."""

    _mesh: Mesh

    @cached_property
    def _paces(self) -> Paces:
        return Paces()

    async def report_pace(self, router_id: str, pace: Pace) -> ScalingFacts:
        """A router says how fast it generates."""
        self._paces.note(router_id, pace, time.monotonic())
        return self.facts

    @property
    def facts(self) -> ScalingFacts:
        """What shards and routers hand to Serve's autoscaler."""
        return facts_of(self._mesh, self._paces, time.monotonic())


def facts_of(mesh: Mesh, paces: Paces, now_s: float) -> ScalingFacts:
    """The facts of this moment."""
    generating = paces.generating(now_s)
    placement = mesh.live.placement
    changing = any(seat.draining or not seat.serving for seat in mesh.roster.seats)
    return ScalingFacts(
        settings=mesh.live.scaling,
        pace=mean_pace(generating),
        routers=len(generating),
        experts=mesh.model.num_experts,
        copies=placement.min_replicas,
        spare_slots=placement.spare_slots,
        moving=mesh.conductor.moving or bool(mesh.missing) or changing,
    )
