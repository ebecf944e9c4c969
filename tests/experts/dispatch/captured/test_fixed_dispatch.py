"""Dispatch of fixed capacity: against the definition in float64, step after step in the same memory, and captured.

On CUDA, or in Triton's interpreter (TRITON_INTERPRET=1) but for the graphs.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from placement.rule.replica_choice import choose_replicas
from tests.support.fixed_steps import SHAPE, definition, placement, routing

pytestmark = [pytest.mark.gpu, pytest.mark.triton]


def answer(dispatch) -> None:
    """Every shard's part, where expert e multiplies its input by e + 1; what no row fills is poisoned."""
    from experts.dispatch.captured.fixed_dispatch import read_message

    dispatch.recv_RTD.fill_(float("nan"))
    for rank in range(dispatch.num_ranks):
        message = read_message(dispatch.send_RB[rank], dispatch.layout, dispatch.shape.dtype)
        offsets = message.row_offsets_M1.tolist()
        scale_N = message.weights_N * (message.experts_N + 1)
        for row in range(len(message.rows_MD)):
            scale = scale_N[offsets[row] : offsets[row + 1]].sum().item()
            dispatch.recv_RTD[rank, row] = message.rows_MD[row] * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("replicas", [False, True], ids=["single", "replicas"])
@pytest.mark.parametrize(("num_tokens", "num_ranks", "num_nodes"), [(0, 2, 1), (1, 1, 1), (1, 3, 1), (19, 4, 2)])
def test_steps_in_the_same_memory(triton_device, num_tokens, num_ranks, num_nodes, replicas, dtype):
    from experts.dispatch.captured.fixed_dispatch import FixedDispatch

    shape = dataclasses.replace(SHAPE, dtype=dtype)
    dispatch = FixedDispatch(shape, num_tokens, num_ranks, num_nodes, replicas, triton_device)
    node_of_rank_R = (np.arange(num_ranks) * num_nodes // num_ranks).astype(np.int32)
    load_LR = np.zeros((shape.num_layers, num_ranks), np.int64)
    for step in range(3):
        slots_LER = placement(num_ranks, replicas, seed=step)
        work_R = np.arange(num_ranks) + 2 if step else np.ones(num_ranks, np.int64)
        dispatch.set_placement(slots_LER, work_R)
        for layer in range(shape.num_layers):
            x_TD, weights_TK, ids_TK = routing(num_tokens, 10 * step + layer, dtype)
            dispatch.send_RB.fill_(0xA5)
            dispatch.pack(layer, *(t.to(triton_device) for t in (x_TD, weights_TK, ids_TK)))
            answer(dispatch)
            y_TD = torch.full_like(x_TD, float("nan"), device=triton_device)
            dispatch.combine(y_TD)
            # At most K parts, each rounded to the dtype, and then their sum.
            eps = torch.finfo(dtype).eps
            expected_TD = definition(x_TD, weights_TK, ids_TK)
            torch.testing.assert_close(y_TD.cpu().double(), expected_TD, rtol=8 * eps, atol=1e3 * eps)
            load_LR[layer] >>= 1
            rank_TK = np.zeros(ids_TK.shape, np.int32)
            choose_replicas(
                ids_TK.numpy(), slots_LER[layer], node_of_rank_R, num_nodes, work_R, load_LR[layer], rank_TK
            )
            np.testing.assert_array_equal(dispatch._rank_TK.cpu().numpy(), rank_TK)
    assert dispatch.unserved.item() == 0


@pytest.mark.parametrize("replicas", [False, True], ids=["single", "replicas"])
def test_pairs_that_nobody_serves_are_counted(triton_device, replicas):
    from experts.dispatch.captured.fixed_dispatch import FixedDispatch

    dispatch = FixedDispatch(SHAPE, 9, 3, 1, replicas, triton_device)
    slots_LER = placement(3, replicas, seed=4)
    slots_LER[:, [2, 7]] = -1
    dispatch.set_placement(slots_LER, np.ones(3))
    x_TD, weights_TK, ids_TK = routing(9, 1, torch.float32)
    dispatch.pack(1, *(t.to(triton_device) for t in (x_TD, weights_TK, ids_TK)))
    gone_TK = (ids_TK == 2) | (ids_TK == 7)
    assert gone_TK.any()
    assert dispatch.unserved.item() == gone_TK.sum().item()
    answer(dispatch)
    y_TD = torch.empty_like(x_TD, device=triton_device)
    dispatch.combine(y_TD)
    served_TK = torch.where(gone_TK, -1, ids_TK)
    torch.testing.assert_close(y_TD.cpu().double(), definition(x_TD, weights_TK, served_TK), rtol=1e-5, atol=1e-4)


def test_what_does_not_fit_is_refused(triton_device):
    from experts.dispatch.captured.fixed_dispatch import FixedDispatch, MessageLayout, read_message

    dispatch = FixedDispatch(SHAPE, 4, 3, 1, False, triton_device)
    with pytest.raises(ValueError, match="has replicas"):
        dispatch.set_placement(np.zeros((2, 12, 3), np.int32), np.ones(3))
    with pytest.raises(ValueError, match="expected \\[2, 12, 3\\]"):
        dispatch.set_placement(np.zeros((2, 12, 4), np.int32), np.ones(3))
    with pytest.raises(ValueError, match="work is \\[4\\], expected \\[3\\]"):
        dispatch.set_placement(np.full((2, 12, 3), -1, np.int32), np.ones(4))
    x_TD, weights_TK, ids_TK = (t.to(triton_device) for t in routing(5, 1, torch.float32))
    with pytest.raises(ValueError, match="5 tokens, this dispatch was made for 4"):
        dispatch.pack(0, x_TD, weights_TK, ids_TK)
    with pytest.raises(ValueError, match="expected int32"):
        dispatch.pack(0, x_TD[:4], weights_TK[:4], ids_TK[:4].long())
    with pytest.raises(ValueError, match="expected contiguous"):
        dispatch.combine(x_TD)
    with pytest.raises(ValueError, match="no multiple of 16"):
        FixedDispatch(dataclasses.replace(SHAPE, hidden_size=3), 1, 2, 1, False, triton_device)
    layout = MessageLayout(4, 4, 160)
    with pytest.raises(ValueError, match="expected at most 4 rows"):
        read_message(torch.full((layout.nbytes,), 0x7F, dtype=torch.uint8), layout, torch.float32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device; graphs are captured there only")
@pytest.mark.parametrize("replicas", [False, True], ids=["single", "replicas"])
def test_a_captured_step_is_replayed_with_other_tokens_and_another_epoch(triton_device, replicas):
    """The exchange is a copy on the device here: message rows come back as they are, so y = fan-out * x."""
    from experts.dispatch.captured.fixed_dispatch import FixedDispatch

    T, R = 16, 4
    dispatch = FixedDispatch(SHAPE, T, R, 1, replicas, triton_device)
    dispatch.set_placement(placement(R, replicas, seed=0), np.ones(R))
    x_TD, weights_TK, ids_TK = (t.to(triton_device) for t in routing(T, 0, SHAPE.dtype))
    y_TD = torch.empty_like(x_TD)
    layout = dispatch.layout

    def step() -> None:
        dispatch.pack(0, x_TD, weights_TK, ids_TK)
        rows = dispatch.send_RB[:, layout.rows_at : layout.rows_at + layout.reply_bytes]
        dispatch.recv_RTD.view(torch.uint8).view(R, -1).copy_(rows)
        dispatch.combine(y_TD)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles the programs
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for seed in range(1, 5):
        slots_LER = placement(R, replicas, seed)
        dispatch.set_placement(slots_LER, np.ones(R))
        fresh = routing(T, seed, SHAPE.dtype)
        for tensor, value in zip((x_TD, weights_TK, ids_TK), fresh, strict=True):
            tensor.copy_(value)
        y_TD.fill_(float("nan"))
        graph.replay()
        ranks_TK = dispatch._rank_TK.cpu()
        fan_out = [len(set(ranks[ranks >= 0].tolist())) for ranks in ranks_TK]
        torch.testing.assert_close(y_TD.cpu(), fresh[0] * torch.tensor(fan_out)[:, None])
