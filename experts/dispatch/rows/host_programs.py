"""From routing decisions to messages and back: plan, pack and combine, without per-token Python.

Legend: T tokens, K top-k, E logical experts, R ranks, D hidden size; M rows and N (row, expert) pairs of one message.

`plan_and_pack` picks one replica for each pair by the rule that the planner evaluates with (`choose_ranks`), and
writes each rank's message straight into the buffer that travels. A row goes to a rank once, however many of its experts
are there. `combine` adds the partial rows that come back, in float32. Both take addresses, so one call serves every
link; both run without the GIL and allocate nothing.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from numba import carray, config, types
from numba.core import cgutils
from numba.extending import intrinsic

from experts.protocol.wire import (
    DTYPE_CODES,
    H_DTYPE,
    H_EPOCH,
    H_HIDDEN,
    H_MAGIC,
    H_PAIRS,
    H_ROWS,
    HEADER_BYTES,
    HEADER_WORDS,
    MAGIC,
    request_layout,
)
from placement.compiled import compiled, compiled_callback
from placement.rule.recent_loads import choose_ranks

FLOAT32, BFLOAT16 = 1, 2  # wire.DTYPE_CODES, as compile-time constants of the kernels below

_memcpy = types.ExternalFunction("memcpy", types.int64(types.int64, types.int64, types.int64))


def _pointer_to(element: types.Type) -> Any:
    """An intrinsic that turns an address (int64) into a typed pointer for `carray`."""

    @intrinsic
    def cast(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(element)(types.int64), codegen

    return cast


_i64_at = _pointer_to(types.int64)
_i32_at = _pointer_to(types.int32)
_u32_at = _pointer_to(types.uint32)
_u16_at = _pointer_to(types.uint16)
_f32_at = _pointer_to(types.float32)


def request_header(epoch: int, dtype: torch.dtype, hidden_size: int) -> np.ndarray:
    """Header words (int64 [16]) that all requests of an epoch share. H_LAYER and H_SEQ are the caller's to set."""
    header = np.zeros(HEADER_WORDS, np.int64)
    header[H_MAGIC], header[H_EPOCH] = MAGIC, epoch
    header[H_DTYPE], header[H_HIDDEN] = DTYPE_CODES[dtype], hidden_size
    return header


_i64, _i32_pointer, _i64_pointer = types.int64, types.CPointer(types.int32), types.CPointer(types.int64)


@compiled_callback(
    types.void(
        _i32_pointer, _i64, _i64, _i32_pointer, _i64, _i64, _i32_pointer, _i64, _i64_pointer, _i64_pointer,
        _i32_pointer,
    )
)  # fmt: skip
def choose_ranks_callback(
    ids: Any, tokens: int, top_k: int, slots: Any, experts: int, ranks: int, nodes: Any, num_nodes: int, work: Any,
    load: Any, chosen: Any,
) -> None:  # fmt: skip
    """`choose_ranks` for C++ (router.h); its `address` is what to call."""
    choose_ranks(
        carray(ids, (tokens, top_k)),
        carray(slots, (experts, ranks)),
        carray(nodes, ranks),
        num_nodes,
        carray(work, ranks),
        carray(load, ranks),
        carray(chosen, (tokens, top_k)),
    )


@compiled()
def plan_and_pack(
    x_address: int,
    row_bytes: int,
    topk_ids_TK: np.ndarray,
    topk_weights_TK: np.ndarray,
    slots_ER: np.ndarray,
    node_of_rank_R: np.ndarray,
    num_nodes: int,
    work_R: np.ndarray,
    rank_load_R: np.ndarray,
    send_address_R: np.ndarray,
    common_header: np.ndarray,
    with_rows: bool,
    rank_TK: np.ndarray,
    row_TK: np.ndarray,
    rows_R: np.ndarray,
    pairs_R: np.ndarray,
    nbytes_R: np.ndarray,
) -> int:
    """Choose a rank for each (token, expert) pair and write every rank's request.

    Args:
        x_address: address of the activations [T, D], contiguous rows of `row_bytes` bytes.
        topk_ids_TK: int32, logical experts; -1 where a pair is not wanted.
        topk_weights_TK: float32.
        slots_ER: int32, the slot of expert e on rank r, -1 where it has none or the rank is lost.
        node_of_rank_R, num_nodes: int32 and a count, for the replica choice.
        work_R: int64, what a pair counts on each rank, for the same.
        rank_load_R: int64, the work that each rank got recently; halved here and added to, breaks ties.
        send_address_R: int64, address of each rank's send buffer; big enough for T rows with K pairs each. 0 where
            there is no link: such a rank's message has a length, and is not written.
        common_header: int64 [16], what the headers of all messages have in common; see `request_header`.
        with_rows: copy the rows too; False where they travel separately, from a device.
        rank_TK, row_TK, rows_R, pairs_R, nbytes_R: out; see `rows.base.DispatchPlan`.

    Returns:
        The number of wanted pairs that no live rank can serve.
    """
    num_tokens, top_k = topk_ids_TK.shape
    num_ranks = slots_ER.shape[1]
    for rank in range(num_ranks):
        rows_R[rank] = 0
        pairs_R[rank] = 0
        nbytes_R[rank] = 0
    choose_ranks(topk_ids_TK, slots_ER, node_of_rank_R, num_nodes, work_R, rank_load_R, rank_TK)

    unserved = 0
    for token in range(num_tokens):
        for k in range(top_k):
            rank = rank_TK[token, k]
            row_TK[token, k] = -1
            if rank < 0:
                if topk_ids_TK[token, k] >= 0:
                    unserved += 1
                continue
            pairs_R[rank] += 1
            first = True
            for other in range(k):
                if rank_TK[token, other] == rank:
                    first = False
                    break
            if first:
                row_TK[token, k] = rows_R[rank]
                rows_R[rank] += 1

    for rank in range(num_ranks):
        num_rows, num_pairs = rows_R[rank], pairs_R[rank]
        if num_rows == 0:
            continue
        base = send_address_R[rank]
        offsets_at, experts_at, weights_at, rows_at, nbytes = request_layout(num_rows, num_pairs, row_bytes)
        nbytes_R[rank] = nbytes
        if base == 0:
            continue
        header = carray(_i64_at(base), HEADER_WORDS)
        for word in range(HEADER_WORDS):
            header[word] = common_header[word]
        header[H_ROWS], header[H_PAIRS] = num_rows, num_pairs
        offsets = carray(_i32_at(base + offsets_at), num_rows + 1)
        experts = carray(_i32_at(base + experts_at), num_pairs)
        weights = carray(_f32_at(base + weights_at), num_pairs)
        row = 0
        pair = 0
        for token in range(num_tokens):
            start = pair
            for k in range(top_k):
                if rank_TK[token, k] == rank:
                    experts[pair] = topk_ids_TK[token, k]
                    weights[pair] = topk_weights_TK[token, k]
                    pair += 1
            if pair > start:
                offsets[row] = start
                if with_rows:
                    _memcpy(base + rows_at + row * row_bytes, x_address + token * row_bytes, row_bytes)
                row += 1
        offsets[num_rows] = pair
    return unserved


