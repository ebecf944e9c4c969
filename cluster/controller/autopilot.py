"""Drives the autopilot: takes the routers' reports, tells it the time and the mesh, runs its jobs, sets its targets."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from cluster.autopilot.background import Background, JobError
from cluster.autopilot.jobs import JudgeJob, Model, PlanJob, PrepareJob, Proposal, Verdict
from cluster.autopilot.messages import AutopilotView, Decision, ObservationReport, ObservationWish
from cluster.autopilot.pilot import Change, Facts, Pilot
from cluster.config.apps import ExpertsAppConfig
from cluster.config.autopilot_section import AutopilotSection
from cluster.config.experts_sections import ShardsSection
from cluster.config.parse import ConfigError
from cluster.controller import views
from cluster.mesh.mesh import Mesh
from experts.protocol.status import ShardStatus
from placement.capacity.residency import FILE_BYTES_PER_S, FORESEEN, PCIE_BYTES_PER_S, Offload
from placement.migration.layer import MigrationError
from placement.traces.observation import Observation
from placement.traces.trace import TraceError

logger = logging.getLogger("ray.serve")

MOST_REPORTS_S, LEAST_REPORTS_S = 5.0, 0.25  # period of a router's reports: a quarter of a window, within these
ASK_AGAIN_S = 10.0  # routers, while nothing is wanted
PREPARE_S = 1200.0  # time-outs of jobs: compiling takes a minute of a core, and others come first
JUDGE_S, PLAN_GRACE_S = 60.0, 120.0  # the second beyond the search's own time
FRESH_SHARE = 0.5  # of placement.max_seconds, for a plan from nothing beside those near the present one
PARAMETER_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}


class Autopilot:
    """`on_target` is called when a target was set. `planning`: why a plan of somebody else is awaited, empty if not.

    `shard_status`: the last of each rank, of those that are gone, too.
    """

    def __init__(
        self,
        mesh: Mesh,
        config: ExpertsAppConfig,
        shard_status: Mapping[int, ShardStatus],
        on_target: Callable[[], None],
        planning: Callable[[], str],
    ) -> None:
        self.pilot = Pilot()
        self._mesh, self._config, self._shard_status = mesh, config, shard_status
        self._on_target, self._planning = on_target, planning
        self._background = Background()
        self._task: asyncio.Task[None] | None = None
        self._prepared = False

    def configure(self, section: AutopilotSection) -> None:
        """Take on other settings."""
        self.pilot.configure(section)

    async def observe(self, report: ObservationReport) -> ObservationWish:
        """A router's report; what is damaged or of another model is left out."""
        section, now_s = self.pilot.section, time.monotonic()
        if section.mode == "off":
            return ObservationWish(False, ASK_AGAIN_S)
        traffic, period_s = self.pilot.traffic, min(max(section.window_s / 4, LEAST_REPORTS_S), MOST_REPORTS_S)
        if not report.packed:
            traffic.heard_of(report.router_id, report.number, now_s)
            return ObservationWish(True, period_s)
        try:
            observation = await asyncio.to_thread(Observation.from_bytes, report.packed)
            model = self._mesh.model
            if (len(observation.layers), observation.num_experts) != (model.num_layers, model.num_experts):
                raise TraceError(
                    f"it is of {len(observation.layers)} layers of {observation.num_experts} experts, the mesh has "
                    f"{model.num_layers} of {model.num_experts}"
                )
            traffic.add(report.router_id, report.number, observation, now_s)
        except TraceError as error:
            logger.warning("report %d of router %s is left out: %s", report.number, report.router_id, error)
        return ObservationWish(True, period_s)

    def look(self) -> None:
        """Time has passed."""
        if self._task is not None:
            return
        if self.pilot.section.mode == "off":
            if self._background.process is not None:
                self._task = asyncio.create_task(self._stop())
        elif not self._prepared:
            self._task = asyncio.create_task(self._prepare())
        elif (job := self.pilot.next_job(self._facts())) is not None:
            self._task = asyncio.create_task(self._run(job))

    def view(self) -> AutopilotView:
        """For people."""
        view = self.pilot.view(self._facts())
        preparing = self.pilot.section.mode != "off" and not self._prepared
        return replace(view, state="preparing") if preparing else view

    @property
    def decisions(self) -> list[Decision]:
        """Oldest first."""
        return list(self.pilot.decisions)

    async def close(self) -> None:
        """End the background process."""
        if self._task is not None:
            self._task.cancel()
        await self._background.stop()

    async def _stop(self) -> None:
        await self._background.stop()
        self._task = None

    async def _prepare(self) -> None:
        try:
            await self._background.run(PrepareJob(), PREPARE_S)
        except JobError as error:
            # The jobs to come try again, each within its time.
            logger.warning("the autopilot's planner could not be prepared: %s", error)
            self.pilot.failed(str(error), self._facts())
        finally:
            self._prepared, self._task = True, None

    async def _run(self, job: JudgeJob | PlanJob) -> None:
        """A job, and the one that follows from it."""
        pilot = self.pilot
        following: PlanJob | Change | None = None
        try:
            timeout_s = JUDGE_S if isinstance(job, JudgeJob) else job.fresh_s + PLAN_GRACE_S
            result = await self._background.run(job, timeout_s)
            if isinstance(result, Verdict):
                following = pilot.judged(result, self._facts())
            elif isinstance(result, Proposal):
                following = self._offer(result)
            if isinstance(following, Change):
                self._carry_out(following)
        except (JobError, ConfigError, ValueError, MigrationError) as error:
            logger.warning("the autopilot's %s failed: %s", type(job).__name__, error)
            pilot.failed(str(error), self._facts())
        finally:
            self._task = None
        if isinstance(following, PlanJob):
            self._task = asyncio.create_task(self._run(following))

    def _offer(self, proposal: Proposal) -> Change | None:
        view = views.plan(self._mesh, proposal.placement)
        return self.pilot.proposed(proposal, self._facts(), view.expected_s, sum(view.bytes_by_nearness.values()))

    def _carry_out(self, change: Change) -> None:
        views.plan(self._mesh, change.placement)  # raises if it does not fit the shards of this moment
        target = self._mesh.set_target(change.placement, change.origin)
        self.pilot.begun(target.version, self._facts())
        self._on_target()

    def _facts(self) -> Facts:
        mesh, placement = self._mesh, self._mesh.live.placement
        target = mesh.keeper.target
        seats = [seat for seat in mesh.roster.seats if seat.serving]
        slots = [seat.num_slots for seat in seats]
        statuses = [self._shard_status[seat.rank] for seat in seats if seat.rank in self._shard_status]
        expert_bytes = mesh.conductor.expert_bytes
        return Facts(
            now_s=time.monotonic(),
            now=time.time(),
            target_version=0 if target is None else target.version,
            placement=None if target is None else target.placement,
            moving=mesh.conductor.moving,
            frozen=self._planning() or frozen(mesh),
            model=Model(
                expert_bytes,
                PARAMETER_BYTES.get(self._config.model.dtype, 2.0),
                expert_bytes * max(slots, default=1) * mesh.model.num_layers,
                self._config.shards.device,
                _offload(self._config.shards, max(slots, default=1), statuses),
            ),
            slots_per_rank=max(min(slots, default=1) - placement.spare_slots, 1),
            min_replicas=placement.min_replicas,
            load_cap=placement.load_cap,
            fresh_s=FRESH_SHARE * placement.max_seconds,
            bytes_per_s=mesh.conductor.pace.bytes_per_s,
        )


