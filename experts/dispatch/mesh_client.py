"""A router's client of the shards, driven by the vLLM plug-in: connects, dispatches, reports.

Legend: T tokens, K top-k, D hidden size.
"""

from __future__ import annotations

import base64
import logging
import os
import time
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from experts.checkpoint import CheckpointError, ExpertCheckpoint
from experts.dispatch.connector import Connector
from experts.dispatch.dispatcher import Dispatcher
from experts.dispatch.epoch_preparer import EpochPreparer
from experts.dispatch.fallback_budget import FallbackBudget
from experts.dispatch.layer_shape import LayerShape
from experts.dispatch.pending import Pending
from experts.dispatch.step_recorder import StepRecorder
from experts.dispatch.workers.row_share import RowShare
from experts.protocol.errors import ShardRejectedError, UnsupportedModelError
from experts.protocol.membership import AppliedMembership, Membership, Preparation, ShardEndpoint
from experts.protocol.router_names import process_name
from experts.protocol.secret import MeshSecret
from experts.protocol.settings import RouterSettings
from experts.protocol.status import RouterStatus, StageHistograms
from experts.protocol.wire import DTYPE_CODES, reply_capacity, request_capacity
from experts.transports.base import RouterLink
from experts.transports.connect import connect
from experts.transports.control import Hello
from experts.transports.memory_limit import PairRoom
from experts.transports.tls.identity import TlsIdentity

if TYPE_CHECKING:
    from experts.dispatch.tracing.spans import SpanThread

logger = logging.getLogger(__name__)

TRIM_EVERY_S = 30.0  # a message that needs more afterwards pays some microseconds a page


def _dispatcher_class(settings: RouterSettings) -> type[Dispatcher]:
    """Dispatch that notes times costs a little in each layer, so only a router that traces has it."""
    if settings.tracing is None:
        return Dispatcher
    from experts.dispatch.tracing.dispatcher import TracedDispatcher

    return TracedDispatcher


def _span_thread(router_id: str, layer_ids: tuple[int, ...], worker: int | None) -> SpanThread:
    from experts.dispatch.tracing.spans import SpanThread  # imports OpenTelemetry

    return SpanThread(router_id, layer_ids, worker)


