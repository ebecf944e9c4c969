"""What every row mover promises, whatever carries the rows, against brute force in float64.

Triton's runs on CUDA, or in Triton's interpreter (TRITON_INTERPRET=1).

Legend: T tokens, K top-k, E logical experts, R ranks, D hidden size, M rows of one rank's message.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from experts.dispatch.layer_shape import LayerShape
from experts.dispatch.loopback import LoopbackLink
from experts.dispatch.rows.base import RowBatch, RowMover
from experts.dispatch.rows.host_mover import HostRowMover
from experts.dispatch.rows.native_mover import NativeFloat16Mover, NativeRowMover
from experts.dispatch.rows.pick import pick_row_mover
from experts.dispatch.rows.torch_mover import TorchRowMover
from experts.native.library import data_plane
from experts.protocol.membership import Membership
from experts.protocol.wire import H_LAYER, H_SEQ, HEADER_BYTES, header_of, request_layout
from placement.placement import Placement
from tests.support.routing_cases import Case, brute_messages, make_case

FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
NUM_LAYERS, LAYER, SEQ = 2, 1, 41
POISON = 0xA5
ON_TRITON = [pytest.mark.gpu, pytest.mark.triton]
NEEDS_COMPILER = pytest.mark.skipif(data_plane() is None, reason="no C++ compiler")
# mover, dtype, where rows travel
FORMS = [
    *[("host", dtype, "messages") for dtype in (FLOAT32, BFLOAT16)],
    *[pytest.param(("native", dtype, "messages"), marks=NEEDS_COMPILER) for dtype in (FLOAT32, BFLOAT16)],
    pytest.param(("native float16", FLOAT16, "messages"), marks=NEEDS_COMPILER),
    *[("torch", FLOAT16, "messages"), *[("torch", dtype, "tensors") for dtype in (FLOAT32, BFLOAT16, FLOAT16)]],
    *[pytest.param(("triton", dtype, "tensors"), marks=ON_TRITON) for dtype in (FLOAT32, BFLOAT16, FLOAT16)],
]
SIZES = [(0, 2, 4, 2, 1), (1, 4, 8, 3, 1), (11, 4, 9, 3, 1)]


@dataclass
class Bench:
    """A mover, its links, and what is computed by them."""

    shape: LayerShape
    case: Case
    links: dict[int, LoopbackLink]
    mover: RowMover
    device: torch.device
    x_TD: torch.Tensor
    batch: RowBatch

    def sent(self, rank: int, num_rows: int, num_pairs: int) -> torch.Tensor:
        """The rows [M, D] that travel to a rank."""
        link, row_bytes = self.links[rank], self.shape.row_bytes
        rows_at = request_layout(num_rows, num_pairs, row_bytes)[3]
        data = link.send_tensor
        if data is None:
            data = torch.from_numpy(link.send_buffer[rows_at:])
        return data[: num_rows * row_bytes].cpu().view(self.shape.dtype).view(num_rows, self.shape.hidden_size)

    def reply(self, rank: int, rows_MD: torch.Tensor) -> None:
        """Put a rank's answer where it would arrive."""
        data = rows_MD.view(torch.uint8).flatten()
        link = self.links[rank]
        if link.recv_tensor is None:
            link.recv_buffer[HEADER_BYTES : HEADER_BYTES + len(data)] = data.numpy()
        else:
            link.recv_tensor[: len(data)] = data.to(self.device)


