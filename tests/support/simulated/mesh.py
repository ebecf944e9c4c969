"""The simulated mesh: what a test does to it, how time passes, and what must hold at every moment.

Shards carry out their orders one after the other, at a rate, over links that the test may break. Routers follow epochs
with a delay. Nothing here sleeps or starts a process.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cluster.config.live_sections import LiveConfig
from cluster.mesh.mesh import Mesh
from cluster.mesh.messages import CopyReport, JoinRequest, ShardHolding, ShardOrder
from cluster.mesh.planning import ModelFacts, plan_placement, slots_to_allocate
from experts.protocol.orders import CopyOrder, CopyResult
from tests.support.simulated.processes import FakeRouter, FakeShard

EXPERT_BYTES = 1_000_000
SMALL = ModelFacts(2, 8)


class SimulatedMesh:
    """Everything outside the controller, and the controller's `Mesh`, which `restart_controller` replaces."""

    def __init__(
        self,
        num_shards: int,
        live: LiveConfig | None = None,
        model: ModelFacts = SMALL,
        slots: int | None = None,
        num_routers: int = 2,
        nodes: Sequence[str] = ("n",),
        link_bytes_per_s: float = 1e9,
        checkpoint_bytes_per_s: float = 5e8,
        expert_bytes: int = EXPERT_BYTES,
        checks: bool = True,
    ) -> None:
        """`checks`: look after every step whether what must hold does, which is slow for large meshes."""
        self.expert_bytes, self.checks = expert_bytes, checks
        self.model, self.live = model, live or LiveConfig()
        self.slots = slots
        self.now_s = 1000.0
        self.nodes = list(nodes)
        self.link_bytes_per_s, self.checkpoint_bytes_per_s = link_bytes_per_s, checkpoint_bytes_per_s
        self.shards: dict[str, FakeShard] = {}
        self.routers = [FakeRouter(f"r{index}") for index in range(num_routers)]
        self.lives = 0
        self.controller_alive = True
        self.broken_copies: set[tuple[str, int, int]] = set()  # (shard, layer, expert) that fail
        self.wanted = num_shards
        self._named = 0
        self._seen: tuple[Mesh | None, dict[int, str], np.ndarray] = (None, {}, np.empty(0))
        self.restart_controller(cold=True)
        for _ in range(num_shards):
            self.start_shard()

    # What a test does ----------------------------------------------------------------------------------------------

    def start_shard(self, node: str | None = None) -> FakeShard:
        """A process that asks for a rank with the next step."""
        index, self._named = self._named, self._named + 1
        held_LE = np.zeros((self.model.num_layers, self.model.num_experts), np.bool_)
        taken = {shard.serve_rank for shard in self.shards.values() if shard.alive}
        serve_rank = next(rank for rank in range(len(taken) + 1) if rank not in taken)
        shard = FakeShard(f"s{index}", node or self.nodes[index % len(self.nodes)], serve_rank, 0, held_LE)
        self.shards[shard.name] = shard
        return shard

    def restart_controller(self, cold: bool = False) -> None:
        """A further life of the controller, which knows nothing."""
        self.mesh = Mesh(self.model, self.live)
        self.mesh.wanted = self.wanted
        self.lives += 1
        self.born_s = self.now_s
        self.mesh.settled = cold
        self.controller_alive = True

    def scale(self, wanted: int) -> None:
        """Serve wants another number of shards: it starts some, or lets the newest leave."""
        self.wanted = self.mesh.wanted = wanted
        living = [shard for shard in self.shards.values() if shard.alive and not shard.leaving]
        for shard in living[wanted:]:
            shard.leaving = True
        for _ in range(wanted - len(living)):
            self.start_shard()

    def kill(self, shard: FakeShard) -> None:
        shard.alive = False

    # Time -----------------------------------------------------------------------------------------------------------

    def step(self, seconds: float = 0.1) -> None:
        """Time passes, and everyone does what is due."""
        self.now_s += seconds
        for router in self.routers:
            self._route(router)
        for shard in list(self.shards.values()):
            if shard.speaks:
                self._live(shard)
        if self.controller_alive:
            if not self.mesh.settled:
                self._settle()
            self.mesh.expire(self.now_s)
            self._plan()
            self.mesh.advance(self.now_s)
            if self.checks:
                self.check()

    def run(self, seconds: float, step_s: float = 0.1) -> None:
        for _ in range(round(seconds / step_s)):
            self.step(step_s)

    def run_until_still(self, limit_s: float = 600.0, step_s: float = 0.1) -> None:
        """Until nothing moves any more. AssertionError after `limit_s`, saying what still does."""
        end_s = self.now_s + limit_s
        while not self.still:
            assert self.now_s < end_s, f"still moving after {limit_s} s: {self.describe()}"
            self.step(step_s)

    @property
    def still(self) -> bool:
        mesh = self.mesh
        joining = any(shard.speaks and shard.rank is None for shard in self.shards.values())
        leaving = any(shard.speaks and shard.leaving for shard in self.shards.values())
        behind = any(r.alive and (r.membership is None or r.membership.epoch < mesh.roster.epoch) for r in self.routers)
        retired = any(each.retired for each in mesh.holdings.ranks.values())
        return mesh.open and not (mesh.conductor.moving or mesh.missing or joining or leaving or behind or retired)

    def describe(self) -> str:
        conductor = self.mesh.conductor
        return (
            f"phase {conductor.phase}, moving {conductor.moving}, left {conductor.copies_left}, missing "
            f"{self.mesh.missing}, unserved {self.mesh.unserved}, problem {conductor.problem!r} "
            f"{self.mesh.keeper.problem!r}"
        )

    # What must hold -------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """What routers dispatch by is held, unless its shard died; no shard holds more than it has slots for.

        An expert that was in the map stays there, unless a shard left or was taken out.
        """
        who, served_LE = {seat.rank: seat.shard_id for seat in self.mesh.roster.seats}, self.mesh.holdings.count_LE > 0
        mesh_before, who_before, served_before_LE = self._seen
        self._seen = (self.mesh, who, served_LE)
        if mesh_before is self.mesh and who_before.items() <= who.items():
            assert (served_LE | ~served_before_LE).all(), f"dropped the last replica of an expert: {self.describe()}"
        for shard in self.shards.values():
            assert shard.held_LE.sum(1).max() <= max(shard.num_slots, 0), f"{shard.name} holds more than it has slots"
        for router in self.routers:
            for name, sent_LE in router.sends.items() if router.alive else ():
                astray_LE = sent_LE & ~self.shards[name].held_LE
                assert not astray_LE.any(), (
                    f"{router.name} at epoch {router.membership.epoch} sends (layer, expert) "
                    f"{np.argwhere(astray_LE).tolist()} to {name}, which does not hold them"
                )

    def unserved_by(self, router: FakeRouter) -> int:
        """(layer, expert) pairs that a router has to compute by itself."""
        served_LE = np.zeros((self.model.num_layers, self.model.num_experts), np.bool_)
        for name, sent_LE in router.sends.items():
            if self.shards[name].alive:
                served_LE |= sent_LE
        return int((~served_LE).sum())

    # --------------------------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        known = len(self.mesh.holdings.ranks)
        running = sum(shard.alive and shard.rank is not None for shard in self.shards.values())
        late = self.now_s - self.born_s >= self.live.membership.lost_after_s
        if late or known >= running:
            self.mesh.settled = True
            self.mesh.open = bool(self.mesh.holdings.ranks)

    def _plan(self) -> None:
        mesh = self.mesh
        if mesh.keeper.target is None and mesh.settled and (shards := mesh.gather(self.now_s)) is not None:
            at_hand = type(shards)(shards.num_ranks, shards.num_nodes, self.slots)
            placement = plan_placement(self.live.placement, self.model, at_hand)
            mesh.num_slots = slots_to_allocate(self.live.placement, placement, at_hand)
            mesh.set_target(placement, "first", "p")

    def _route(self, router: FakeRouter) -> None:
        mesh = self.mesh
        if not router.alive or not self.controller_alive:
            return
        epoch = -1 if router.membership is None else router.membership.epoch
        mesh.routers.note(router.name, epoch, {}, self.now_s)
        if router.term not in (self.lives, 0) and mesh.roster.epoch <= epoch:
            mesh.roster.raise_epoch_above(epoch)
        if mesh.open and mesh.roster.epoch > epoch:
            router.behind_since_s = router.behind_since_s or self.now_s
            if self.now_s - router.behind_since_s >= router.slow_s:
                router.move_to(mesh.membership, self.lives)

    def _live(self, shard: FakeShard) -> None:
        """One shard's turn: join, or heartbeat, copies, orders."""
        if not self.controller_alive:
            self._copy(shard)
            return
        if shard.rank is None:
            self._join(shard)
            return
        if not self.mesh.heartbeat(shard.name, self.now_s):
            shard.rank = self.mesh.rejoin(
                self._holding(shard), 0, shard.target, "stops" if shard.leaving else "", self.now_s
            )
            shard.term = -1
            return
        self._copy(shard)
        if not shard.todo:
            version = shard.version if shard.term == self.lives else -1
            order = self.mesh.conductor.orders.next(shard.rank, version)
            shard.target = self.mesh.keeper.target or shard.target
            if order is not None:
                self._take(shard, order)
        if shard.leaving:
            self._leave(shard)

    def _leave(self, shard: FakeShard) -> None:
        seat = self.mesh.roster.seat_of(shard.name)
        if seat is None or shard.rank is None:
            return
        if not seat.draining:
            self.mesh.drain(seat, "stops", self.now_s)
        behind = self.mesh.routers.behind(self.mesh.roster.epoch, self.now_s, self.live.membership.lost_after_s)
        stuck = bool(self.mesh.keeper.problem) or not self.mesh.has_heirs
        if (self.mesh.handed_over(shard.rank) and not behind) or stuck:
            self.mesh.leave(shard.name, self.now_s)
            shard.alive = False

    def _join(self, shard: FakeShard) -> None:
        answer = self.mesh.join(JoinRequest(shard.name, shard.node_id, shard.serve_rank), self.now_s)
        if answer.rank is None:
            return
        shard.rank, shard.num_slots = answer.rank, self.slots or self.mesh.num_slots
        row = self.mesh.row_to_load(answer.rank)
        for layer, experts in enumerate(row.experts_of_rank(answer.rank)):
            shard.held_LE[layer, experts[experts >= 0]] = True
        assert self.mesh.ready(self._holding(shard), self.now_s)

    def _holding(self, shard: FakeShard) -> ShardHolding:
        return ShardHolding(
            shard.name,
            shard.node_id,
            shard.serve_rank,
            shard.endpoint(),
            shard.num_slots,
            self.expert_bytes,
            shard.held_LE.copy(),
        )

    def _take(self, shard: FakeShard, order: ShardOrder) -> None:
        shard.version, shard.term, shard.rate = order.version, self.lives, order.max_bytes_per_s
        for pair in order.release:
            shard.held_LE[pair] = False
        shard.todo, shard.done_at_s = list(order.copy), None
        if not shard.todo:
            self._report(shard)

    def _copy(self, shard: FakeShard) -> None:
        """As many copies as fit the time that has passed."""
        moved = False
        while shard.todo:
            order = shard.todo[0]
            if shard.done_at_s is None:
                rate = self.link_bytes_per_s if order.sources else self.checkpoint_bytes_per_s
                rate = rate if shard.rate is None else min(rate, shard.rate)
                shard.done_at_s = self.now_s + self.expert_bytes / rate
            if shard.done_at_s > self.now_s:
                break
            shard.todo.pop(0)
            shard.done_at_s = (
                None if not shard.todo else shard.done_at_s + self.expert_bytes / (shard.rate or self.link_bytes_per_s)
            )
            shard.results.append(self._copied(shard, order))
            moved = True
        if moved:
            self._report(shard)

    def _copied(self, shard: FakeShard, order: CopyOrder) -> CopyResult:
        pair = (order.layer, order.expert)
        if shard.held_LE[pair]:
            return CopyResult(*pair, "", 0, 0.0)
        if shard.held_LE[order.layer].sum() >= shard.num_slots:
            return CopyResult(*pair, "", 0, 0.0, error="no free slot")
        if (shard.name, *pair) in self.broken_copies:
            return CopyResult(*pair, "", 0, 0.0, error="broken")
        source = "checkpoint"
        for endpoint in order.sources:
            holder = self.shards[endpoint.incarnation]
            if holder.speaks and holder.held_LE[pair]:
                source = "shm"
                break
        shard.held_LE[pair] = True
        return CopyResult(*pair, source, self.expert_bytes, 0.0)

    def _report(self, shard: FakeShard) -> None:
        if not self.controller_alive:
            return
        if self.mesh.report(CopyReport(shard.name, shard.held_LE.copy(), tuple(shard.results)), self.now_s):
            shard.results = []
