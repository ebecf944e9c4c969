"""Rows on a GPU, in one Triton launch a direction. Importing this needs triton.

Legend: T tokens, K top-k, R ranks, D hidden size.

The host waits for the device once a layer, for the routing decisions: it plans, since the lengths of messages have to
be known before anything is sent. The plan goes back to the device in one copy that nobody waits for.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np
import torch

from experts.dispatch.layer_shape import LayerShape
from experts.dispatch.rows import triton_programs
from experts.dispatch.rows.base import DispatchPlan, RowBatch, RowMover
from experts.dispatch.rows.torch_mover import TorchRowMover, address_table
from experts.protocol.membership import Membership
from experts.transports.base import RouterLink

BLOCK_D = 1024


def blocks_of(hidden_size: int) -> int:
    """Programs for a row."""
    return -(-hidden_size // BLOCK_D)


@functools.cache
def warm_up(device: torch.device, dtype: torch.dtype, hidden_size: int, top_k: int) -> None:
    """Compile every form of the programs for rows of this kind, by a launch that moves nothing, once in a process.

    No request then waits for a compiler. What tells the forms apart are dtypes, constants, and whether addresses and
    strides are multiples of 16.
    """
    with torch.cuda.device_of(torch.empty(0, device=device)):
        y_TD = torch.zeros(1, hidden_size, dtype=dtype, device=device)
        sum_TD = torch.zeros(1, hidden_size, dtype=torch.float32, device=device)
        nowhere_TK = torch.full((1, top_k), -1, dtype=torch.int32, device=device)
        address_R = torch.zeros(1, dtype=torch.int64, device=device)
        blocks = blocks_of(hidden_size)
        triton_programs.pack_rows[(top_k, blocks)](
            y_TD, nowhere_TK, nowhere_TK, address_R, hidden_size, hidden_size, K=top_k, BLOCK_D=BLOCK_D
        )
        for kept, add, keep in ((y_TD, False, False), (sum_TD, False, True), (sum_TD, True, True)):
            triton_programs.combine_rows[(1, blocks)](
                nowhere_TK, nowhere_TK, address_R, kept, y_TD, hidden_size, hidden_size, hidden_size,
                ADD=add, KEEP=keep, K=top_k, BLOCK_D=BLOCK_D,
            )  # fmt: skip


class TritonRowMover(TorchRowMover):
    """One launch to pack, one to combine. Keeps pinned staging memory and its copies on the device."""

    def __init__(
        self, shape: LayerShape, max_rows: int, membership: Membership, links: Mapping[int, RouterLink]
    ) -> None:
        """`links` carry rows as tensors; at least one. ValueError for rows that are not 16-aligned."""
        super().__init__(shape, max_rows, membership, links)
        self._device = next(iter(self._send_tensors.values())).device
        self._pin = self._device.type == "cuda"
        self._routing_buffers = self._pair_of_buffers(0)
        self._plan_buffers = self._pair_of_buffers(0)
        self._plan_sent = torch.cuda.Event() if self._pin else None
        self._row_address_send_R = address_table(self._send_tensors).to(self._device)
        self._row_address_recv_R = address_table(self._recv_tensors).to(self._device)
        self._plan_TK: tuple[torch.Tensor, torch.Tensor] | None = None
        warm_up(self._device, shape.dtype, shape.hidden_size, shape.top_k)

    def carry_over(self, before: RowMover) -> None:
        super().carry_over(before)
        if isinstance(before, TritonRowMover) and before._device == self._device:
            self._routing_buffers, self._plan_buffers = before._routing_buffers, before._plan_buffers
            self._plan_sent = before._plan_sent  # the copy out of those buffers may not have left yet

    def combine(self, batch: RowBatch, plan: DispatchPlan, answered_R: np.ndarray) -> None:
        (num_tokens, top_k), D = plan.rank_TK.shape, batch.y_TD.shape[1]
        if not num_tokens:
            return
        plan_TK = self._plan_TK
        answered_TK = (plan.rank_TK >= 0) & answered_R[plan.rank_TK]
        complete = bool(answered_TK[plan.row_TK >= 0].all())
        if plan_TK is None or not complete:
            plan_TK = self._send_plan(plan.rank_TK, np.where(answered_TK, plan.row_TK, np.int32(-1)))
            self._plan_TK = None  # that was its memory
        y_TD, add = batch.y_TD, batch.sum_TD is not None
        if batch.sum_TD is None and (plan.unserved or not complete):
            batch.sum_TD = torch.empty(y_TD.shape, dtype=torch.float32, device=y_TD.device)
        kept = y_TD if batch.sum_TD is None else batch.sum_TD  # not accessed where nothing is kept
        triton_programs.combine_rows[(num_tokens, blocks_of(D))](
            *plan_TK, self._row_address_recv_R, kept, y_TD, y_TD.stride(0), kept.stride(0), D,
            ADD=add, KEEP=batch.sum_TD is not None, K=top_k, BLOCK_D=BLOCK_D,
        )  # fmt: skip

    def _pack(self, batch: RowBatch, plan: DispatchPlan) -> None:
        self._plan_TK = self._send_plan(plan.rank_TK, plan.row_TK)
        (num_tokens, top_k), D = plan.rank_TK.shape, batch.x_TD.shape[1]
        if num_tokens:
            triton_programs.pack_rows[(num_tokens * top_k, blocks_of(D))](
                batch.x_TD, *self._plan_TK, self._row_address_send_R, batch.x_TD.stride(0), D,
                K=top_k, BLOCK_D=BLOCK_D,
            )  # fmt: skip

    def _routing(self, topk_ids_TK: torch.Tensor, topk_weights_TK: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Both in one copy. The arrays are valid until the next call."""
        pairs = topk_ids_TK.numel()
        if self._routing_buffers[0].numel() < 2 * pairs:
            self._routing_buffers = self._pair_of_buffers(2 * pairs)
        host, staging = (buffer[: 2 * pairs] for buffer in self._routing_buffers)
        staging[:pairs].view(topk_ids_TK.shape).copy_(topk_ids_TK)
        staging[pairs:].view(torch.float32).view(topk_ids_TK.shape).copy_(topk_weights_TK)
        host.copy_(staging, non_blocking=True)
        if self._pin:
            torch.cuda.current_stream(self._device).synchronize()  # the layer's one wait for the device
        words = host.numpy()
        shape = tuple(topk_ids_TK.shape)
        return words[:pairs].reshape(shape), words[pairs:].view(np.float32).reshape(shape)

    def _send_plan(self, rank_TK: np.ndarray, row_TK: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """The plan on the device, in one copy."""
        pairs = rank_TK.size
        if self._plan_sent is not None:
            self._plan_sent.synchronize()  # the previous copy has left the pinned memory, usually long ago
        second = -(-pairs // 4) * 4  # in words; Triton compiles again for addresses that are no multiple of 16 bytes
        if self._plan_buffers[0].numel() < second + pairs:
            self._plan_buffers = self._pair_of_buffers(second + pairs)
        host, plan = (buffer[: second + pairs] for buffer in self._plan_buffers)
        words = host.numpy()
        words[:pairs], words[second:] = rank_TK.ravel(), row_TK.ravel()
        plan.copy_(host, non_blocking=True)
        if self._plan_sent is not None:
            self._plan_sent.record(torch.cuda.current_stream(self._device))
        return plan[:pairs], plan[second:]

    def _pair_of_buffers(self, words: int) -> tuple[torch.Tensor, torch.Tensor]:
        """int32 on the host and on the device."""
        host = torch.empty(words, dtype=torch.int32, pin_memory=self._pin and words > 0)
        return host, torch.empty(words, dtype=torch.int32, device=self._device)