@compiled(fastmath={"contract"})
def combine(
    rank_TK: np.ndarray,
    row_TK: np.ndarray,
    answered_R: np.ndarray,
    reply_address_R: np.ndarray,
    dtype_code: int,
    scratch_D: np.ndarray,
    y_address: int,
    accumulate: bool,
) -> None:
    """y = sum over shards of their partial rows, accumulated in float32.

    Args:
        rank_TK, row_TK: as `plan_and_pack` wrote them.
        answered_R: bool, ranks whose reply arrived; the others add nothing.
        reply_address_R: int64, address of each rank's reply (its header).
        dtype_code: FLOAT32 or BFLOAT16, of replies and y.
        scratch_D: float32 [D], overwritten.
        y_address: address of y [T, D], contiguous.
        accumulate: add to y instead of overwriting it.
    """
    num_tokens, top_k = rank_TK.shape
    hidden = scratch_D.shape[0]
    scratch_bits = scratch_D.view(np.uint32)
    for token in range(num_tokens):
        if dtype_code == FLOAT32:
            y_row = carray(_f32_at(y_address + token * hidden * 4), hidden)
            fresh = not accumulate
            for k in range(top_k):
                row, rank = row_TK[token, k], rank_TK[token, k]
                if row >= 0 and answered_R[rank] and reply_address_R[rank]:
                    part = carray(_f32_at(reply_address_R[rank] + HEADER_BYTES + row * hidden * 4), hidden)
                    if fresh:
                        for d in range(hidden):
                            y_row[d] = part[d]
                        fresh = False
                    else:
                        for d in range(hidden):
                            y_row[d] += part[d]
            if fresh:
                y_row[:] = np.float32(0)
        else:
            y_bits = carray(_u16_at(y_address + token * hidden * 2), hidden)
            num_parts = 0
            first_address = 0
            if accumulate:
                num_parts = 1
                first_address = y_address + token * hidden * 2
            for k in range(top_k):
                row, rank = row_TK[token, k], rank_TK[token, k]
                if row < 0 or not answered_R[rank] or reply_address_R[rank] == 0:
                    continue
                address = reply_address_R[rank] + HEADER_BYTES + row * hidden * 2
                num_parts += 1
                if num_parts == 1:
                    first_address = address
                    continue
                part16 = carray(_u16_at(address), hidden)
                if num_parts == 2:
                    first16 = carray(_u16_at(first_address), hidden)
                    for d in range(hidden):
                        scratch_bits[d] = np.uint32(first16[d]) << np.uint32(16)
                for d in range(hidden):
                    scratch_D[d] += _as_float(np.uint32(part16[d]) << np.uint32(16))
            if num_parts == 0:
                y_bits[:] = np.uint16(0)
            elif num_parts == 1:
                if not accumulate:
                    _memcpy(y_address + token * hidden * 2, first_address, hidden * 2)
            else:
                for d in range(hidden):
                    bits = scratch_bits[d]
                    # round to nearest even; a NaN keeps its top bits and is made quiet
                    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
                    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)
                    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
                    y_bits[d] = np.uint16(quiet) if is_nan else np.uint16(rounded)


@intrinsic
def _as_float(typingctx: Any, bits: Any) -> Any:
    """The float32 whose bits are the given uint32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], cgutils.ir.FloatType())

    return types.float32(types.uint32), codegen


@functools.cache
def warm_up() -> None:
    """Load or compile all functions now: the first time on a machine takes seconds, which no request should pay."""
    pairs_TK, weights_TK = np.zeros((0, 1), np.int32), np.zeros((0, 1), np.float32)
    rank_R, size_R = np.zeros(1, np.int32), np.zeros(1, np.int64)
    slots_ER, header = np.zeros((1, 1), np.int32), request_header(0, torch.float32, 1)
    inputs = (0, 0, pairs_TK, weights_TK, slots_ER, rank_R, 1, size_R, size_R, size_R, header, True)
    plan_and_pack(*inputs, pairs_TK, pairs_TK, rank_R, rank_R, size_R)
    combine(pairs_TK, pairs_TK, np.zeros(1, np.bool_), size_R, FLOAT32, np.zeros(1, np.float32), 0, False)
    if not config.DISABLE_JIT:
        assert choose_ranks_callback.address