class MeshClient:
    """Everything of one router except vLLM itself. Only the worker's one thread calls it."""

    def __init__(
        self,
        settings: RouterSettings,
        checkpoint: ExpertCheckpoint,
        shape: LayerShape,
        device: str,
        secret: MeshSecret | None = None,
        share: RowShare | None = None,
        guesses: bool = False,
    ) -> None:
        """`secret` None: whoever drives this router tells it (`use_secret`), or the environment has it.

        `share`: of a router of several workers, this one's part of the rows. `guesses`: this router uses the shape's
        draft layers.
        """
        if shape.dtype not in DTYPE_CODES:
            raise UnsupportedModelError(f"dtype {shape.dtype} is not served, expected one of {list(DTYPE_CODES)}")
        spec = checkpoint.spec
        for name, served, stored in (
            ("experts", shape.num_experts, spec.num_experts),
            ("hidden size", shape.hidden_size, spec.hidden_size),
        ):
            if served != stored:
                raise UnsupportedModelError(
                    f"the engine's {name} is {served}, the checkpoint {settings.model_path} says {stored}"
                )
        self.settings = settings
        self.shape = shape
        self.device = device
        self.router_id = settings.router_id or f"router-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self.share = share
        self.dispatcher = _dispatcher_class(settings)(
            shape,
            settings.max_rows_per_dispatch,
            settings.dispatch_timeout_ms / 1000,
            FallbackBudget(
                checkpoint, shape.dtype, device, settings.fallback_cache_bytes, settings.fallback_max_ms_per_step
            ),
            share,
        )
        self.records = share is None or share.speaks
        self.recorder = StepRecorder(
            *(shape, settings.trace_tokens if self.records else 0, spec.layer_ids),
            half_life_tokens=settings.trace_half_life_tokens,
            observed_tokens=settings.observed_tokens if self.records else 0,
            guesses=guesses,
        )
        self._epochs = EpochPreparer(
            self.dispatcher, Connector(self._connect), settings.prefer_local_replicas, self._check_room
        )
        self._static = settings.membership
        self._secret = secret
        self._tls = None if settings.tls is None else TlsIdentity(settings.tls)
        self._trimmed_s = time.monotonic()
        worker = None if share is None else share.worker
        self._spans = None if settings.tracing is None else _span_thread(self.router_id, spec.layer_ids, worker)
        self._facts = checkpoint.facts
        self._fingerprint = checkpoint.start_fingerprint()

    @property
    def attached(self) -> bool:
        """Whether an epoch was applied; until then layers return zeros (profiling and warm-up only)."""
        return self.dispatcher.membership is not None

    def attach_static(self) -> None:
        """Apply the membership in the settings, for engines that run without a controller.

        UnsupportedModelError with the shards' reasons if they refuse this router.
        """
        if self._static is not None and not self.attached:
            applied = self.apply_membership(Membership.from_dict(self._static))
            if applied.refusal is not None:
                raise UnsupportedModelError(applied.refusal)

    def use_secret(self, secret: MeshSecret) -> None:
        """Prove by another secret from now on. Pairs that are open stay so."""
        self._secret = secret

    def prepare(self, told: Membership | bytes, connect_s: float | None = None) -> Preparation:
        """Begin to prepare an epoch beside the engine's steps, in place of any other that is not applied yet.

        A whole membership, or bytes of `Membership.delta_from` the epoch in use. Shards that are new to this router and
        take longer than `connect_s` (None: `connect_timeout_s`) are left out of the epoch. ValueError for other bytes,
        and for an epoch older than the one in use.
        """
        return self._epochs.start(told, connect_s)

    def preparation(self) -> Preparation:
        """How far the newest epoch is. Once it is ready, `apply` makes the router use it."""
        return self._epochs.state()

    def apply(self, epoch: int) -> AppliedMembership:
        """Use an epoch that is ready. Called between steps; takes microseconds. ValueError if it is not ready.

        Links to shard incarnations that are already connected are kept.
        """
        return self._epochs.finish(epoch)

    def apply_membership(self, membership: Membership, wait_s: float | None = None) -> AppliedMembership:
        """All three at once, waiting: for engines without a controller. A ValueError leaves everything as it was."""
        self._epochs.start(membership, wait_s)
        self._epochs.wait()
        applied = self._epochs.finish(membership.epoch)
        self._epochs.settle()
        return applied

    def _check_room(self, membership: Membership) -> None:
        """ValueError if pairs with these shards, filled to their ends, cannot fit into this process's memory."""
        if self.device == "cpu":
            rows, shape = self.settings.max_rows_per_dispatch, self.shape
            nbytes = request_capacity(rows, shape.top_k, shape.row_bytes) + reply_capacity(rows, shape.row_bytes)
            workers = 1 if self.share is None else self.share.num_workers
            PairRoom().check(workers * sum(endpoint is not None for endpoint in membership.endpoints), nbytes)

    def _connect(self, endpoint: ShardEndpoint) -> RouterLink:
        settings, shape = self.settings, self.shape
        try:
            weights = self._fingerprint.result().to_bytes()
        except CheckpointError as error:
            raise ShardRejectedError(endpoint.rank, f"this router cannot read its checkpoint: {error}") from error
        worker = 0 if self.share is None else self.share.worker
        hello = Hello(
            router_id=process_name(self.router_id, worker),  # shards count the pairs of each process
            transport=settings.transport,
            incarnation=endpoint.incarnation,
            dtype=str(shape.dtype).removeprefix("torch."),
            hidden_size=shape.hidden_size,
            top_k=shape.top_k,
            num_layers=shape.num_layers,
            max_rows=settings.max_rows_per_dispatch,
            facts=self._facts,
            weights=base64.b64encode(weights).decode(),
            deferred=settings.pool == "prefill",
        )
        deadline_s = time.monotonic() + settings.connect_timeout_s
        return connect(endpoint, hello, self.device, settings.spin_us, deadline_s, self._secret, self._tls)

    def begin(
        self,
        layer: int,
        x_TD: torch.Tensor,
        topk_weights_TK: torch.Tensor,
        topk_ids_TK: torch.Tensor,
        record: bool = True,
    ) -> Pending:
        """Send a layer's rows out, see `Dispatcher.begin`; `record` is False for steps that serve no request."""
        pending = self.dispatcher.begin(layer, x_TD, topk_weights_TK, topk_ids_TK)
        if record:
            # The shards already compute: recording delays nobody but the router.
            self.recorder.add(layer, pending.decided_TK)
        return pending

    def finish(self, pending: Pending) -> torch.Tensor:
        """The layer's weighted sums [T, D]; see `Dispatcher.finish`."""
        return self.dispatcher.finish(pending)

    def start_traced_step(self, traces: Mapping[str, Mapping[str, str]]) -> None:
        """The next step holds requests whose trace is sampled: W3C headers by id. Only with `settings.tracing`."""
        assert self.settings.tracing is not None, "who traces has said so in the settings"
        self.dispatcher.start_step(traces, self.settings.tracing.layers_per_step)  # type: ignore[attr-defined]

    def end_traced_step(self) -> None:
        """The step is over; its spans follow in the background."""
        step = self.dispatcher.end_step()  # type: ignore[attr-defined]
        if step is not None and self._spans is not None:
            self._spans.hand_over(step)

    def status(self) -> RouterStatus:
        """Counters and membership, for health checks and metrics. Also gives back memory that links need no more."""
        dispatcher = self.dispatcher
        if time.monotonic() > self._trimmed_s + TRIM_EVERY_S:
            self._trimmed_s = time.monotonic()
            for link in dispatcher.links.values():
                link.trim()
        stats = dispatcher.stats
        membership = dispatcher.membership
        return RouterStatus(
            router_id=self.router_id,
            epoch=-1 if membership is None else membership.epoch,
            num_ranks=stats.num_ranks,
            connected=sorted(dispatcher.links),
            transports={rank: link.transport for rank, link in sorted(dispatcher.links.items())},
            lost=dict(dispatcher.lost),
            layers=self.shape.num_layers,
            steps=stats.steps,
            dispatches=stats.dispatches,
            rows=stats.rows,
            fan_out_sum=stats.fan_out_sum,
            failovers=stats.failovers,
            no_slot_pairs=stats.no_slot_pairs,
            uncovered_pairs=dispatcher.uncovered_pairs,
            swap_last_us=stats.swap_last_us,
            swap_max_us=stats.swap_max_us,
            fallback_pairs=stats.fallback_pairs,
            fallback_ms=0.0 if dispatcher.fallback is None else dispatcher.fallback.spent_ns / 1e6,
            fallback_cached_bytes=0 if dispatcher.fallback is None else dispatcher.fallback.cached_bytes,
            refused_requests=stats.refused_requests,
            bytes_sent=stats.bytes_sent,
            bytes_received=stats.bytes_received,
            balancedness=stats.balancedness,
            shard_rows=stats.shard_rows[: stats.num_ranks].tolist(),
            shard_pairs=stats.shard_pairs[: stats.num_ranks].tolist(),
            last_success_age_s=None if stats.last_success_s is None else time.monotonic() - stats.last_success_s,
            stage_us=StageHistograms(
                plan_pack=stats.plan_pack.snapshot(), wait=stats.wait.snapshot(), combine=stats.combine.snapshot()
            ),
        )

    def close(self) -> None:
        """Close every link."""
        self._epochs.close()
        if self._spans is not None:
            self._spans.close()
        if self.dispatcher.fallback is not None:
            self.dispatcher.fallback.close()
        self.dispatcher.close()
