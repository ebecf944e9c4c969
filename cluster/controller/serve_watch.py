"""What Serve says about the shards: how many it wants, and how many ran when the controller began."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from cluster.config.deployments import SHARD
from cluster.mesh.mesh import Mesh
from cluster.ray_joints import replicas_of

logger = logging.getLogger("ray.serve")

ASK_SERVE_S = 1.0  # while the answer decides something


class ServeWatch:
    """Keeps `Mesh.wanted` up to date, and settles a controller that has just started."""

    def __init__(self, mesh: Mesh, app_name: str, now_s: float, on_news: Callable[[], None]) -> None:
        self._mesh = mesh
        self._app_name = app_name
        self._start_s = now_s
        self._on_news = on_news
        self._running: int | None = None  # shards that ran when this life of the controller began

    async def follow(self) -> None:
        """Ask again and again, until cancelled."""
        while True:
            if self._of_interest:
                counts = await asyncio.to_thread(replicas_of, self._app_name, SHARD)
                if counts is not None:
                    self._mesh.wanted = counts.wanted
                    if self._running is None:
                        self._running = counts.running
                    self._on_news()
            await asyncio.sleep(ASK_SERVE_S)

    async def any_shard_runs(self) -> bool:
        """Whether Serve knows a shard that runs, or one has told the controller."""
        counts = await asyncio.to_thread(replicas_of, self._app_name, SHARD)
        return bool(self._mesh.holdings.ranks) or (counts is not None and counts.running > 0)

    def settle(self, now_s: float) -> None:
        """See whether all who served before this life of the controller have come back, or had time to."""
        mesh = self._mesh
        if mesh.settled:
            return
        late = now_s - self._start_s >= mesh.live.membership.lost_after_s
        back = self._running is not None and len(mesh.holdings.ranks) >= self._running
        if late or back:
            mesh.settled = True
            mesh.open = bool(mesh.holdings.ranks)  # they serve already, however many there are

    @property
    def _of_interest(self) -> bool:
        mesh = self._mesh
        ranks = {seat.rank for seat in mesh.roster.seats if not seat.draining}
        # Shards that have left within a second were never asked about, and the autopilot waits for those Serve wants.
        other = mesh.wanted is not None and mesh.wanted != len(ranks)
        return not mesh.settled or mesh.keeper.target is None or ranks != mesh.keeper.ranks or other