def _offload(shards: ShardsSection, slots: int, statuses: Iterable[ShardStatus]) -> Offload | None:
    """What shards have in memory of `slots` slots a layer; None if all.

    Copies come as fast as at the slowest shard, since a step waits for it; until one has told, at a nominal rate.
    """
    settings = shards.offload
    if settings is None or settings.resident_fraction == 1:
        return None
    told = [status.offload.copy_bytes_per_s for status in statuses if status.offload is not None]
    nominal = PCIE_BYTES_PER_S if shards.device == "cuda" else FILE_BYTES_PER_S
    rate = min((rate for rate in told if rate), default=nominal)
    return Offload(
        settings.resident_fraction,
        min(rate, settings.max_copy_bytes_per_s or rate),
        slots,
        FORESEEN if settings.prefetch else 0.0,
        layers_share=shards.device == "cpu" and shards.kernel in ("auto", "native"),
    )


def frozen(mesh: Mesh) -> str:
    """Why nobody but people should move experts now, one line; empty if nothing speaks against it."""
    seats = mesh.roster.seats
    serving, wanted = [seat for seat in seats if seat.serving], mesh.wanted
    draining = [seat.rank for seat in seats if seat.draining]
    checks = (
        (not (mesh.settled and mesh.open), "the mesh starts"),
        (mesh.conductor.paused, "migration is paused"),
        (bool(mesh.missing), f"no shard is at rank {', '.join(map(str, mesh.missing))}"),
        (bool(draining), f"rank {', '.join(map(str, draining))} drains"),
        (len(serving) < len(seats), "a shard starts"),
        (wanted not in (None, len(serving)), f"Serve wants {wanted} shards, {len(serving)} serve"),
        (bool(mesh.keeper.problem or mesh.conductor.problem), mesh.keeper.problem or mesh.conductor.problem),
    )  # fmt: skip
    return next((why for holds, why in checks if holds), "")
