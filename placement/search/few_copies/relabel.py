"""A target whose ranks are interchangeable, its ranks named so that most experts stay where they are.

L layers, E experts, R ranks, s slots of a rank, G ranks of a group.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace

import numpy as np

from placement.placement import Placement, check_same_model


def relabel(held: Placement, target: Placement, kinds_R: Sequence[Hashable] | None = None) -> Placement:
    """The target with the rows of like ranks exchanged, in each layer apart, for the fewest copies from `held`.

    Ranks are alike that share a node and a kind (their number of slots, their speed; None: all are of one kind), and
    that the target uses at all. Loads, fan-out and node fan-out of the layers stay what they are. Raises ValueError if
    the two are of different models.
    """
    from scipy.optimize import linear_sum_assignment  # a second of import, for fresh plans alone

    check_same_model("what is held", held, "the target", target)
    if kinds_R is not None and len(kinds_R) != target.num_ranks:
        raise ValueError(f"kinds_R names {len(kinds_R)} ranks, the target has {target.num_ranks}")
    map_LRs = target.physical_to_logical_map.reshape(target.num_layers, target.num_ranks, -1)
    kinds = [None] * target.num_ranks if kinds_R is None else kinds_R
    used = np.flatnonzero((map_LRs >= 0).any((0, 2)))
    groups = _alike(used, list(zip(target.node_of_rank_R.tolist(), kinds, strict=True)))
    on_LRE = [np.zeros((target.num_layers, each.num_ranks, target.num_experts), np.float32) for each in (held, target)]
    for on, placement in zip(on_LRE, (held, target), strict=True):
        on[:] = (placement.slots_LER >= 0).transpose(0, 2, 1)
    new_LRs = map_LRs.copy()
    for ranks in groups:
        there = [rank for rank in ranks if rank < held.num_ranks]
        if not there:
            continue
        stays_LGG = np.zeros((target.num_layers, len(ranks), len(ranks)), np.float32)
        stays_LGG[:, : len(there)] = on_LRE[0][:, there] @ on_LRE[1][:, ranks].transpose(0, 2, 1)
        # Of equal assignments the one that leaves names alone.
        stays_LGG += np.eye(len(ranks), dtype=np.float32) / (2 * len(ranks))
        for layer, stays_GG in enumerate(stays_LGG):
            _, taken_G = linear_sum_assignment(stays_GG, maximize=True)
            new_LRs[layer, ranks] = map_LRs[layer, np.array(ranks)[taken_G]]
    return replace(target, physical_to_logical_map=new_LRs.reshape(target.num_layers, -1))


def relabel_rows(home_ER: np.ndarray, slots_Rs: np.ndarray, kinds_R: Sequence[Hashable]) -> np.ndarray:
    """One layer's slots [R, s] with the rows of ranks of a kind exchanged, for the fewest copies.

    `home_ER` bool: who holds what now. Ranks of a kind share a node, their slots and their speed.
    """
    from scipy.optimize import linear_sum_assignment

    new_Rs = slots_Rs.copy()
    on_ER = np.zeros(home_ER.shape, np.float32)
    rank_N, slot_N = np.nonzero(slots_Rs >= 0)
    on_ER[slots_Rs[rank_N, slot_N], rank_N] = 1
    for ranks in _alike(range(len(slots_Rs)), kinds_R):
        stays_GG = home_ER[:, ranks].T.astype(np.float32) @ on_ER[:, ranks]
        stays_GG += np.eye(len(ranks), dtype=np.float32) / (2 * len(ranks))
        _, taken_G = linear_sum_assignment(stays_GG, maximize=True)
        new_Rs[ranks] = slots_Rs[np.array(ranks)[taken_G]]
    return new_Rs


def _alike(ranks: Iterable[int], kinds_R: Sequence[Hashable]) -> list[list[int]]:
    """Ranks of the same kind, in order."""
    groups: defaultdict[Hashable, list[int]] = defaultdict(list)
    for rank in ranks:
        groups[kinds_R[rank]].append(int(rank))
    return list(groups.values())
