"""Dispatch and combine of one router: a layer's rows go out to the shards, their weighted sums come back.

Legend: T tokens, K top-k, L MoE layers, E logical experts, R ranks, D hidden size, M some of the tokens.

    begin   x_TD, ids_TK, weights_TK
              | plan    which rank computes each (token, expert) pair
              | pack    each rank's rows, once each, into its link's buffer
              | post    ------------------------------------------------->  shards compute
              :         (meanwhile the router computes shared experts)
    finish    | collect <-------------------------------------------------  one partial sum a row
              | combine y = sum of the partial rows, in float32
              | repeat  what a failed shard had: elsewhere, from "plan" on; with no replica left, on the router
            y_TD

A step larger than `max_rows` goes out in several batches, one after the other. A shard that failed is left out until
the next epoch; of one that has no slot for an expert, only that expert is. One thread drives a dispatcher: the vLLM
worker's, which also takes over new epochs between steps.
"""

from __future__ import annotations

import logging
import time

import numpy as np
import torch

from experts.dispatch import live_slots
from experts.dispatch.epoch import PreparedEpoch, prepare_epoch
from experts.dispatch.fallback_budget import FallbackBudget
from experts.dispatch.layer_shape import CallCheck, LayerShape
from experts.dispatch.live_slots import LiveSlots
from experts.dispatch.pending import Pending
from experts.dispatch.rows.base import RowMover
from experts.dispatch.rows.host_programs import warm_up
from experts.dispatch.stats import RouterStats
from experts.dispatch.workers.row_share import RowShare
from experts.protocol.errors import MissingSlotError, ShardError, ShardLostError, ShardRejectedError
from experts.protocol.membership import Membership
from experts.protocol.wire import (
    H_MAGIC,
    H_NO_SLOT_EXPERT,
    H_NO_SLOT_LAYER,
    H_ROWS,
    H_SEQ,
    H_STATUS,
    HEADER_BYTES,
    MAGIC,
    STATUS_NO_SLOT,
    STATUS_OK,
    error_text,
    header_of,
)
from experts.transports.base import RouterLink

logger = logging.getLogger(__name__)

# How often a shard may lack experts of one batch before all that it has of the layer is left out: each time costs an
# exchange, and one that lacks so many is far behind.
MAX_MISSING_SLOTS = 8


