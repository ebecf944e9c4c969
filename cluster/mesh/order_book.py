"""The orders that shards have to carry out, in the order in which they were given."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from cluster.mesh.holdings import Holdings, Pair
from cluster.mesh.messages import ShardOrder
from experts.protocol.orders import CopyOrder

Key = tuple[int, int, int]  # rank, layer, expert


class OrderBook:
    """Orders by rank, and which releases are among them. Versions count up over all ranks."""

    def __init__(self, holdings: Holdings) -> None:
        self.last_version = 0
        self.releasing: set[Key] = set()
        """What shards were told to release and still hold, as far as is known."""
        self._holdings = holdings
        self._orders: dict[int, list[ShardOrder]] = defaultdict(list)

    def add(self, rank: int, release: Sequence[Pair], copy: Sequence[CopyOrder], max_bytes_per_s: float | None) -> None:
        """One more order for the shard at `rank`."""
        self.last_version += 1
        self._orders[rank].append(ShardOrder(self.last_version, tuple(release), tuple(copy), max_bytes_per_s))

    def next(self, rank: int, known_version: int) -> ShardOrder | None:
        """The first order after `known_version`; those before it are done."""
        orders = self._orders.get(rank, [])
        while orders and orders[0].version <= known_version:
            orders.pop(0)
        return orders[0] if orders else None

    def forget(self, rank: int) -> None:
        """Another shard is at `rank`, or none."""
        self._orders.pop(rank, None)
        self.releasing = {key for key in self.releasing if key[0] != rank}

    def held(self, rank: int, held_LE: np.ndarray) -> None:
        """What the shard at `rank` holds now."""
        self.releasing = {key for key in self.releasing if key[0] != rank or held_LE[key[1], key[2]]}

    def take_releases(self, rank: int, routers_epoch: int) -> list[Pair]:
        """Experts that the shard may release, since no router is below `routers_epoch`, and was not told to yet."""
        pairs: Iterable[Pair] = self._holdings.releasable(rank, routers_epoch)
        fresh = [pair for pair in pairs if (rank, *pair) not in self.releasing]
        self.releasing.update((rank, *pair) for pair in fresh)
        return fresh
