"""Checks a request at the shard, before anything trusts it, and looks up the slots of its experts.

Legend: M rows, N (row, expert) pairs, L MoE layers, E logical experts.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from experts.protocol.wire import (
    H_DTYPE,
    H_EPOCH,
    H_HIDDEN,
    H_LAYER,
    H_MAGIC,
    H_PAIRS,
    H_ROWS,
    H_SEQ,
    HEADER_BYTES,
    MAGIC,
    header_of,
    request_layout,
)
from placement.compiled import compiled


class BadRequestError(ValueError):
    """A request that this shard cannot serve; the text goes back to the router."""


class NoSlotError(BadRequestError):
    """A sound request for experts that this shard does not hold."""

    def __init__(self, layer: int, experts: list[int]) -> None:
        more = f", nor have {len(experts) - 1} more of the request" if len(experts) > 1 else ""
        super().__init__(f"expert {experts[0]} of layer {layer} has no slot on this shard{more}")
        self.layer = layer
        self.expert = experts[0]


@dataclass(frozen=True)
class Request:
    """A checked request: copies of what the receive buffer said, and the slots of this shard.

    row_offsets_M1, slots_N: int32. weights_N: float32. rows_at: byte offset of the rows in the receive buffer.
    """

    seq: int
    epoch: int
    layer: int
    row_offsets_M1: np.ndarray
    slots_N: np.ndarray
    weights_N: np.ndarray
    rows_at: int
    num_rows: int


@compiled()
def _find_slots(
    row_offsets_M1: np.ndarray, experts_N: np.ndarray, slot_of_expert_E: np.ndarray, slots_N: np.ndarray
) -> int:
    """Fill `slots_N`; returns -1 if all is well, -2 for bad offsets, else the index of a pair without a slot."""
    if row_offsets_M1[0] != 0 or row_offsets_M1[-1] != len(experts_N):
        return -2
    for row in range(len(row_offsets_M1) - 1):
        if row_offsets_M1[row] > row_offsets_M1[row + 1]:
            return -2
    for pair in range(len(experts_N)):
        expert = experts_N[pair]
        if expert < 0 or expert >= len(slot_of_expert_E) or slot_of_expert_E[expert] < 0:
            return pair
        slots_N[pair] = slot_of_expert_E[expert]
    return -1


def read_request(
    buffer: np.ndarray,
    nbytes: int,
    slot_of_expert_LE: np.ndarray,
    dtype_code: int,
    hidden_size: int,
    top_k: int | None = None,
) -> Request:
    """Parse and check the request of `nbytes` in `buffer` (uint8); `slot_of_expert_LE` is -1 where there is no slot.

    BadRequestError says what is wrong with it; NoSlotError, that all is well but for experts that have no slot.
    """
    if nbytes < HEADER_BYTES or nbytes > len(buffer):
        raise BadRequestError(f"a message of {nbytes} bytes, expected {HEADER_BYTES} to {len(buffer)}")
    words = header_of(buffer).tolist()
    if words[H_MAGIC] != MAGIC:
        raise BadRequestError(f"magic number {words[H_MAGIC]:#x}, expected {MAGIC:#x}")
    layer, num_rows, num_pairs = words[H_LAYER], words[H_ROWS], words[H_PAIRS]
    if not 0 <= layer < len(slot_of_expert_LE):
        raise BadRequestError(f"layer {layer}, this model has MoE layers 0 to {len(slot_of_expert_LE) - 1}")
    if words[H_DTYPE] != dtype_code or words[H_HIDDEN] != hidden_size:
        raise BadRequestError(
            f"rows of dtype code {words[H_DTYPE]} and hidden size {words[H_HIDDEN]}, "
            f"this shard serves {dtype_code} and {hidden_size}"
        )
    if num_rows < 0 or num_pairs < 0 or num_rows > nbytes or num_pairs > nbytes:
        raise BadRequestError(f"{num_rows} rows and {num_pairs} pairs in a message of {nbytes} bytes")
    if top_k is not None and num_pairs > num_rows * top_k:
        raise BadRequestError(f"{num_pairs} pairs in {num_rows} rows, this model has {top_k} experts for a row")
    row_bytes = hidden_size * (4 if dtype_code == 1 else 2)
    offsets_at, experts_at, weights_at, rows_at, expected = request_layout(num_rows, num_pairs, row_bytes)
    if expected != nbytes:
        raise BadRequestError(f"{num_rows} rows and {num_pairs} pairs need {expected} bytes, the message has {nbytes}")
    # The router can write to the buffer at any time: what is checked is a copy.
    offsets_M1 = buffer[offsets_at : offsets_at + 4 * (num_rows + 1)].view(np.int32).copy()
    experts_N = buffer[experts_at : experts_at + 4 * num_pairs].view(np.int32).copy()
    slots_N = np.empty(num_pairs, np.int32)
    verdict = _find_slots(offsets_M1, experts_N, slot_of_expert_LE[layer], slots_N)
    if verdict == -2:
        raise BadRequestError(f"row offsets do not count up from 0 to {num_pairs}")
    if verdict >= 0:
        slot_of_expert_E = slot_of_expert_LE[layer]
        experts = np.unique(experts_N)
        for expert in (int(experts[0]), int(experts[-1])):
            if not 0 <= expert < len(slot_of_expert_E):
                raise BadRequestError(
                    f"expert {expert} of layer {layer}, this model has experts 0 to {len(slot_of_expert_E) - 1}"
                )
        raise NoSlotError(layer, experts[slot_of_expert_E[experts] < 0].tolist())
    return Request(
        seq=words[H_SEQ],
        epoch=words[H_EPOCH],
        layer=layer,
        row_offsets_M1=offsets_M1,
        slots_N=slots_N,
        weights_N=buffer[weights_at : weights_at + 4 * num_pairs].view(np.float32).copy(),
        rows_at=rows_at,
        num_rows=num_rows,
    )


@functools.cache
def warm_up() -> None:
    """Compile the checks, or load them from the cache, so that no router's deadline pays for it."""
    buffer = np.zeros(request_layout(0, 0, 4)[-1], np.uint8)
    header = header_of(buffer)
    header[H_MAGIC], header[H_DTYPE], header[H_HIDDEN] = MAGIC, 1, 1
    read_request(buffer, len(buffer), np.zeros((1, 1), np.int32), 1, 1)
