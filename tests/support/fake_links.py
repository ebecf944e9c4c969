"""Shards without processes: links that compute in place and fail on demand."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from experts.checkpoint import ExpertCheckpoint
from experts.dispatch.dispatcher import Dispatcher
from experts.dispatch.fallback import FallbackExperts
from experts.dispatch.fallback_budget import FallbackBudget
from experts.dispatch.layer_shape import LayerShape
from experts.protocol.errors import ShardLostError, ShardTimeoutError
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
    error_reply,
    header_of,
    no_slot_reply,
    reply_capacity,
    request_capacity,
)
from experts.shard.request import NoSlotError, read_request
from experts.transports.base import RouterLink
from placement.placement import Placement
from tests.support.small_mesh import Batch, one_process

Fault = Callable[["FakeLink", int], int]
"""Gets the link and the length of the good reply in its receive buffer; spoils it and returns a length, or raises."""


class FakeLink(RouterLink):
    """Answers like a shard that holds what `placement` gives to `rank`.

    With `apart`, rows travel in tensors of their own, as between GPUs. `post_faults` and `wait_faults` hold a fault or
    None for each coming call; later calls succeed.
    """

    transport = "fake"

    def __init__(
        self,
        rank: int,
        placement: Placement,
        shape: LayerShape,
        max_rows: int,
        experts: FallbackExperts,
        apart: bool = False,
    ) -> None:
        self.rank = rank
        self.send_buffer = np.full(request_capacity(max_rows, shape.top_k, shape.row_bytes), 0xAA, np.uint8)
        self.recv_buffer = np.full(reply_capacity(max_rows, shape.row_bytes), 0xBB, np.uint8)
        if apart:
            self.send_tensor = torch.full((max_rows * shape.row_bytes,), 0xAA, dtype=torch.uint8)
            self.recv_tensor = torch.full((max_rows * shape.row_bytes,), 0xBB, dtype=torch.uint8)
        self.post_faults: list[Fault | None] = []
        self.wait_faults: list[Fault | None] = []
        self.posted: list[int] = []
        self.closed = False
        self.max_rows = max_rows
        self._slots_LE = placement.slots_LER[:, :, rank]
        self._shape = shape
        self._experts = experts

    def post(self, nbytes: int) -> None:
        assert not self.closed, "posted on a closed link"
        fault = self.post_faults.pop(0) if self.post_faults else None
        if fault is not None:
            fault(self, 0)
        self.posted.append(nbytes)

    def wait(self, deadline_s: float) -> int:
        assert not self.closed, "waited on a closed link"
        shape, request = self._shape, self.send_buffer
        code = DTYPE_CODES[shape.dtype]
        try:
            checked = read_request(request, self.posted[-1], self._slots_LE, code, shape.hidden_size)
        except NoSlotError as error:
            return no_slot_reply(
                self.recv_buffer, int(header_of(request)[H_SEQ]), str(error), error.layer, error.expert
            )
        assert checked.num_rows <= self.max_rows
        end = checked.rows_at + checked.num_rows * shape.row_bytes
        data = torch.from_numpy(request[checked.rows_at : end])
        if self.send_tensor is not None:
            data = self.send_tensor[: end - checked.rows_at]
        rows_MD = data.view(shape.dtype).view(-1, shape.hidden_size)
        experts_N = self._experts_of(checked.layer, checked.slots_N)
        out_MD = torch.zeros(rows_MD.shape)
        offsets = checked.row_offsets_M1.tolist()
        for row, (start, stop) in enumerate(itertools.pairwise(offsets)):
            ids_TK = torch.from_numpy(experts_N[None, start:stop])
            weights_TK = torch.from_numpy(checked.weights_N[None, start:stop])
            out_MD[row] = self._experts.forward(checked.layer, rows_MD[row : row + 1], weights_TK, ids_TK)[0]
        header = header_of(self.recv_buffer)
        header[:] = 0
        header[H_MAGIC], header[H_SEQ], header[H_STATUS] = MAGIC, checked.seq, STATUS_OK
        header[H_ROWS] = checked.num_rows
        length = HEADER_BYTES + checked.num_rows * shape.row_bytes
        answer = out_MD.to(shape.dtype).view(torch.uint8).flatten()
        if self.recv_tensor is not None:
            self.recv_tensor[: len(answer)] = answer
        else:
            self.recv_buffer[HEADER_BYTES:length] = answer.numpy()
        fault = self.wait_faults.pop(0) if self.wait_faults else None
        return length if fault is None else fault(self, length)

    def close(self) -> None:
        self.closed = True

    def _experts_of(self, layer: int, slots_N: np.ndarray) -> np.ndarray:
        expert_of_slot = {int(slot): expert for expert, slot in enumerate(self._slots_LE[layer]) if slot >= 0}
        return np.array([expert_of_slot[int(slot)] for slot in slots_N], np.int32)


def unhurried(model: Path, dtype: torch.dtype = torch.float32) -> FallbackBudget:
    """A router's fallback with all the time that it needs."""
    return FallbackBudget(ExpertCheckpoint.open(model), dtype, "cpu", 1 << 30, 1e6)


