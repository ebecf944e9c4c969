"""Dispatch and combine of one router: a step's rows go out to the shards, their weighted sums come back.

Legend: T tokens, K top-k, L MoE layers, E logical experts, R ranks, D hidden size.

    begin()   plan, pack, post to every shard                        (the router may compute shared experts meanwhile)
    finish()  wait for each shard, combine; what a shard failed to do is repeated in the same layer: on the surviving
              replicas, and where an expert has none left, on the router itself from the checkpoint

A shard that failed is left out until the next epoch. One thread drives a dispatcher: that of the vLLM worker, which
also applies new epochs, between steps.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import numpy as np
import torch

from experts.dispatch.fallback import LocalExperts
from experts.dispatch.layer_shape import LayerShape
from experts.dispatch.live_slots import LiveSlots
from experts.dispatch.rows.base import RowMover, routing_on_host
from experts.dispatch.rows.host_programs import combine, plan_and_pack, warm_up
from experts.dispatch.rows.pick import pick_row_mover
from experts.dispatch.stats import RouterStats
from experts.protocol.errors import ShardError, ShardRejectedError
from experts.protocol.membership import Membership
from experts.protocol.wire import (
    DTYPE_CODES,
    H_MAGIC,
    H_ROWS,
    H_SEQ,
    H_STATUS,
    HEADER_BYTES,
    MAGIC,
    STATUS_OK,
    error_text,
    header_of,
)
from experts.transports.base import RouterLink

logger = logging.getLogger(__name__)


@dataclass
class Pending:
    """A layer's dispatch between begin() and finish()."""

    layer: int
    x_TD: torch.Tensor
    y_TD: torch.Tensor
    sum_TD: torch.Tensor | None  # fp32: what a repetition adds to, where a RowMover combines
    topk_ids_TK: np.ndarray
    topk_weights_TK: np.ndarray
    start: int
    stop: int
    posted: list[int]
    failed: list[int]
    unserved: int


