"""The Triton programs that plan a dispatch, against brute force.

On CUDA, or in Triton's interpreter (TRITON_INTERPRET=1).

Outputs are poisoned first, inputs are new in every case. Legend: T tokens, K top-k, E experts, R ranks.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from placement.rule.replica_choice import choose_replicas
from tests.support.routing_cases import brute_messages, make_case

pytestmark = [pytest.mark.gpu, pytest.mark.triton]
POISON = -77
# tokens, top-k, experts, ranks, nodes
CASES = [(0, 2, 4, 2, 1), (1, 1, 3, 1, 1), (1, 4, 8, 3, 1), (9, 3, 7, 3, 1), (23, 8, 32, 8, 1), (40, 6, 16, 5, 1)]
NODES = [(1, 4, 9, 4, 2), (17, 6, 20, 8, 2), (30, 8, 24, 9, 3)]
LARGE = [(48, 8, 16, 2, 1)]  # so many pairs a rank that evening them may cost visits


def power_of_2(value: int) -> int:
    """The next one, at least 1."""
    return 1 << max(value - 1, 0).bit_length()


def poisoned(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """int32."""
    return torch.full(shape, POISON, dtype=torch.int32, device=device)


@pytest.mark.parametrize("replicas", [False, True], ids=["single", "replicas"])
@pytest.mark.parametrize("sizes", CASES + NODES + LARGE, ids=str)
def test_choose_ranks_is_the_planners_rule(triton_device, sizes, replicas):
    from experts.dispatch.captured import triton_plan as programs

    case = make_case(sizes, replicas, seed=sum(sizes))
    T, K, E, R, N = sizes
    load_R = np.random.default_rng(1).integers(0, 30, R)
    work_R = np.random.default_rng(2).integers(1, 5, R) if N > 1 or K % 2 else np.ones(R, np.int64)
    expected_TK, expected_load_R = np.full((T, K), POISON, np.int32), load_R >> 1
    choose_replicas(case.ids_TK, case.slots_ER, case.node_of_rank_R, N, work_R, expected_load_R, expected_TK)
    device_load_R = torch.from_numpy(load_R).to(triton_device)
    rank_TK = poisoned((T, K), triton_device)
    on = [torch.from_numpy(a).to(triton_device) for a in (case.ids_TK, case.slots_ER, case.node_of_rank_R, work_R)]
    programs.choose_ranks[(1,)](
        *on, device_load_R, rank_TK, T, E, R,
        NUM_NODES=N, K=K, BLOCK_K=power_of_2(K), BLOCK_R=power_of_2(R), BLOCK_N=power_of_2(N),
    )  # fmt: skip
    np.testing.assert_array_equal(rank_TK.cpu().numpy(), expected_TK)
    np.testing.assert_array_equal(device_load_R.cpu().numpy(), expected_load_R)


@pytest.mark.parametrize("has_ranks", [False, True], ids=["home", "ranks"])
@pytest.mark.parametrize("sizes", CASES, ids=str)
def test_place_pairs(triton_device, sizes, has_ranks):
    from experts.dispatch.captured import triton_plan as programs

    T, K, E, R, _ = sizes
    case = make_case(sizes, replicas=has_ranks, seed=7 + sum(sizes))
    rank_TK = np.full((T, K), POISON, np.int32)
    choose_replicas(
        case.ids_TK, case.slots_ER, case.node_of_rank_R, 1, np.ones(R, np.int64), np.zeros(R, np.int64), rank_TK
    )
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
