"""Compile what is compiled on first use, so that the first start is as quick as the next: `-m experts.precompile`.

Numba's results and the C++ kernel are kept in the user's cache (`placement.compiled`), each in a folder named after its
sources.
"""

from __future__ import annotations

import time

import numpy as np
import torch

from experts.dispatch.layer_shape import LayerShape
from experts.dispatch.loopback import LoopbackLink, loopback_dispatcher
from experts.kernels.native.library import load_library
from experts.native.build import NativeBuildError
from experts.protocol.wire import (
    DTYPE_CODES,
    H_PAIRS,
    H_ROWS,
    header_of,
    request_layout,
)
from experts.shard.request import read_request
from experts.transports import shm
from experts.transports.weights import ring


def main() -> None:
    """Run every compiled function once on small inputs."""
    start_s = time.monotonic()
    for dtype in (torch.float32, torch.bfloat16):
        shape = LayerShape(num_layers=1, num_experts=4, top_k=2, hidden_size=8, dtype=dtype)
        dispatcher = loopback_dispatcher(shape, 2, 4)
        ids_TK = torch.tensor([[0, 3], [1, 2]], dtype=torch.int32)
        dispatcher.forward(0, torch.zeros(2, 8, dtype=dtype), torch.ones(2, 2), ids_TK)
        link = dispatcher.links[0]
        assert isinstance(link, LoopbackLink)
        slot_of_expert_LE = np.array([[0, 1, -1, -1]], np.int32)
        nbytes = request_layout(
            *(int(header_of(link.send_buffer)[word]) for word in (H_ROWS, H_PAIRS)), shape.row_bytes
        )[4]
        read_request(link.send_buffer, nbytes, slot_of_expert_LE, DTYPE_CODES[dtype], 8)
    shm.warm_up()
    ring.warm_up()
    try:
        load_library()
    except NativeBuildError as error:
        print(f"    the C++ expert kernel is left out: {error}")
    print(f"    done in {time.monotonic() - start_s:.0f} s")


if __name__ == "__main__":
    main()
