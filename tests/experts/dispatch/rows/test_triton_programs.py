"""The Triton programs of dispatch against brute force: on CUDA, or in Triton's interpreter (TRITON_INTERPRET=1).

Outputs are poisoned first, inputs are new in every case. Legend: T tokens, K top-k, E experts, R ranks, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from placement.rule.replica_choice import choose_replicas

pytestmark = [pytest.mark.gpu, pytest.mark.triton]
POISON = -77
# tokens, top-k, experts, ranks, nodes
CASES = [(0, 2, 4, 2, 1), (1, 1, 3, 1, 1), (1, 4, 8, 3, 1), (9, 3, 7, 3, 1), (23, 8, 32, 8, 1), (40, 6, 16, 5, 1)]
NODES = [(1, 4, 9, 4, 2), (17, 6, 20, 8, 2), (30, 8, 24, 9, 3)]


@dataclass
class Case:
    """One step's routing and placement."""

    ids_TK: np.ndarray
    weights_TK: np.ndarray
    slots_ER: np.ndarray
    node_of_rank_R: np.ndarray
    num_nodes: int


def make_case(sizes: tuple[int, int, int, int, int], replicas: bool, seed: int) -> Case:
    """Random routing with padding, repeats and ids that are no expert; some experts stand nowhere."""
    T, K, E, R, N = sizes
    rng = np.random.default_rng(seed)
    ids_TK = rng.integers(0, E, (T, K)).astype(np.int32)
    ids_TK[rng.random((T, K)) < 0.1] = -1
    ids_TK[rng.random((T, K)) < 0.05] = E + 3
    slots_ER = np.full((E, R), -1, np.int32)
    for expert in range(E):
        count = min(R, int(rng.integers(0, 4))) if replicas else int(rng.random() < 0.9)
        slots_ER[expert, rng.permutation(R)[:count]] = rng.integers(0, 5, count)
    return Case(ids_TK, rng.random((T, K), np.float32), slots_ER, (np.arange(R) * N // R).astype(np.int32), N)


def power_of_2(value: int) -> int:
    """The next one, at least 1."""
    return 1 << max(value - 1, 0).bit_length()


def poisoned(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """int32."""
    return torch.full(shape, POISON, dtype=torch.int32, device=device)


@pytest.mark.parametrize("replicas", [False, True], ids=["single", "replicas"])
@pytest.mark.parametrize("sizes", CASES + NODES, ids=str)
def test_choose_ranks_is_the_planners_rule(triton_device, sizes, replicas):
    from experts.dispatch.rows import triton_programs as programs

    case = make_case(sizes, replicas, seed=sum(sizes))
    T, K, E, R, N = sizes
    load_R = np.random.default_rng(1).integers(0, 30, R)
    expected_TK, expected_load_R = np.full((T, K), POISON, np.int32), load_R >> 1
    choose_replicas(case.ids_TK, case.slots_ER, case.node_of_rank_R, N, expected_load_R, expected_TK)
    device_load_R = torch.from_numpy(load_R).to(triton_device)
    rank_TK = poisoned((T, K), triton_device)
    on = [torch.from_numpy(a).to(triton_device) for a in (case.ids_TK, case.slots_ER, case.node_of_rank_R)]
    programs.choose_ranks[(1,)](
        *on, device_load_R, rank_TK, T, E, R,
        NUM_NODES=N, K=K, BLOCK_K=power_of_2(K), BLOCK_R=power_of_2(R), BLOCK_N=power_of_2(N),
    )  # fmt: skip
    np.testing.assert_array_equal(rank_TK.cpu().numpy(), expected_TK)
    np.testing.assert_array_equal(device_load_R.cpu().numpy(), expected_load_R)


def brute_messages(case: Case, rank_TK: np.ndarray) -> tuple[np.ndarray, list[dict[str, list]], int]:
    """(row_TK, each rank's lists, unserved), token by token."""
    T, K = rank_TK.shape
    row_TK = np.full((T, K), -1, np.int32)
    messages = [{"offsets": [0], "experts": [], "weights": [], "tokens": []} for _ in range(case.slots_ER.shape[1])]
    for token in range(T):
        for rank, message in enumerate(messages):
            mine = np.flatnonzero(rank_TK[token] == rank)
            if mine.size:
                row_TK[token, mine[0]] = len(message["tokens"])
                message["tokens"].append(token)
                message["experts"] += case.ids_TK[token, mine].tolist()
                message["weights"] += case.weights_TK[token, mine].tolist()
                message["offsets"].append(len(message["experts"]))
    return row_TK, messages, int(((rank_TK < 0) & (case.ids_TK >= 0)).sum())


@pytest.mark.parametrize("has_ranks", [False, True], ids=["home", "ranks"])
@pytest.mark.parametrize("sizes", CASES, ids=str)
def test_place_pairs(triton_device, sizes, has_ranks):
    from experts.dispatch.rows import triton_programs as programs

    T, K, E, R, _ = sizes
    case = make_case(sizes, replicas=has_ranks, seed=7 + sum(sizes))
    rank_TK = np.full((T, K), POISON, np.int32)
    choose_replicas(case.ids_TK, case.slots_ER, case.node_of_rank_R, 1, np.zeros(R, np.int64), rank_TK)
    row_TK, messages, unserved = brute_messages(case, rank_TK)
    home_E = np.where((case.slots_ER >= 0).any(1), (case.slots_ER >= 0).argmax(1), -1).astype(np.int32)
    offsets_at, experts_at, weights_at = 4, 4 + T + 1, 4 + T + 1 + T * K
    words = 4 + T + 1 + 2 * T * K
    got_rank_TK = torch.from_numpy(rank_TK).to(triton_device) if has_ranks else poisoned((T, K), triton_device)
    got_row_TK, got_messages = poisoned((T, K), triton_device), poisoned((R, words), triton_device)
    counter = torch.full((1,), 5, dtype=torch.int32, device=triton_device)
    on = [torch.from_numpy(a).to(triton_device) for a in (case.ids_TK, case.weights_TK, home_E)]
    programs.place_pairs[(R,)](
        *on, got_rank_TK, got_row_TK, got_messages, counter,
        T, E, words, offsets_at, experts_at, weights_at,
        HAS_RANKS=has_ranks, K=K, BLOCK_T=8, BLOCK_K=power_of_2(K),
    )  # fmt: skip
    np.testing.assert_array_equal(got_rank_TK.cpu().numpy(), rank_TK)
    np.testing.assert_array_equal(got_row_TK.cpu().numpy(), row_TK)
    assert counter.item() == 5 + unserved
    for message, got in zip(messages, got_messages.cpu(), strict=True):
        rows, pairs = len(message["tokens"]), len(message["experts"])
        assert got[:2].tolist() == [rows, pairs]
        assert got[offsets_at : offsets_at + rows + 1].tolist() == message["offsets"]
        assert got[experts_at : experts_at + pairs].tolist() == message["experts"]
        assert got[weights_at : weights_at + pairs].view(torch.float32).tolist() == message["weights"]
        assert got[2:4].tolist() == [POISON] * 2  # padding stays as it was
        assert (got[offsets_at + rows + 1 : experts_at] == POISON).all()
        assert (got[experts_at + pairs : weights_at] == POISON).all()
        assert (got[weights_at + pairs :] == POISON).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("hidden_size", [1, 24, 1100])
@pytest.mark.parametrize("sizes", [(0, 2, 4, 2, 1), (1, 4, 8, 3, 1), (11, 4, 9, 3, 1)], ids=str)
def test_rows_travel_out_and_back(triton_device, sizes, hidden_size, dtype):
    """Through `TritonRowMover`: packed rows are copies, and sums of partial rows are those of float64."""
    from experts.dispatch.rows.triton_mover import TritonRowMover

    (T, K, _, R, _), D = sizes, hidden_size
    case = make_case(sizes, replicas=True, seed=D)
    rank_TK = np.full((T, K), POISON, np.int32)
    choose_replicas(case.ids_TK, case.slots_ER, case.node_of_rank_R, 1, np.zeros(R, np.int64), rank_TK)
    row_TK, messages, _ = brute_messages(case, rank_TK)
    generator = torch.Generator().manual_seed(D)
    x_TD = torch.randn(T, D, generator=generator).to(dtype)
    row_bytes, room = D * dtype.itemsize, 64
    sent = {r: torch.full((T * row_bytes + room,), 0xA5, dtype=torch.uint8, device=triton_device) for r in range(R)}
    parts = {r: torch.randn(T, D, generator=generator).to(dtype) for r in range(R)}
    replies = {r: part.flatten().view(torch.uint8).to(triton_device) for r, part in parts.items()}
    mover = TritonRowMover(triton_device)
    mover.bind(sent, replies)
    mover.pack(x_TD.to(triton_device), rank_TK, row_TK)
    for rank, message in enumerate(messages):
        end = len(message["tokens"]) * row_bytes
        assert sent[rank][:end].cpu().view(dtype).view(-1, D).equal(x_TD[message["tokens"]])
        assert (sent[rank][end:] == 0xA5).all()

    def expected(ranks: list[int]) -> torch.Tensor:
        y_TD = torch.zeros(T, D, dtype=torch.float64)
        for rank in ranks:
            for row, token in enumerate(messages[rank]["tokens"]):
                y_TD[token] += parts[rank][row].double()
        return y_TD

    # A row is the sum of at most K numbers of unit size in float32, rounded once.
    loose = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-5}
    y_TD = torch.full((T, D), float("nan"), dtype=dtype, device=triton_device)
    mover.combine(rank_TK, row_TK, np.ones(R, np.bool_), y_TD, None, False)
    torch.testing.assert_close(y_TD.cpu().double(), expected(list(range(R))), **loose)
    # Rank 0 is silent; what the others sent is kept, and its rows are added later.
    sum_TD = torch.full((T, D), float("nan"), device=triton_device)
    answered_R = np.arange(R) > 0
    mover.combine(rank_TK, row_TK, answered_R, y_TD, sum_TD, False)
    torch.testing.assert_close(y_TD.cpu().double(), expected(list(range(1, R))), **loose)
    mover.combine(rank_TK, row_TK, ~answered_R, y_TD, sum_TD, True)
    torch.testing.assert_close(sum_TD.cpu().double(), expected(list(range(R))), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y_TD.cpu().double(), expected(list(range(R))), **loose)


@pytest.mark.parametrize("num_tokens", [0, 1, 13])
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
def test_routing_reaches_the_host(triton_device, num_tokens, ids_dtype):
    from experts.dispatch.rows.triton_mover import TritonRowMover

    mover = TritonRowMover(triton_device)
    for seed in range(2):  # the second reuses the first one's memory
        generator = torch.Generator().manual_seed(seed)
        ids_TK = torch.randint(-1, 99, (num_tokens, 4), generator=generator).to(ids_dtype)
        weights_TK = torch.rand(num_tokens, 4, generator=generator).to(torch.bfloat16)
        got_ids_TK, got_weights_TK = mover.routing(ids_TK.to(triton_device), weights_TK.to(triton_device))
        np.testing.assert_array_equal(got_ids_TK, ids_TK.int().numpy())
        np.testing.assert_array_equal(got_weights_TK, weights_TK.float().numpy())


def test_unaligned_rows_are_refused(triton_device):
    from experts.dispatch.rows.triton_mover import TritonRowMover

    tensor = torch.zeros(64, dtype=torch.uint8, device=triton_device)[2:]
    with pytest.raises(ValueError, match="expected a multiple of 16"):
        TritonRowMover(triton_device).bind({0: tensor}, {})