def make_bench(
    request: pytest.FixtureRequest, form: tuple[str, torch.dtype, str], sizes: tuple[int, ...], hidden_size: int
) -> Bench:
    kind, dtype, travels = form
    device = request.getfixturevalue("triton_device") if kind == "triton" else torch.device("cpu")
    T, K, E, R, N = sizes
    shape = LayerShape(NUM_LAYERS, E, K, hidden_size, dtype)
    case = make_case(sizes, replicas=True, seed=hidden_size)
    links = {rank: LoopbackLink(rank, shape, T + 1) for rank in range(R)}
    for link in links.values():
        link.send_buffer[:] = POISON
        if travels == "tensors":
            nbytes = (T + 1) * shape.row_bytes
            link.send_tensor, link.recv_tensor = (
                torch.full((nbytes,), POISON, dtype=torch.uint8, device=device) for _ in range(2)
            )
    arguments = (shape, T + 1, Membership(7, Placement.linear(NUM_LAYERS, E, R, N), (None,) * R), links)
    if kind == "triton":
        from experts.dispatch.rows.triton_mover import TritonRowMover

        mover: RowMover = TritonRowMover(*arguments)
    else:
        kinds = {
            "host": HostRowMover, "native": NativeRowMover,
            "native float16": NativeFloat16Mover, "torch": TorchRowMover,
        }  # fmt: skip
        mover = kinds[kind](*arguments)
        picked = type(pick_row_mover(*arguments))
        assert picked is type(mover) or (travels == "messages" and issubclass(picked, NativeRowMover))
    x_TD = torch.randn(T, hidden_size, generator=torch.Generator().manual_seed(hidden_size)).to(dtype)
    on_device = (
        tensor.to(device) for tensor in (x_TD, torch.from_numpy(case.weights_TK), torch.from_numpy(case.ids_TK))
    )
    return Bench(shape, case, links, mover, device, x_TD, mover.stage(LAYER, *on_device))


def tolerance(dtype: torch.dtype, roundings: int = 1) -> dict[str, float]:
    """A sum of at most a dozen numbers of unit size, in float32, and then so many roundings."""
    return {
        "rtol": 2 * roundings * torch.finfo(dtype).eps,
        "atol": 1e-5 + (roundings - 1) * 10 * torch.finfo(dtype).eps,
    }


@pytest.mark.parametrize("hidden_size", [1, 24, 1100])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_rows_travel_out_and_back(request, form, sizes, hidden_size):
    bench = make_bench(request, form, sizes, hidden_size)
    batch, mover, dtype = bench.batch, bench.mover, bench.shape.dtype
    R = sizes[3]
    plan = mover.plan_and_pack(batch, SEQ, bench.case.slots_ER)
    row_TK, messages, unserved = brute_messages(bench.case, plan.rank_TK)
    np.testing.assert_array_equal(plan.row_TK, row_TK)
    assert plan.unserved == unserved
    for rank, message in enumerate(messages):
        rows, pairs = len(message["tokens"]), len(message["experts"])
        assert (plan.rows_R[rank], plan.pairs_R[rank]) == (rows, pairs)
        assert (plan.nbytes_R[rank] > 0) == (rows > 0)
        if rows:
            header = header_of(bench.links[rank].send_buffer)
            assert (header[H_LAYER], header[H_SEQ]) == (LAYER, SEQ)
            assert torch.equal(bench.sent(rank, rows, pairs), bench.x_TD[message["tokens"]])

    parts = {rank: torch.randn(sizes[0], hidden_size).to(dtype) for rank in range(R)}
    expected_TD = torch.zeros(batch.y_TD.shape, dtype=torch.float64)
    for rank, message in enumerate(messages):
        bench.reply(rank, parts[rank][: len(message["tokens"])])
        for row, token in enumerate(message["tokens"]):
            expected_TD[token] += parts[rank][row].double()
    batch.y_TD.fill_(float("nan"))
    mover.combine(batch, plan, np.ones(R, np.bool_))
    torch.testing.assert_close(batch.y_TD.cpu().double(), expected_TD, **tolerance(dtype))