class Dispatcher:
    """Sends rows to shards and adds up what comes back; owns the links of one router."""

    def __init__(self, shape: LayerShape, max_rows: int, deadline_s: float, fallback: LocalExperts | None) -> None:
        self.shape = shape
        self.max_rows = max_rows
        self.deadline_s = deadline_s
        self.fallback = fallback
        self.membership: Membership | None = None
        self.links: dict[int, RouterLink] = {}
        self.lost: dict[int, str] = {}
        self.stats = RouterStats()
        self._seq = 0
        self._head = np.zeros(5, np.int64)
        self._head[3], self._head[4] = DTYPE_CODES[shape.dtype], shape.hidden_size
        self._rank_TK = np.zeros((max_rows, shape.top_k), np.int32)
        self._row_TK = np.zeros((max_rows, shape.top_k), np.int32)
        self._scratch_D = np.zeros(shape.hidden_size, np.float32)
        self._rows_apart = False
        self._mover: RowMover | None = None
        self._resize(0)
        warm_up()

    def _resize(self, num_ranks: int) -> None:
        self._rows_R = np.zeros(num_ranks, np.int32)
        self._pairs_R = np.zeros(num_ranks, np.int32)
        self._nbytes_R = np.zeros(num_ranks, np.int64)
        self._send_address_R = np.zeros(num_ranks, np.int64)
        self._reply_address_R = np.zeros(num_ranks, np.int64)
        self._answered_R = np.zeros(num_ranks, np.bool_)
        self._load_LR = np.zeros((self.shape.num_layers, num_ranks), np.int64)
        self.stats.resize(num_ranks)

    def apply(
        self,
        membership: Membership,
        links: dict[int, RouterLink],
        lost: dict[int, str],
        local_R: np.ndarray | None = None,
    ) -> None:
        """Switch to a new epoch: `links` to the shards that answer, `lost` the reason for each that does not.

        Called between steps. Links of the old epoch that are not among the new ones are closed. Replicas on the ranks
        `local_R` (bool) come first. ValueError, before anything was changed, for a placement of another model or links
        of different kinds.
        """
        placement = membership.placement
        self.shape.check_placement(placement)
        # Rows that travel from a device, and float16, which numba does not know, are combined as tensors.
        rows_apart = {link.send_tensor is not None for link in links.values()}
        if len(rows_apart) > 1:
            raise ValueError("some links carry rows from a device and some from host memory; use one transport for all")
        for link in self.links.values():
            if link not in links.values():
                link.close()
        self._resize(placement.num_ranks)
        self.membership = membership
        self.links = dict(links)
        self.lost = dict(lost)
        self._slots = LiveSlots(placement.slots_LER, local_R)
        self._num_nodes, self._node_of_rank_R = placement.num_nodes, placement.node_of_rank_R
        self._head[0] = membership.epoch
        self._rows_apart = True in rows_apart
        self._mover = self._bind_mover() if self._rows_apart or self.shape.dtype == torch.float16 else None
        for rank in set(range(placement.num_ranks)) - links.keys():
            self._slots.lose(rank)
        for rank, link in links.items():
            self._send_address_R[rank] = link.send_buffer.ctypes.data
            self._reply_address_R[rank] = link.recv_buffer.ctypes.data

    def forward(
        self, layer: int, x_TD: torch.Tensor, topk_weights_TK: torch.Tensor, topk_ids_TK: torch.Tensor
    ) -> torch.Tensor:
        """Weighted sum over each token's experts [T, D], in x's dtype. T = 0 works."""
        return self.finish(self.begin(layer, x_TD, topk_weights_TK, topk_ids_TK))

    def begin(
        self, layer: int, x_TD: torch.Tensor, topk_weights_TK: torch.Tensor, topk_ids_TK: torch.Tensor
    ) -> Pending:
        """Send the rows of MoE layer `layer` to the shards that hold their experts; does not wait for them."""
        if self.membership is None:
            raise RuntimeError("no membership was applied yet, so nobody holds the experts")
        self.shape.check_call(layer, x_TD, topk_weights_TK, topk_ids_TK)
        if not self._rows_apart:
            # Links in host memory, or no link at all: packing and combining must not meet a device's addresses.
            x_TD = x_TD.cpu()
        ids_TK, weights_TK = (self._mover.routing if self._mover else routing_on_host)(topk_ids_TK, topk_weights_TK)
        pending = Pending(
            layer=layer,
            x_TD=x_TD.contiguous(),
            y_TD=torch.empty_like(x_TD, memory_format=torch.contiguous_format),
            sum_TD=None,
            topk_ids_TK=ids_TK,
            topk_weights_TK=weights_TK,
            start=0,
            stop=0,
            posted=[],
            failed=[],
            unserved=0,
        )
        self.stats.dispatches += 1
        self.stats.steps += layer == 0
        self._post(pending, 0)
        return pending

    def finish(self, pending: Pending) -> torch.Tensor:
        """Wait for the shards of `begin` and return y [T, D]; the engine never learns of a shard that failed.

        y is where the rows travel from: on the device of x over links that carry its rows, else in host memory.
        """
        num_tokens = pending.x_TD.shape[0]
        while True:
            self._collect(pending)
            if pending.stop >= num_tokens:
                break
            self._post(pending, pending.stop)
        return pending.y_TD

    def close(self) -> None:
        """Close every link."""
        for link in self.links.values():
            link.close()
        self.links = {}

    def _post(self, pending: Pending, start: int) -> None:
        """Plan, pack and post the rows from `start` on, at most one message's worth."""
        start_ns = time.perf_counter_ns()
        pending.start, pending.stop = start, min(start + self.max_rows, pending.x_TD.shape[0])
        ids_TK = pending.topk_ids_TK[start : pending.stop]
        weights_TK = pending.topk_weights_TK[start : pending.stop]
        self._plan_and_post(pending, ids_TK, weights_TK)
        self.stats.rows += pending.stop - start
        self.stats.plan_pack.add(time.perf_counter_ns() - start_ns)

    def _plan_and_post(self, pending: Pending, ids_TK: np.ndarray, weights_TK: np.ndarray) -> None:
        num_tokens = len(ids_TK)
        shape = self.shape
        self._seq += 1
        self._head[1], self._head[2] = pending.layer, self._seq
        pending.unserved = plan_and_pack(
            pending.x_TD.data_ptr() + pending.start * shape.row_bytes,
            shape.row_bytes,
            ids_TK,
            weights_TK,
            self._slots.chosen_from_LER[pending.layer],
            self._node_of_rank_R,
            self._num_nodes,
            self._load_LR[pending.layer],
            self._send_address_R,
            self._head,
            not self._rows_apart,
            self._rank_TK[:num_tokens],
            self._row_TK[:num_tokens],
            self._rows_R,
            self._pairs_R,
            self._nbytes_R,
        )
        pending.posted, pending.failed = [], []
        self._answered_R[:] = False
        if self._rows_apart:
            assert self._mover is not None
            x_TD = pending.x_TD[pending.start : pending.stop]
            self._mover.pack(x_TD, self._rank_TK[:num_tokens], self._row_TK[:num_tokens])
        for rank in np.flatnonzero(self._nbytes_R).tolist():
            nbytes = int(self._nbytes_R[rank])
            try:
                self.links[rank].post(nbytes)
            except ShardError as error:
                self._lose(error)
                pending.failed.append(rank)
            else:
                pending.posted.append(rank)
                self.stats.bytes_sent += nbytes
        self.stats.add_rows(self._rows_R, self._pairs_R)

    def _collect(self, pending: Pending) -> None:
        """Wait for what was posted, combine it, and repeat elsewhere what failed."""
        accumulate = False
        ids_TK = pending.topk_ids_TK[pending.start : pending.stop]
        weights_TK = pending.topk_weights_TK[pending.start : pending.stop]
        while True:
            start_ns = time.perf_counter_ns()
            deadline_s = time.monotonic() + self.deadline_s
            for rank in pending.posted:
                try:
                    self.stats.bytes_received += self._receive(rank, deadline_s)
                    self._answered_R[rank] = True
                except ShardError as error:
                    self._lose(error)
                    pending.failed.append(rank)
            waited_ns = time.perf_counter_ns()
            self.stats.wait.add(waited_ns - start_ns)
            self._combine(pending, accumulate)
            self.stats.combine.add(time.perf_counter_ns() - waited_ns)
            if self._answered_R.any():
                self.stats.last_success_s = time.monotonic()
            if not pending.failed and not pending.unserved:
                return
            num_tokens = pending.stop - pending.start
            rank_TK = self._rank_TK[:num_tokens]
            if pending.unserved:
                self._compute_here(pending, np.where(rank_TK < 0, ids_TK, -1), weights_TK)
            if not pending.failed:
                return
            self.stats.failovers += 1
            self.stats.take_back_rows(pending.failed, self._rows_R, self._pairs_R)
            # Only what failed goes out again; every later look at this round has to see the same narrowed ids.
            ids_TK = np.where(np.isin(rank_TK, pending.failed), ids_TK, np.int32(-1))
            self._plan_and_post(pending, ids_TK, weights_TK)
            accumulate = True

    def _receive(self, rank: int, deadline_s: float) -> int:
        """Wait for one shard's reply and check that it is the answer to what was sent."""
        link = self.links[rank]
        nbytes = link.wait(deadline_s)
        header = header_of(link.recv_buffer)
        if int(header[H_MAGIC]) != MAGIC or int(header[H_SEQ]) != self._seq:
            raise ShardRejectedError(rank, f"reply to message {int(header[H_SEQ])}, expected {self._seq}")
        if int(header[H_STATUS]) != STATUS_OK:
            raise ShardRejectedError(rank, f"refused the dispatch: {error_text(link.recv_buffer)}")
        expected = HEADER_BYTES + int(self._rows_R[rank]) * self.shape.row_bytes
        if int(header[H_ROWS]) != int(self._rows_R[rank]) or nbytes != expected:
            raise ShardRejectedError(rank, f"reply of {int(header[H_ROWS])} rows, {nbytes} bytes; expected {expected}")
        return nbytes

    def _combine(self, pending: Pending, accumulate: bool) -> None:
        part = slice(pending.start, pending.stop)
        rank_TK, row_TK = self._rank_TK[: pending.stop - pending.start], self._row_TK[: pending.stop - pending.start]
        if self._mover is not None:
            if pending.sum_TD is None and (pending.failed or pending.unserved):
                pending.sum_TD = torch.empty(pending.x_TD.shape, dtype=torch.float32, device=pending.x_TD.device)
            sum_TD = None if pending.sum_TD is None else pending.sum_TD[part]
            self._mover.combine(rank_TK, row_TK, self._answered_R, pending.y_TD[part], sum_TD, accumulate)
            return
        combine(
            rank_TK,
            row_TK,
            self._answered_R,
            self._reply_address_R,
            DTYPE_CODES[self.shape.dtype],
            self._scratch_D,
            pending.y_TD.data_ptr() + pending.start * self.shape.row_bytes,
            accumulate,
        )

    def _bind_mover(self) -> RowMover:
        """What packs and combines where rows do not lie in host memory, or are float16."""
        send = {rank: link.send_tensor for rank, link in self.links.items() if link.send_tensor is not None}
        recv = {
            rank: torch.from_numpy(link.recv_buffer[HEADER_BYTES:]) if link.recv_tensor is None else link.recv_tensor
            for rank, link in self.links.items()
        }
        device = next(iter(recv.values())).device if recv else torch.device("cpu")
        mover = pick_row_mover(device)
        mover.bind(send, recv)
        return mover

    def _compute_here(self, pending: Pending, ids_TK: np.ndarray, weights_TK: np.ndarray) -> None:
        """Add what no live shard can compute, from the checkpoint."""
        wanted = np.flatnonzero((ids_TK >= 0).any(1))
        self.stats.fallback_pairs += int((ids_TK >= 0).sum())
        if self.fallback is None:
            raise RuntimeError("experts have no live shard, and this dispatcher was made without a fallback")
        device = pending.x_TD.device
        index = torch.from_numpy(wanted + pending.start).to(device)
        part = self.fallback.forward(
            pending.layer,
            pending.x_TD[index],
            torch.from_numpy(weights_TK[wanted]).to(device),
            torch.from_numpy(ids_TK[wanted]).to(device),
        )
        if pending.sum_TD is not None:
            pending.sum_TD[index] += part.float()
            pending.y_TD[index] = pending.sum_TD[index].to(part.dtype)
        else:
            pending.y_TD[index] += part

    def _lose(self, error: ShardError) -> None:
        """Go on without a shard until the next epoch brings it back."""
        logger.error("going on without shard %d: %s", error.rank, error.reason)
        self.lost[error.rank] = error.reason
        self._slots.lose(error.rank)
        link = self.links.pop(error.rank, None)
        if link is not None:
            link.close()
