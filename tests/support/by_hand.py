"""Talking to a live shard of a small checkpoint without a router."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experts.protocol.membership import ShardEndpoint
from experts.protocol.wire import H_ROWS, H_SEQ, H_STATUS, HEADER_BYTES, STATUS_OK, header_of
from experts.transports.base import RouterLink
from experts.transports.connect import connect
from experts.transports.control import Hello
from tests.support.packed_request import HIDDEN, ROW_BYTES, pack
from tests.support.small_mesh import assert_matches, identity_of, one_process

NUM_LAYERS, NUM_EXPERTS, TOP_K = 2, 6, 3


def hello_with(model: Path, endpoint: ShardEndpoint, **changes: Any) -> Hello:
    fields = {
        **identity_of(model),
        "router_id": "by-hand",
        "transport": "shm",
        "incarnation": endpoint.incarnation,
        "dtype": "float32",
        "hidden_size": HIDDEN,
        "top_k": TOP_K,
        "num_layers": NUM_LAYERS,
        "max_rows": 100,
    }
    return Hello(**{**fields, **changes})


def open_link(model: Path, endpoint: ShardEndpoint, **changes: Any) -> RouterLink:
    return connect(endpoint, hello_with(model, endpoint, **changes), "cpu", 20.0, time.monotonic() + 30)


def ask(link: RouterLink, nbytes: int) -> np.ndarray:
    """The header of the reply."""
    link.post(nbytes)
    link.wait(time.monotonic() + 30)
    return header_of(link.recv_buffer)


def check_serves(link: RouterLink, model: Path, seq: int = 1000) -> None:
    """The next request is answered correctly."""
    x_D = torch.linspace(-1, 1, HIDDEN)
    header = ask(link, pack(link.send_buffer, seq, [0, 2], layer=1, x_D=x_D))
    assert (header[H_SEQ], header[H_STATUS], header[H_ROWS]) == (seq, STATUS_OK, 1)
    y_D = torch.from_numpy(link.recv_buffer[HEADER_BYTES : HEADER_BYTES + ROW_BYTES].view(np.float32))
    expected = one_process(model).forward(1, x_D[None], torch.ones(1, 2), torch.tensor([[0, 2]]))
    assert_matches(y_D[None], expected)