@pytest.mark.parametrize("sizes", SIZES[1:], ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_silent_rank_is_repeated_and_other_rows_are_added(request, form, sizes):
    """Rank 0 never answers. Its pairs go to the ranks that are left, and what none of them has is added."""
    bench = make_bench(request, form, sizes, 24)
    batch, mover, dtype, slots_ER = bench.batch, bench.mover, bench.shape.dtype, bench.case.slots_ER
    slots_ER[:, 0] = np.where(np.arange(len(slots_ER)) % 2, slots_ER[:, 0], 3)  # so that it has something to fail at
    R = sizes[3]
    answered_R = np.arange(R) > 0
    expected_TD = torch.zeros(batch.y_TD.shape, dtype=torch.float64)
    wanted_TK = bench.case.ids_TK >= 0
    batch.y_TD.fill_(float("nan"))
    seen = 0
    for attempt in range(2):
        plan = mover.plan_and_pack(batch, SEQ + attempt, slots_ER)
        assert plan.unserved == (wanted_TK & (plan.rank_TK < 0)).sum()
        _, messages, _ = brute_messages(bench.case, plan.rank_TK)
        for rank in range(1, R):
            tokens = messages[rank]["tokens"]
            part_MD = torch.randn(len(tokens), 24).to(dtype)
            bench.reply(rank, part_MD)
            expected_TD[tokens] += part_MD.double()
        seen += int(plan.pairs_R[1:].sum())
        mover.combine(batch, plan, answered_R)
        unserved_M = np.flatnonzero((wanted_TK & (plan.rank_TK < 0)).any(1))
        if plan.unserved:
            extra_MD = torch.randn(len(unserved_M), 24).to(dtype)
            expected_TD[unserved_M] += extra_MD.double()
            mover.add(batch, torch.from_numpy(unserved_M).to(bench.device), extra_MD.to(bench.device))
            seen += plan.unserved
        # In host memory each attempt and each addition is rounded.
        torch.testing.assert_close(batch.y_TD.cpu().double(), expected_TD, **tolerance(dtype, 2 * attempt + 2))
        if attempt == 0:
            assert plan.pairs_R[0] > 0
            wanted_TK = plan.rank_TK == 0
            batch.narrow(wanted_TK)
            slots_ER[:, 0] = -1
    assert seen == (bench.case.ids_TK >= 0).sum()


def test_partial_sums_of_tensors_are_rounded_once() -> None:
    """256 + 1 + 1 in bfloat16, the parts in three attempts: 258, where two roundings would leave 256."""
    shape = LayerShape(1, 1, 1, 8, BFLOAT16)
    link = LoopbackLink(0, shape, 1)
    link.send_tensor, link.recv_tensor = (torch.zeros(shape.row_bytes, dtype=torch.uint8) for _ in range(2))
    mover = pick_row_mover(shape, 1, Membership(1, Placement.linear(1, 1, 1), (None,)), {0: link})
    batch = mover.stage(0, torch.zeros(1, 8, dtype=BFLOAT16), torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32))
    for value in (256, 1, 1):
        plan = mover.plan_and_pack(batch, 1, np.zeros((1, 1), np.int32))
        link.recv_tensor.view(BFLOAT16).fill_(value)
        mover.combine(batch, plan, np.ones(1, np.bool_))
        batch.narrow(np.ones((1, 1), np.bool_))
    assert batch.y_TD.tolist() == [[258.0] * 8]


@pytest.mark.parametrize("num_tokens", [0, 1, 13])
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("form", [FORMS[0], FORMS[2], FORMS[5], FORMS[-3]], ids=str)
def test_routing_reaches_the_host(request, form, num_tokens, ids_dtype):
    bench = make_bench(request, form, (num_tokens, 4, 9, 2, 1), 8)
    for seed in range(2):  # the second reuses the first one's memory
        generator = torch.Generator().manual_seed(seed)
        ids_TK = torch.randint(-1, 99, (num_tokens, 4), generator=generator).to(ids_dtype)
        weights_TK = torch.rand(num_tokens, 4, generator=generator).to(torch.bfloat16)
        on_device = (tensor.to(bench.device) for tensor in (bench.x_TD, weights_TK, ids_TK))
        batch = bench.mover.stage(0, *on_device)
        np.testing.assert_array_equal(batch.topk_ids_TK, ids_TK.int().numpy())
        np.testing.assert_array_equal(batch.topk_weights_TK, weights_TK.float().numpy())
        assert (batch.topk_ids_TK.dtype, batch.topk_weights_TK.dtype) == (np.int32, np.float32)


@pytest.mark.gpu
@pytest.mark.triton
def test_unaligned_rows_are_refused(triton_device):
    from experts.dispatch.rows.triton_mover import TritonRowMover

    shape = LayerShape(1, 1, 1, 8, FLOAT32)
    link = LoopbackLink(0, shape, 2)
    link.send_tensor, link.recv_tensor = (
        torch.zeros(66, dtype=torch.uint8, device=triton_device)[2:] for _ in range(2)
    )
    with pytest.raises(ValueError, match="expected a multiple of 16"):
        TritonRowMover(shape, 2, Membership(1, Placement.linear(1, 1, 1), (None,)), {0: link})
