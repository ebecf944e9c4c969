"""When a placement is planned: at a cold start once all shards are here, and when the settings of the policy change."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from cluster.controller import views
from cluster.mesh.mesh import Mesh
from cluster.mesh.planning import ShardsAtHand, plan_in_a_process, slots_to_allocate

logger = logging.getLogger("ray.serve")

Occasion = Literal["first", "config"]


class Planner:
    """Plans in the background, one placement at a time, and gives the mesh its targets.

    `slots_per_rank` is what the config asks for; `on_target` is called when a target was set. `refusal`: what the
    controller lacks for a cold start, empty if nothing.
    """

    def __init__(
        self, mesh: Mesh, slots_per_rank: int | None, on_target: Callable[[], None], refusal: str = ""
    ) -> None:
        self.refusal = refusal
        """Why no shard may join: no placement can be made for a cold start, or what was given. One line; or empty."""
        self.problem = ""
        """Why the settings of the policy are not followed, one line; empty if they are."""
        self._mesh = mesh
        self._slots_per_rank = slots_per_rank
        self._on_target = on_target
        self._task: asyncio.Task[None] | None = None

    @property
    def busy(self) -> str:
        """What is planned at the moment, one line; empty if nothing is."""
        return "" if self._task is None else "a placement is planned for the config"

    def plan_first(self, now_s: float) -> None:
        """Plan for a cold start if all shards are here."""
        if self._task is None and self._mesh.keeper.target is None and not self.refusal:
            shards = self._mesh.gather(now_s)
            if shards is not None:
                self._begin(replace(shards, slots_per_rank=self._slots_per_rank), "first")

    def plan_if_changed(self) -> None:
        """Plan anew if the policy is another than the target's."""
        target = self._mesh.keeper.target
        if self._task is not None or target is None or not (self._mesh.settled and self._mesh.holdings.ranks):
            return
        if target.policy != views.policy_digest(self._mesh.live):
            self._begin(self._mesh.seating.shards_at_hand(), "config")

    def _begin(self, shards: ShardsAtHand, occasion: Occasion) -> None:
        self._task = asyncio.create_task(self._plan(shards, occasion))

    async def _plan(self, shards: ShardsAtHand, occasion: Occasion) -> None:
        mesh, section, policy = self._mesh, self._mesh.live.placement, views.policy_digest(self._mesh.live)
        try:
            plan = await plan_in_a_process(section, mesh.model, shards)
            placement = plan.placement
            if occasion == "first":
                mesh.num_slots = slots_to_allocate(section, placement, shards)
            else:
                placement = views.on_ranks_at_hand(mesh, placement)
        except Exception as error:
            logger.error("no placement: %s", error)
            if occasion == "first":
                self.refusal = str(error)
            else:
                self.problem = str(error)
                mesh.keeper.keep_policy(policy)  # so that it is not planned again and again
        else:
            self.problem = ""
            mesh.set_target(placement, occasion, policy, plan.load_LE)
        finally:
            self._task = None
        self._on_target()
        self.plan_if_changed()  # the settings may have changed meanwhile
