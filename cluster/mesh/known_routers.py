"""What routers said in their last poll: the controller's memory of them, without Ray or a clock."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.mesh.messages import RouterView


@dataclass(frozen=True)
class KnownRouter:
    """One router's last poll."""

    epoch: int
    lost: dict[int, str]  # incarnation of each shard it has given up, by rank
    seen_s: float  # when the poll began


class KnownRouters:
    """Routers by id. Times are seconds on any monotonic clock that the caller reads."""

    def __init__(self) -> None:
        self._routers: dict[str, KnownRouter] = {}

    @property
    def ids(self) -> frozenset[str]:
        """Those that are known."""
        return frozenset(self._routers)

    def note(self, router_id: str, epoch: int, lost: dict[int, str], now_s: float) -> None:
        """The router polls, at `epoch`."""
        self._routers[router_id] = KnownRouter(epoch, lost, now_s)

    def forget(self, router_id: str) -> None:
        """The router stops. Does nothing if it is not known."""
        self._routers.pop(router_id, None)

    def forget_silent(self, now_s: float, after_s: float) -> None:
        """Forget routers that have not polled for `after_s`."""
        self._routers = {name: router for name, router in self._routers.items() if router.seen_s > now_s - after_s}

    def behind(self, epoch: int, now_s: float, lost_after_s: float) -> list[str]:
        """Ids of the routers below `epoch` that polled within `lost_after_s`."""
        return [
            name
            for name, router in self._routers.items()
            if router.epoch < epoch and router.seen_s > now_s - lost_after_s
        ]

    def lowest_epoch(self, now_s: float, lost_after_s: float) -> float:
        """The lowest epoch of a router that polled within `lost_after_s`; infinite if there is none."""
        epochs = [router.epoch for router in self._routers.values() if router.seen_s > now_s - lost_after_s]
        return min(epochs, default=float("inf"))

    def views(self, now_s: float) -> dict[str, RouterView]:
        """The routers by id, for the status."""
        return {
            name: RouterView(router.epoch, router.lost, now_s - router.seen_s) for name, router in self._routers.items()
        }