class Dispatcher:
    """Sends rows to shards and adds up what comes back; owns the links of one router."""

    def __init__(
        self,
        shape: LayerShape,
        max_rows: int,
        timeout_s: float,
        fallback: FallbackBudget | None,
        share: RowShare | None = None,
    ) -> None:
        """`max_rows` bounds a message; `timeout_s` how long the shards may take to answer one.

        `fallback` computes what no live shard can, as long as it may; without it that is a RuntimeError. With a `share`
        of the rows, the sums of all others are zero.
        """
        self.shape = shape
        self._check_call = CallCheck(shape)
        self.share = share
        self.max_rows = max_rows if share is None else max_rows * share.num_workers  # of which a message has its share
        self.timeout_s = timeout_s
        self.fallback = fallback
        self.membership: Membership | None = None
        self.links: dict[int, RouterLink] = {}
        self.lost: dict[int, str] = {}
        self.stats = RouterStats()
        self._seq = 0
        self._refused_T: np.ndarray | None = None  # bool, rows of this step that lack an expert; None for none
        self.mover: RowMover  # with all else of an epoch, from the first one on
        self._slots: LiveSlots
        self._answered_R: np.ndarray
        warm_up()
        live_slots.warm_up()

    def apply(
        self,
        membership: Membership,
        links: dict[int, RouterLink],
        lost: dict[int, str],
        local_R: np.ndarray | None = None,
    ) -> None:
        """Prepare an epoch and take it over at once: `links` to the shards that answer, `lost` why the others do not.

        Called between steps. Links of the old epoch that are not among the new ones are closed. Replicas on the ranks
        `local_R` (bool) come first. ValueError, before anything was changed, for a placement of another model or links
        of different kinds.
        """
        for link in self.take_over(prepare_epoch(self.shape, self.max_rows, membership, links, lost, local_R)):
            link.close()

    def take_over(self, prepared: PreparedEpoch) -> list[RouterLink]:
        """Switch to an epoch, in microseconds, between steps; returns the links that it has no use for, to be closed.

        A link that this dispatcher gave up since the epoch was prepared stays given up.
        """
        start_ns = time.monotonic_ns()
        for rank in prepared.kept:
            if self.links.get(rank) is not prepared.links[rank]:
                del prepared.links[rank]
                prepared.lost[rank] = self.lost.get(rank, "lost before the epoch began")
                prepared.slots.lose(rank)
                prepared.mover.forget(rank)
        wanted = {id(link) for link in prepared.links.values()}
        unwanted = [link for link in self.links.values() if id(link) not in wanted]
        if self.membership is not None:
            prepared.mover.carry_over(self.mover)
        self.membership, self.links, self.lost = prepared.membership, prepared.links, prepared.lost
        self.mover, self._slots, self._answered_R = prepared.mover, prepared.slots, prepared.answered_R
        self.stats.resize(len(prepared.answered_R))
        prepared.mover.count_into(self.stats)
        self.stats.add_swap(time.monotonic_ns() - start_ns)
        return unwanted

    @property
    def uncovered_pairs(self) -> int:
        """(layer, expert) pairs that no live shard has a slot for; 0 before the first epoch."""
        return 0 if self.membership is None else self._slots.uncovered

    def forward(
        self, layer: int, x_TD: torch.Tensor, topk_weights_TK: torch.Tensor, topk_ids_TK: torch.Tensor
    ) -> torch.Tensor:
        """Weighted sum over each token's experts [T, D], in x's dtype. T = 0 works."""
        return self.finish(self.begin(layer, x_TD, topk_weights_TK, topk_ids_TK))

    def begin(
        self, layer: int, x_TD: torch.Tensor, topk_weights_TK: torch.Tensor, topk_ids_TK: torch.Tensor
    ) -> Pending:
        """Send the rows of MoE layer `layer` to the shards that hold their experts; does not wait for them.

        ValueError for tensors that do not fit the model's shape, RuntimeError before the first `apply`.
        """
        if self.membership is None:
            raise RuntimeError("no membership was applied yet, so nobody holds the experts")
        self._check_call(layer, x_TD, topk_weights_TK, topk_ids_TK)
        pending = Pending(self.mover.stage(layer, x_TD, topk_weights_TK, topk_ids_TK))
        if self.share is not None:
            pending.narrow(self.share.of)
        self.stats.dispatches += 1
        if layer == 0:
            self.stats.steps += 1
            self._refused_T = None
            if self.fallback is not None:
                self.fallback.start_step()
        elif layer > self.shape.last_of_step:
            self._refused_T = None  # a guess that lacks an expert is a worse guess, and refuses nothing
        elif self._refused_T is not None:
            pending.leave_out(self._refused_T)  # what comes of them is thrown away, so nobody computes them further
        self._begin_batch(pending)
        return pending

    def finish(self, pending: Pending) -> torch.Tensor:
        """Wait for the shards of `begin` and return y [T, D]; the engine never learns of a shard that failed.

        y is where the rows travel from: on the device of x over links that carry its rows, else in host memory.
        """
        self._finish_batch(pending)
        while pending.stop < pending.rows.num_tokens:
            self._begin_batch(pending)
            self._finish_batch(pending)
        if self.share is not None and pending.rows.layer == self.shape.last_of_step:
            self.share.end_step(self.stats.steps, self._refused_T)
        return pending.rows.y_TD

    def take_refused(self) -> np.ndarray | None:
        """Which rows of the step so far lack an expert, since no time was left to compute it: bool [T]; None for none.

        Their sums are worthless, and so is all that is computed from them: their requests must end without a token.
        Called after a step's last layer; the next step begins with none. Of several workers, one tells those of all.
        """
        refused_T, self._refused_T = self._refused_T, None
        return refused_T if self.share is None else self.share.refused_by_any(self.stats.steps, refused_T)

    def close(self) -> None:
        """Close every link."""
        for link in self.links.values():
            link.close()
        self.links = {}

    def _begin_batch(self, pending: Pending) -> None:
        """Plan, pack and post the next rows, at most one message's worth."""
        start, rows = pending.stop, pending.rows
        if start or rows.num_tokens > self.max_rows:
            pending.stop = min(start + self.max_rows, rows.num_tokens)
            pending.batch, pending.missing_slots = rows.part(start, pending.stop), None
        else:
            pending.stop, pending.batch = rows.num_tokens, rows
        self.stats.rows += pending.stop - start
        self._post(pending)

    def _finish_batch(self, pending: Pending) -> None:
        """Collect and combine what was posted; repeat elsewhere what failed."""
        while True:
            start_ns = time.monotonic_ns()
            if pending.posted is None:
                if self.mover.receive(pending.batch, pending.plan, self.timeout_s):
                    return
                pending.posted = np.flatnonzero(pending.plan.nbytes_R).tolist()  # what has come is still there
            self._collect(pending, start_ns)
            if pending.plan.unserved:
                self._compute_here(pending)
            if not pending.failed:
                return
            plan = pending.plan
            self.stats.failovers += 1
            self.stats.take_back_rows(pending.failed, plan.rows_R, plan.pairs_R)
            pending.batch.narrow(np.isin(plan.rank_TK, pending.failed))
            self._post(pending)

    def _post(self, pending: Pending) -> None:
        """Plan and pack the batch, and send every shard its message."""
        batch, stats = pending.batch, self.stats
        self._seq += 1
        slots_LER = self._slots.chosen_from_LER
        pending.failed = []
        sent = self.mover.send(batch, self._seq, slots_LER)
        if sent is not None:
            pending.plan, pending.posted = sent, None
            return
        start_ns = time.monotonic_ns()
        plan = self.mover.plan_and_pack(batch, self._seq, slots_LER[batch.layer])
        pending.plan, pending.posted = plan, []
        for rank in np.flatnonzero(plan.nbytes_R).tolist():
            nbytes = int(plan.nbytes_R[rank])
            try:
                self._link(rank).post(nbytes)
            except ShardError as error:
                self._lose(error)
                pending.failed.append(rank)
            else:
                pending.posted.append(rank)
                stats.native.bytes_sent += nbytes
        stats.add_rows(plan.rows_R, plan.pairs_R)
        if not batch.repeated:
            stats.plan_pack.add(time.monotonic_ns() - start_ns)

    def _collect(self, pending: Pending, start_ns: int) -> None:
        """Wait for each shard's reply, from `start_ns` on, and combine those that came."""
        deadline_s = start_ns / 1e9 + self.timeout_s
        plan = pending.plan
        stats, answered_R = self.stats, self._answered_R
        answered_R[:] = False
        for rank in pending.posted or ():
            try:
                stats.native.bytes_received += self._receive(rank, int(plan.rows_R[rank]), deadline_s)
                answered_R[rank] = True
            except MissingSlotError as error:
                self._lose_slots(pending, error)
                pending.failed.append(rank)
            except ShardError as error:
                self._lose(error)
                pending.failed.append(rank)
        waited_ns = time.monotonic_ns()
        stats.wait.add(waited_ns - start_ns)
        self.mover.combine(pending.batch, plan, answered_R)
        stats.combine.add(time.monotonic_ns() - waited_ns)
        if answered_R.any():
            stats.add_success(time.monotonic())

    def _link(self, rank: int) -> RouterLink:
        """The rank's link. ShardLostError if it is gone: a plan never has such a rank, unless its tables are stale."""
        link = self.links.get(rank)
        if link is None:
            raise ShardLostError(rank, "it has no link")
        return link

    def _receive(self, rank: int, num_rows: int, deadline_s: float) -> int:
        """Wait for one shard's reply, check that it answers what was sent, and return its length."""
        link = self._link(rank)
        nbytes = link.wait(deadline_s)
        header = header_of(link.recv_buffer).tolist()
        if header[H_MAGIC] != MAGIC or header[H_SEQ] != self._seq:
            raise ShardRejectedError(rank, f"reply to message {header[H_SEQ]}, expected {self._seq}")
        if header[H_STATUS] == STATUS_NO_SLOT:
            reason = error_text(link.recv_buffer)
            raise MissingSlotError(rank, reason, header[H_NO_SLOT_LAYER], header[H_NO_SLOT_EXPERT])
        if header[H_STATUS] != STATUS_OK:
            raise ShardRejectedError(rank, f"refused the dispatch: {error_text(link.recv_buffer)}")
        expected = HEADER_BYTES + num_rows * self.shape.row_bytes
        if header[H_ROWS] != num_rows or nbytes != expected:
            raise ShardRejectedError(rank, f"reply of {header[H_ROWS]} rows, {nbytes} bytes; expected {expected}")
        return nbytes

    def _compute_here(self, pending: Pending) -> None:
        """Add what no live shard can compute, from the checkpoint."""
        batch = pending.batch
        ids_TK = np.where(pending.plan.rank_TK < 0, batch.topk_ids_TK, -1)
        wanted_M = np.flatnonzero((ids_TK >= 0).any(1))
        if self.fallback is None:
            raise RuntimeError("experts have no live shard, and this dispatcher was made without a fallback")
        tokens_M = torch.from_numpy(wanted_M).to(batch.x_TD.device)
        rows_MD, refused_M = self.fallback.forward(
            batch.layer,
            batch.x_TD[tokens_M],
            torch.from_numpy(batch.topk_weights_TK[wanted_M]).to(tokens_M.device),
            torch.from_numpy(ids_TK[wanted_M]),
        )
        self.mover.add(batch, tokens_M, rows_MD)
        self.stats.fallback_pairs += int((ids_TK[wanted_M[~refused_M.numpy()]] >= 0).sum())
        if refused_M.any():
            if self._refused_T is None:
                self._refused_T = np.zeros(pending.rows.num_tokens, np.bool_)
            first = pending.stop - batch.num_tokens
            self._refused_T[first + wanted_M[refused_M.numpy()]] = True

    def _lose_slots(self, pending: Pending, error: MissingSlotError) -> None:
        """Go on without a shard's slot for an expert until the next epoch. Each call loses one, so repeating ends."""
        layer, rank = pending.batch.layer, error.rank
        if error.layer != layer or not self._slots.has(layer, error.expert, rank):
            self._lose(ShardRejectedError(rank, f"lacks what it was not asked for: {error.reason}"))
            return
        missing_slots = pending.missing_slots = pending.missing_slots or {}
        missing_slots[rank] = missing_slots.get(rank, 0) + 1
        if missing_slots[rank] > MAX_MISSING_SLOTS:
            lost = self._slots.lose_layer(layer, rank)
        else:
            lost = self._slots.lose_expert(layer, error.expert, rank)
        self.stats.no_slot_pairs += lost
        logger.warning("going on without %d experts of layer %d at shard %d: %s", lost, layer, rank, error.reason)

    def _lose(self, error: ShardError) -> None:
        """Go on without a shard until the next epoch brings it back."""
        logger.error("going on without shard %d: %s", error.rank, error.reason)
        self.lost[error.rank] = error.reason
        self._slots.lose(error.rank)
        self.mover.forget(error.rank)
        link = self.links.pop(error.rank, None)
        if link is not None:
            link.close()
