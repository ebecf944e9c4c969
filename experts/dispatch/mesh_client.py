"""A router's client of the shards, driven by the vLLM plug-in: connects, dispatches, reports.

Legend: T tokens, K top-k, D hidden size.
"""

from __future__ import annotations

import base64
import logging
import os
import time
import uuid
from collections.abc import Iterable

import numpy as np
import torch

from experts.checkpoint import CheckpointError, ExpertCheckpoint
from experts.dispatch.connector import Connector
from experts.dispatch.dispatcher import Dispatcher, Pending
from experts.dispatch.fallback import FallbackExperts
from experts.dispatch.layer_shape import LayerShape
from experts.dispatch.step_recorder import StepRecorder
from experts.protocol.errors import ShardRejectedError, UnsupportedModelError
from experts.protocol.membership import AppliedMembership, Membership, ShardEndpoint, host_id
from experts.protocol.settings import RouterSettings
from experts.protocol.status import RouterStatus, StageHistograms
from experts.protocol.wire import DTYPE_CODES, reply_capacity, request_capacity
from experts.transports.base import RouterLink
from experts.transports.connect import connect
from experts.transports.control import Hello

logger = logging.getLogger(__name__)


class MeshClient:
    """Everything of one router except vLLM itself. Only the worker's one thread calls it."""

    def __init__(self, settings: RouterSettings, checkpoint: ExpertCheckpoint, shape: LayerShape, device: str) -> None:
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
        self.dispatcher = Dispatcher(
            shape,
            settings.max_rows_per_dispatch,
            settings.dispatch_timeout_ms / 1000,
            FallbackExperts(checkpoint, shape.dtype, settings.fallback_cache_bytes),
        )
        self.recorder = StepRecorder(shape, settings.trace_tokens, spec.layer_ids)
        self._connector = Connector(self._connect)
        self._static = settings.membership
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

    def connect_ahead(self, endpoints: Iterable[ShardEndpoint | None]) -> list[int]:
        """Start connecting to an epoch's new shards in the background; returns the ranks that are not done yet.

        Call it until none is left, and the engine does not wait inside `apply_membership`.
        """
        return self._connector.start(
            endpoint
            for endpoint in endpoints
            if endpoint is not None and not self._is_connected(self.dispatcher.membership, endpoint)
        )

    def apply_membership(self, membership: Membership, wait_s: float | None = None) -> AppliedMembership:
        """Connect to the shards of a new epoch and switch to it. Called between steps.

        Keeps links to shard incarnations that are already connected. A shard that cannot be reached within `wait_s`
        (None: `connect_timeout_s`) is left out and listed as lost. Raises ValueError for an epoch older than the
        current one, or a placement of another model.
        """
        current = self.dispatcher.membership
        if current is not None and membership.epoch < current.epoch:
            raise ValueError(f"epoch {membership.epoch} is older than the current epoch {current.epoch}")
        self.shape.check_placement(membership.placement)
        links: dict[int, RouterLink] = {}
        lost: dict[int, str] = {}
        fresh: list[ShardEndpoint] = []
        for rank, endpoint in enumerate(membership.endpoints):
            if endpoint is None:
                lost[rank] = "no shard has this rank yet"
            elif self._is_connected(current, endpoint):
                links[rank] = self.dispatcher.links[rank]
            else:
                fresh.append(endpoint)
        made, missed, refused = self._connector.take(fresh, wait_s)
        links |= made
        lost |= missed
        local_R = None
        if self.settings.prefer_local_replicas:
            local_R = np.array([e is not None and e.host_id == host_id() for e in membership.endpoints])
        self.dispatcher.apply(membership, links, lost, local_R)
        logger.info(
            "%s: epoch %d, connected to shards %s, without %s", self.router_id, membership.epoch, sorted(links), lost
        )
        return AppliedMembership(membership.epoch, sorted(links), lost, refused)

    def _is_connected(self, current: Membership | None, endpoint: ShardEndpoint) -> bool:
        rank = endpoint.rank
        if current is None or rank not in self.dispatcher.links or rank >= len(current.endpoints):
            return False
        known = current.endpoints[rank]
        return known is not None and known.incarnation == endpoint.incarnation

    def _connect(self, endpoint: ShardEndpoint) -> RouterLink:
        settings, shape = self.settings, self.shape
        try:
            weights = self._fingerprint.result().to_bytes()
        except CheckpointError as error:
            raise ShardRejectedError(endpoint.rank, f"this router cannot read its checkpoint: {error}") from error
        hello = Hello(
            router_id=self.router_id,
            transport=settings.transport,
            incarnation=endpoint.incarnation,
            dtype=str(shape.dtype).removeprefix("torch."),
            hidden_size=shape.hidden_size,
            top_k=shape.top_k,
            num_layers=shape.num_layers,
            request_capacity=request_capacity(settings.max_rows_per_dispatch, shape.top_k, shape.row_bytes),
            reply_capacity=reply_capacity(settings.max_rows_per_dispatch, shape.row_bytes),
            facts=self._facts,
            weights=base64.b64encode(weights).decode(),
        )
        deadline_s = time.monotonic() + settings.connect_timeout_s
        return connect(endpoint, hello, self.device, settings.spin_us, deadline_s)

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
            self.recorder.add(layer, pending.topk_ids_TK)
        return pending

    def finish(self, pending: Pending) -> torch.Tensor:
        """The layer's weighted sums [T, D]; see `Dispatcher.finish`."""
        return self.dispatcher.finish(pending)

    def status(self) -> RouterStatus:
        """Counters and membership, for health checks and metrics."""
        dispatcher = self.dispatcher
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
            fallback_pairs=stats.fallback_pairs,
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
        self._connector.close()
        self.dispatcher.close()
