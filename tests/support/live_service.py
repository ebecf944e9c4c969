"""A service that is made up, behind the console's real app and a real HTTP server: for what a browser shows of it.

L layers, E experts, R ranks. The routing is drawn once; traffic goes on with the time that passes.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.routing import Mount

from cluster.autopilot.messages import Decision
from cluster.autoscaling.pulse import Pulse, TimeCounts
from cluster.config.apps import ConsoleAppConfig
from cluster.config.http_sections import ConsoleHttpSection
from cluster.console.endpoints import Console, console_app
from cluster.controller.client import ControllerLostError
from cluster.mesh.messages import HistoryEntry, MeshEvent, MigrationView, PublishedView, RouterView, SeatView, WatchView
from cluster.router.messages import RouterLive
from cluster.serve_environment import free_ports
from experts.protocol.membership import ShardEndpoint
from tests.support.serve.statuses import autopilot_view, controller_status, migration_view, router_status, shard_status
from tests.support.waiting import await_true

TOP_K = 8


class MadeUpService:
    """A controller and routers, as the console's clients reach them. A test changes it from its own thread."""

    def __init__(self, layers: int, experts: int, ranks: int, routers: int = 4, spare: int = 1, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.layers, self.experts, self.ranks = layers, experts, ranks
        share_LE = random.lognormal(0, 0.9, (layers, experts))
        self.share_LE = share_LE / share_LE.sum(1, keepdims=True)
        self.held_RLE = np.zeros((ranks, layers, experts), np.bool_)
        slots = -(-experts // ranks)
        for layer in range(layers):
            order = random.permutation(experts)
            self.held_RLE[np.arange(experts) // slots, layer, order] = True
            for rank, expert in enumerate(np.argsort(-share_LE[layer])[: ranks * spare]):
                self.held_RLE[rank % ranks, layer, expert] = True  # hot ones twice
        self.slots = slots + spare
        self.routers = [f"llm#Router#{name:04x}{seed:04x}" for name in range(routers)]
        self.lost: set[int] = set()
        self.silent_routers: set[str] = set()
        self.workers = dict.fromkeys(self.routers, 1)
        self.draining: set[int] = set()
        self.controller_away = False
        self.epoch = 7
        self.migration = migration_view(
            moving=False, phase="idle", copies_in_flight=0, copies_left=0, bytes_left=0, unserved=0, origin="first"
        )
        self.autopilot = autopilot_view(frozen="", state="observing")
        now = time.time()
        self.history = [HistoryEntry(1, "first", now - 900, now - 880, "reached", 0, 0)]
        self.decisions = [
            Decision(1, now - 400, "plan", "drift 4.1 % beyond noise", "helped", 6, 0.041, 0.031, 0.004, 0.027)
        ]
        self.events = [MeshEvent(1, now - 900, "start", "the placement controller starts", 0)]
        self.asked = {"controller": 0, "loads": 0, "live": 0}
        self.tokens_per_s = 900.0
        self._born_s = time.monotonic()
        self._counting_since = 0.0
        self._pulses: dict[str, tuple[TimeCounts, TimeCounts]] = {r: (TimeCounts(), TimeCounts()) for r in self.routers}
        self._told_s: dict[str, float] = {}
        self._random = random

    # What a test does -------------------------------------------------------------------------------------------------

    def event(self, kind: str, text: str, rank: int | None = None) -> None:
        self.events = [*self.events, MeshEvent(self.events[-1].number + 1, time.time(), kind, text, self.epoch, rank)]

    def lose(self, rank: int) -> None:
        self.lost = {*self.lost, rank}
        self.epoch += 1
        self.event("lost", "a router gave it up and goes on without it", rank)

    def find(self, rank: int) -> None:
        self.lost = self.lost - {rank}
        self.epoch += 1
        self.event("serve", "it serves, 4.2 s after the loss", rank)

    def moving(self, version: int, origin: str, left: int) -> MigrationView:
        """A migration that has `left` copies before it."""
        return replace(
            self.migration,
            **{"target_version": version, "origin": origin, "moving": True, "phase": "copying"},
            copies_in_flight=min(left, 4),
            copies_left=left,
            bytes_left=left * 44_040_192,
        )

    # As the console asks it -------------------------------------------------------------------------------------------

    async def watch(self, term: str, epoch: int, *, timeout_s: float) -> WatchView:
        """As ControllerClient's."""
        self.asked["controller"] += 1
        if self.controller_away:
            raise ControllerLostError("the placement controller is away")
        same = (term, epoch) == ("life", self.epoch)
        copies_LE = self.held_RLE[[r for r in range(self.ranks) if r not in self.lost]].sum(0)
        migration = replace(
            self.migration, sole_copies=int((copies_LE == 1).sum()), unserved=int((copies_LE == 0).sum())
        )
        status = controller_status(
            epoch=self.epoch,
            complete=not migration.unserved,
            missing_ranks=[],
            num_ranks=self.ranks,
            migration=migration,
            routers={
                name: RouterView(self.epoch, {r: f"i{r}" for r in sorted(self.lost)}, 0.2) for name in self.routers
            },
            shards=[self._seat(rank) for rank in range(self.ranks)],
            autopilot=self.autopilot,
        )
        bits = {r: np.packbits(self.held_RLE[r]).tobytes() for r in range(self.ranks) if r not in self.lost}
        published = None if same else PublishedView(self.epoch, self.layers, self.experts, bits)
        return WatchView(status, published, self.history, self.decisions, self.events)

    def _seat(self, rank: int) -> SeatView:
        held = int(self.held_RLE[rank].sum())
        node = f"{rank // 8:02x}a7c1e5b3d9f0"
        host = f"10.4.{rank // 8}.{10 + rank % 8}"
        status = replace(
            shard_status(rank, f"i{rank}", loaded_bytes=held * 44_040_192, copies={}, copies_in_flight=0),
            endpoint=ShardEndpoint(rank, f"i{rank}", host, 7400, "h", 4000 + rank, "GPU-3f"),
            kernel="triton_fp8",
            copies_in_flight=3 if self.migration.moving and rank % 5 == 0 else 0,
            last_error=None,
        )
        state = "draining" if rank in self.draining else "serving"
        missing = 12 if self.migration.moving and rank % 5 == 0 else 0
        return SeatView(
            *(f"experts#ExpertShard#s{rank:03d}", node, rank, True, "filling" if missing else state),
            *(self.slots, held, missing, 0.4, 4000 + rank, status),
        )

    async def live(self, watch_s: float, *, timeout_s: float) -> tuple[list[RouterLive], list[str]]:
        """As RouterClient's."""
        self.asked["live"] += 1
        self.asked["loads"] += watch_s > 0
        if watch_s and not self._counting_since:
            self._counting_since = time.time()
        found = [self._router(name, watch_s) for name in self.routers if name not in self.silent_routers]
        return found, ["a router did not answer mesh_live in 3 s" for _ in self.silent_routers]

    def _router(self, name: str, watch_s: float) -> RouterLive:
        now_s = time.monotonic()
        ran_s = now_s - self._born_s
        share = 1 / len(self.routers)
        tokens = int(ran_s * self.tokens_per_s * share)
        between, first = self._pulses[name]
        past_s = min(now_s - self._told_s.get(name, now_s - 1), 5.0)
        self._told_s[name] = now_s
        slow = 1.8 if self.lost else 1.0
        between.add((self._random.lognormal(np.log(0.024 * slow), 0.22, max(int(200 * past_s * share), 4))).tolist())
        first.add((self._random.lognormal(np.log(0.19 * slow), 0.35, max(int(12 * past_s * share), 1))).tolist())
        rank_R = (self.share_LE[None] * self.held_RLE / np.maximum(self.held_RLE.sum(0), 1)[None]).sum((1, 2))
        rows = tokens * self.layers
        lost = dict.fromkeys(sorted(self.lost), "the connection ended")
        status = router_status(
            name,
            epoch=self.epoch,
            num_ranks=self.ranks,
            layers=self.layers,
            connected=[rank for rank in range(self.ranks) if rank not in self.lost],
            transports=dict.fromkeys(range(self.ranks), "nccl"),
            lost=lost,
            steps=tokens,
            dispatches=rows,
            rows=rows,
            fan_out_sum=int(rows * 4.31),
            shard_pairs=(rows * TOP_K * rank_R / rank_R.sum()).astype(int).tolist(),
            failovers=3 if self.lost else 0,
            fallback_pairs=0,
            refused_requests=0,
            workers=self.workers[name],
        )
        pulse = Pulse(True, tokens, 37, 2 if self.lost else 0, 0.61, between.counts, first.counts)
        loads = None
        if watch_s:
            counts_LE = np.rint(self.share_LE * tokens * TOP_K).astype("<i8")
            loads = {
                "since": self._counting_since,
                "tokens": tokens,
                "layers": list(range(3, 3 + self.layers)),
                "num_experts": self.experts,
                "counts": counts_LE.tobytes(),
            }
        return RouterLive(status, pulse, loads)


@contextlib.contextmanager
def served(service: MadeUpService, admin_keys: tuple[str, ...] = (), api_keys: tuple[str, ...] = ()) -> Iterator[str]:
    """The URL of the page of a console that watches `service`, below the prefix that Serve gives it."""
    config = ConsoleAppConfig(http=ConsoleHttpSection(admin_keys=list(admin_keys), api_keys=list(api_keys)))
    client: Any = service
    app = Starlette(routes=[Mount("/expertmesh", console_app(Console(config, client, [client])))])
    [port] = free_ports(1)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        await_true(lambda: server.started, "the server to start")
        yield f"http://127.0.0.1:{port}/expertmesh/"
    finally:
        server.should_exit = True
        thread.join(10)
