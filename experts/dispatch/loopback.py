"""Links without a shard: what a dispatcher costs by itself, for benchmarks and for compiling ahead of time."""

from __future__ import annotations

import numpy as np

from experts.dispatch.dispatcher import Dispatcher
from experts.dispatch.layer_shape import LayerShape
from experts.native.structs import KIND_LOOPBACK, NativeLink
from experts.protocol.membership import Membership
from experts.protocol.wire import (
    H_MAGIC,
    H_ROWS,
    H_SEQ,
    HEADER_BYTES,
    MAGIC,
    header_of,
    reply_capacity,
    request_capacity,
)
from experts.transports.base import RouterLink
from placement.placement import Placement


class LoopbackLink(RouterLink):
    """A pair without a shard: each post is answered immediately, with whatever rows are in the receive buffer."""

    transport = "loopback"

    def __init__(self, rank: int, shape: LayerShape, max_rows: int) -> None:
        self.rank = rank
        self._row_bytes = shape.row_bytes
        self.send_buffer = np.zeros(request_capacity(max_rows, shape.top_k, shape.row_bytes), np.uint8)
        self.recv_buffer = np.zeros(reply_capacity(max_rows, shape.row_bytes), np.uint8)
        header_of(self.recv_buffer)[H_MAGIC] = MAGIC
        self.native = NativeLink.of(KIND_LOOPBACK, self.send_buffer, self.recv_buffer)

    def post(self, nbytes: int) -> None:
        sent, answer = header_of(self.send_buffer), header_of(self.recv_buffer)
        answer[H_SEQ], answer[H_ROWS] = sent[H_SEQ], sent[H_ROWS]

    def wait(self, deadline_s: float) -> int:
        return HEADER_BYTES + int(header_of(self.recv_buffer)[H_ROWS]) * self._row_bytes

    def close(self) -> None:
        """Nothing is open."""


def loopback_dispatcher(
    shape: LayerShape, num_ranks: int, max_rows: int, kind: type[Dispatcher] = Dispatcher
) -> Dispatcher:
    """A dispatcher of a `kind` over a linear placement whose shards are loopback links."""
    links: dict[int, RouterLink] = {rank: LoopbackLink(rank, shape, max_rows) for rank in range(num_ranks)}
    dispatcher = kind(shape, max_rows, 5.0, fallback=None)
    placement = Placement.linear(shape.num_layers, shape.num_experts, num_ranks)
    dispatcher.apply(Membership(1, placement, (None,) * num_ranks), links, {})
    return dispatcher
