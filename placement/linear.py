"""The plainest placement: blocks of experts in order, and where their other replicas stand.

R ranks.
"""

from __future__ import annotations

import numpy as np

EMPTY = -1  # an empty slot


def linear_row(num_experts: int, num_ranks: int, num_nodes: int, min_replicas: int) -> list[int]:
    """The experts in the slots of one layer, rank by rank, as `Placement.linear` describes."""
    check_replicas_fit(min_replicas, num_ranks, num_nodes)
    if num_ranks % num_nodes:
        raise ValueError(f"{num_ranks} ranks cannot be dealt evenly to {num_nodes} nodes")
    blocks = np.array_split(np.arange(num_experts), num_ranks)
    held: list[list[int]] = [block.tolist() for block in blocks]
    per_node = num_ranks // num_nodes
    for rank, block in enumerate(blocks):
        node, local = divmod(rank, per_node)
        for index, expert in enumerate(block.tolist()):
            for copy in range(min_replicas - 1):
                # Rotations of the ranks: each gives every rank as many replicas as it gives away.
                turn = index * (min_replicas - 1) + copy
                if num_nodes > 1:
                    other_node = (node + 1 + turn % (num_nodes - 1)) % num_nodes
                    target = other_node * per_node + (local + turn // (num_nodes - 1)) % per_node
                else:
                    target = (rank + 1 + turn % (num_ranks - 1)) % num_ranks
                held[target].append(expert)
    slots_per_rank = max(len(experts) for experts in held)
    return [expert for experts in held for expert in experts + [EMPTY] * (slots_per_rank - len(experts))]


def check_replicas_fit(min_replicas: int, num_ranks: int, num_nodes: int) -> None:
    """Raise ValueError unless there are enough ranks, and nodes if there are several, for `min_replicas` replicas."""
    if min_replicas > num_ranks:
        raise ValueError(f"{min_replicas} replicas on different ranks need {min_replicas} ranks, there are {num_ranks}")
    if num_nodes > 1 and min_replicas > num_nodes:
        raise ValueError(f"{min_replicas} replicas on different nodes need {min_replicas} nodes, there are {num_nodes}")
