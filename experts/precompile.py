"""Compile what is compiled on first use, so that the first start is as quick as the next: `-m experts.precompile`.

Numba's results and the C++ kernel are kept in the user's cache (`placement.compiled`), each in a folder named after its
sources.
"""

from __future__ import annotations

import time

import numpy as np
import torch

from experts.dispatcher import Dispatcher
from experts.kernels.native_build import NativeBuildError, load_library
from experts.layer_shape import LayerShape
from experts.link import RouterLink
from experts.membership import Membership
from experts.request import read_request
from experts.transports import shm
from experts.wire import (
    DTYPE_CODES,
    H_MAGIC,
    H_ROWS,
    H_SEQ,
    HEADER_BYTES,
    MAGIC,
    header_of,
    reply_capacity,
    request_capacity,
)
from placement.tables import Placement


class LoopbackLink(RouterLink):
    """A pair whose shard is absent: every post is answered at once with the rows that lie in the receive buffer."""

    transport = "loopback"

    def __init__(self, rank: int, shape: LayerShape, max_rows: int) -> None:
        self.rank = rank
        self._row_bytes = shape.row_bytes
        self.send_buffer = np.zeros(request_capacity(max_rows, shape.top_k, shape.row_bytes), np.uint8)
        self.recv_buffer = np.zeros(reply_capacity(max_rows, shape.row_bytes), np.uint8)
        header_of(self.recv_buffer)[H_MAGIC] = MAGIC
        self.posted_bytes = 0

    def post(self, nbytes: int) -> None:
        self.posted_bytes = nbytes
        sent, answer = header_of(self.send_buffer), header_of(self.recv_buffer)
        answer[H_SEQ], answer[H_ROWS] = sent[H_SEQ], sent[H_ROWS]

    def wait(self, deadline_s: float) -> int:
        return HEADER_BYTES + int(header_of(self.recv_buffer)[H_ROWS]) * self._row_bytes

    def close(self) -> None:
        """Nothing is open."""


def loopback_dispatcher(shape: LayerShape, num_ranks: int, max_rows: int) -> Dispatcher:
    """A dispatcher over a linear placement whose shards are loopback links."""
    links: dict[int, RouterLink] = {rank: LoopbackLink(rank, shape, max_rows) for rank in range(num_ranks)}
    dispatcher = Dispatcher(shape, max_rows, 5.0, fallback=None)
    placement = Placement.linear(shape.num_layers, shape.num_experts, num_ranks)
    dispatcher.apply(Membership(1, placement, (None,) * num_ranks), links, {})
    return dispatcher


def main() -> None:
    """Run every compiled function once on small inputs."""
    began_s = time.monotonic()
    for dtype in (torch.float32, torch.bfloat16):
        shape = LayerShape(num_layers=1, num_experts=4, top_k=2, hidden_size=8, dtype=dtype)
        dispatcher = loopback_dispatcher(shape, 2, 4)
        ids_TK = torch.tensor([[0, 3], [1, 2]], dtype=torch.int32)
        dispatcher.forward(0, torch.zeros(2, 8, dtype=dtype), torch.ones(2, 2), ids_TK)
        link = dispatcher.links[0]
        assert isinstance(link, LoopbackLink)
        slot_of_expert_LE = np.array([[0, 1, -1, -1]], np.int32)
        read_request(link.send_buffer, link.posted_bytes, slot_of_expert_LE, DTYPE_CODES[dtype], 8)
    shm.warm_up()
    try:
        load_library()
    except NativeBuildError as error:
        print(f"    the C++ expert kernel is left out: {error}")
    print(f"    done in {time.monotonic() - began_s:.0f} s")


if __name__ == "__main__":
    main()
