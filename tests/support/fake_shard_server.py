"""A `ShardServer` that holds experts in name only, and loads and copies when the test lets it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from experts.protocol.membership import ShardEndpoint
from experts.protocol.orders import CopyOrder, CopyResult
from experts.protocol.secret import MeshSecret
from experts.protocol.status import ShardStatus
from placement.placement import Placement
from tests.support.serve.statuses import shard_status
from tests.support.waiting import AWAIT_S


class FakeShardServer:
    """`done` lists what it was told to do, in order."""

    expert_bytes = 10

    def __init__(self, settings: Any, secret: MeshSecret | None = None) -> None:
        self.secrets: list[MeshSecret | None] = [secret]  # in the order told
        self.num_slots = settings.slots_per_rank
        self.endpoint: ShardEndpoint | None = None
        self.loading, self.may_listen, self.may_copy = threading.Event(), threading.Event(), threading.Event()
        self.may_copy.set()
        self.facts: dict[str, Any] = {}
        self.done: list[tuple[Any, ...]] = []
        self.failing: Exception | None = None  # what the next copy raises
        self.fails: Exception | None = None  # what loading raises
        self.stopped = False
        self.slots_Ls = np.empty((0, 0), np.int32)

    def start(self, placement: Placement, rank: int, epoch: int) -> ShardEndpoint:
        self.load(placement, rank)
        return self.listen(rank, epoch)

    def load(self, placement: Placement, rank: int, *, load_LE: np.ndarray | None = None) -> None:
        self.load_LE = load_LE
        self.loading.set()
        assert self.may_listen.wait(AWAIT_S)
        if self.fails is not None:
            raise self.fails
        row_Ls = placement.experts_of_rank(rank)
        self.slots_Ls = np.full((placement.num_layers, self.num_slots), -1, np.int32)
        self.slots_Ls[:, : row_Ls.shape[1]] = row_Ls
        self.done.append(("start", rank, int((row_Ls >= 0).sum())))

    def listen(self, rank: int, epoch: int) -> ShardEndpoint:
        self.endpoint = ShardEndpoint(rank, "mine", "127.0.0.1", 1000, "host", 1)
        return self.endpoint

    def use_secret(self, secret: MeshSecret) -> None:
        self.secrets.append(secret)

    def held_Ls(self) -> np.ndarray:
        return self.slots_Ls

    def release(self, pairs: Iterable[tuple[int, int]]) -> int:
        for layer, expert in pairs:
            self.slots_Ls[layer][self.slots_Ls[layer] == expert] = -1
            self.done.append(("release", layer, expert))
        return 0

    def copy(
        self,
        orders: Sequence[CopyOrder],
        on_done: Callable[[CopyResult], None],
        *,
        max_bytes_per_s: float | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        assert self.may_copy.wait(AWAIT_S)
        if self.failing is not None:
            failing, self.failing = self.failing, None
            raise failing
        for order in orders:
            if cancelled():
                return
            row_s = self.slots_Ls[order.layer]
            if order.expert not in row_s:
                row_s[np.flatnonzero(row_s < 0)[0]] = order.expert
            self.done.append(("copy", order.layer, order.expert, max_bytes_per_s))
            on_done(CopyResult(order.layer, order.expert, "shm", 10, 0.1))

    def status(self) -> ShardStatus:
        assert self.endpoint is not None
        return shard_status(self.endpoint.rank, "mine", **self.facts)

    def stop(self) -> None:
        self.stopped = True
