"""Random routing over random slots, and each rank's message by brute force.

Legend: T tokens, K top-k, E logical experts, R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class Case:
    """One step's routing and placement."""

    ids_TK: np.ndarray
    weights_TK: np.ndarray
    slots_ER: np.ndarray
    node_of_rank_R: np.ndarray
    num_nodes: int


def make_case(sizes: tuple[int, ...], replicas: bool, seed: int) -> Case:
    """Tokens, top-k, experts, ranks, nodes. With padding, repeats and ids that are no expert; some stand nowhere."""
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