def lost(link: FakeLink, length: int) -> int:
    raise ShardLostError(link.rank, "its process closed the connection")


def silent(link: FakeLink, length: int) -> int:
    raise ShardTimeoutError(link.rank, "no reply before the deadline")


def refused(link: FakeLink, length: int) -> int:
    return error_reply(link.recv_buffer, int(header_of(link.recv_buffer)[H_SEQ]), "expert 3 of layer 0 has no slot")


def late_answer(link: FakeLink, length: int) -> int:
    header_of(link.recv_buffer)[H_SEQ] -= 1
    return length


def too_short(link: FakeLink, length: int) -> int:
    return length - 1


def rows_missing(link: FakeLink, length: int) -> int:
    header_of(link.recv_buffer)[H_ROWS] += 1
    return length


def no_magic(link: FakeLink, length: int) -> int:
    header_of(link.recv_buffer)[H_MAGIC] = 0
    return length


def garbage(link: FakeLink, length: int) -> int:
    link.recv_buffer[:] = 0xCC
    return length


# Faults, and what the reason for the loss must say.
WAIT_FAULTS: dict[str, tuple[Fault, str]] = {
    "lost": (lost, "closed the connection"),
    "silent": (silent, "before the deadline"),
    "refused": (refused, "refused the dispatch: expert 3 of layer 0 has no slot"),
    "late_answer": (late_answer, "reply to message"),
    "too_short": (too_short, "bytes; expected"),
    "rows_missing": (rows_missing, "rows,"),
    "no_magic": (no_magic, "reply to message"),
    "garbage": (garbage, "reply to message"),
}


@dataclass
class FakeMesh:
    """A dispatcher over links that compute in place."""

    dispatcher: Dispatcher
    links: dict[int, FakeLink]

    def forward(self, batch: Batch, layer: int = 0) -> torch.Tensor:
        return self.dispatcher.forward(layer, batch.x_TD, batch.weights_TK, batch.ids_TK)


def fake_mesh(
    model: Path,
    placement: Placement,
    *,
    max_rows: int = 64,
    dtype: torch.dtype = torch.float32,
    ranks: list[int] | None = None,
    apart: bool = False,
) -> FakeMesh:
    shape = LayerShape(2, 6, 3, 24, dtype)  # what small_mesh writes
    experts = one_process(model, dtype)
    wanted = list(range(placement.num_ranks)) if ranks is None else ranks
    links = {rank: FakeLink(rank, placement, shape, max_rows, experts, apart) for rank in wanted}
    dispatcher = Dispatcher(shape, max_rows, 1.0, unhurried(model, dtype))
    missing = {rank: "no shard has this rank yet" for rank in range(placement.num_ranks) if rank not in links}
    dispatcher.apply(Membership(1, placement, (None,) * placement.num_ranks), dict(links), missing)
    return FakeMesh(dispatcher, links)
