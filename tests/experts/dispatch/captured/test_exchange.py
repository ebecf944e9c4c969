"""Steps of fixed capacity with shards in processes of their own: eager, captured, and with a shard that is silent.

Over NCCL on GPUs (never run by its authors: none was at hand), or over gloo with the programs in Triton's interpreter.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.fixed_steps import SHAPE, definition, placement, routing
from tests.support.gpu_mesh import NCCL, places

pytestmark = pytest.mark.triton
R = 3


@pytest.fixture(params=[NCCL, "gloo_split"])
def kind(request: pytest.FixtureRequest, triton_device: torch.device) -> str:
    if (request.param == "nccl") != (triton_device.type == "cuda"):
        pytest.skip(f"rows travel over {request.param}, Triton's programs run on {triton_device} here")
    return request.param


def make_dispatch(num_tokens: int, device: str, replicas: bool) -> Any:
    from experts.dispatch.captured.fixed_dispatch import FixedDispatch

    dispatch = FixedDispatch(SHAPE, num_tokens, R, 1, replicas, torch.device(device))
    dispatch.set_placement(placement(R, replicas, seed=0), np.ones(R))
    return dispatch


def check(y_TD: torch.Tensor, fresh: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    torch.testing.assert_close(y_TD.cpu().double(), definition(*fresh), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("replicas", [False, True], ids=["single", "replicas"])
@pytest.mark.parametrize("num_tokens", [1, 16])
def test_steps(kind: str, tmp_path: Path, num_tokens: int, replicas: bool) -> None:
    from experts.dispatch.captured.exchange import exchange
    from tests.support.exchange_peers import peers

    device, devices = places(kind, R)
    dispatch = make_dispatch(num_tokens, device, replicas)
    with peers(kind, tmp_path, device, devices, dispatch.layout, SHAPE.dtype) as groups:
        for step in range(4):
            dispatch.set_placement(placement(R, replicas, seed=step), np.ones(R))
            fresh = routing(num_tokens, step, SHAPE.dtype)
            dispatch.pack(step % 2, *(t.to(device) for t in fresh))
            dispatch.recv_RTD.fill_(float("nan"))
            exchange(dispatch, groups, time.monotonic() + 30)
            y_TD = torch.full_like(fresh[0], float("nan"), device=device)
            dispatch.combine(y_TD)
            check(y_TD, fresh)
    assert dispatch.unserved.item() == 0
    with pytest.raises(ValueError, match="0 pairs for 3 ranks"):
        exchange(dispatch, [])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [NCCL], indirect=True)
def test_a_captured_exchange_is_replayed(kind: str, tmp_path: Path) -> None:
    """Pack, exchange and combine as one graph; other tokens and another epoch at each replay."""
    from experts.dispatch.captured.exchange import exchange
    from tests.support.exchange_peers import peers

    device, devices = places(kind, R)
    dispatch = make_dispatch(16, device, True)
    x_TD, weights_TK, ids_TK = (t.to(device) for t in routing(16, 0, SHAPE.dtype))
    y_TD = torch.empty_like(x_TD)

    def step(groups: list[Any]) -> None:
        dispatch.pack(0, x_TD, weights_TK, ids_TK)
        exchange(dispatch, groups)
        dispatch.combine(y_TD)

    with peers(kind, tmp_path, device, devices, dispatch.layout, SHAPE.dtype) as groups:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step(groups)  # compiles the programs
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads (the watchdogs of the groups) ask events meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            step(groups)
        for seed in range(1, 5):
            dispatch.set_placement(placement(R, True, seed), np.ones(R))
            fresh = routing(16, seed, SHAPE.dtype)
            for tensor, value in zip((x_TD, weights_TK, ids_TK), fresh, strict=True):
                tensor.copy_(value)
            y_TD.fill_(float("nan"))
            graph.replay()
            check(y_TD, fresh)


def test_a_silent_shard_costs_the_deadline_and_no_more(kind: str, tmp_path: Path) -> None:
    """gloo: TimeoutError. NCCL: the host goes on at once, and the stream does once the pair is broken."""
    from experts.dispatch.captured.exchange import exchange
    from tests.support.exchange_peers import peers

    device, devices = places(kind, R)
    dispatch = make_dispatch(4, device, False)
    dispatch.pack(0, *(t.to(device) for t in routing(4, 0, SHAPE.dtype)))
    with peers(kind, tmp_path, device, devices, dispatch.layout, SHAPE.dtype, silent=1) as groups:
        if kind == "nccl":
            exchange(dispatch, groups)
            groups[1].abort()
            torch.cuda.synchronize()
        else:
            with pytest.raises(TimeoutError, match="deadline"):
                exchange(dispatch, groups, time.monotonic() + 0.5)
