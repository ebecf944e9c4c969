"""Runs the compiled `plan_and_pack` on buffers of its own, for the tests of plan and combine.

Legend: T tokens, K top-k, E logical experts, R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from experts.dispatch.rows import host_programs as plan
from experts.protocol.wire import request_capacity

POISON = 0xA5
CANARY_BYTES = 64


@dataclass
class Planned:
    """What `plan_and_pack` wrote."""

    unserved: int
    rank_TK: np.ndarray
    row_TK: np.ndarray
    rows_R: np.ndarray
    pairs_R: np.ndarray
    nbytes_R: np.ndarray
    buffers: list[np.ndarray]
    load_R: np.ndarray


def run_plan(
    x_TB: np.ndarray,
    ids_TK: np.ndarray,
    weights_TK: np.ndarray,
    slots_ER: np.ndarray,
    *,
    num_nodes: int = 1,
    load_R: np.ndarray | None = None,
    header: np.ndarray | None = None,
    with_rows: bool = True,
) -> Planned:
    """`x_TB` is uint8 [T, bytes of a row]. Buffers are poisoned; nothing may write past a message."""
    (num_tokens, top_k), num_ranks = ids_TK.shape, slots_ER.shape[1]
    row_bytes = x_TB.shape[1]
    capacity = request_capacity(num_tokens, top_k, row_bytes)
    buffers = [np.full(capacity + CANARY_BYTES, POISON, np.uint8) for _ in range(num_ranks)]
    planned = Planned(
        unserved=-1,
        rank_TK=np.full(ids_TK.shape, -77, np.int32),
        row_TK=np.full(ids_TK.shape, -77, np.int32),
        rows_R=np.full(num_ranks, -77, np.int32),
        pairs_R=np.full(num_ranks, -77, np.int32),
        nbytes_R=np.full(num_ranks, -77, np.int64),
        buffers=buffers,
        load_R=np.zeros(num_ranks, np.int64) if load_R is None else load_R,
    )
    planned.unserved = plan.plan_and_pack(
        x_TB.ctypes.data,
        row_bytes,
        ids_TK,
        weights_TK,
        slots_ER,
        (np.arange(num_ranks) * num_nodes // num_ranks).astype(np.int32),
        num_nodes,
        np.ones(num_ranks, np.int64),
        planned.load_R,
        np.array([buffer.ctypes.data for buffer in buffers], np.int64),
        plan.request_header(7, torch.float32, 0) if header is None else header,
        with_rows,
        planned.rank_TK,
        planned.row_TK,
        planned.rows_R,
        planned.pairs_R,
        planned.nbytes_R,
    )
    for buffer, nbytes in zip(buffers, planned.nbytes_R, strict=True):
        assert (buffer[max(int(nbytes), 0) :] == POISON).all(), "written past the end of the message"
    return planned
