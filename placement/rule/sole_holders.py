"""Tokens for which the rule has nothing to choose: each of their experts is on one rank.

T tokens, K experts of a token, E logical experts, R ranks.
"""

from __future__ import annotations

import numpy as np

from placement.compiled import compiled


@compiled()
def take_sole_holders(
    topk_ids_TK: np.ndarray, slots_ER: np.ndarray, work_R: np.ndarray, rank_load_R: np.ndarray, rank_TK: np.ndarray
) -> int:
    """`choose_replicas` up to the first token with an expert on several ranks; returns its number, or that of tokens.

    Arguments as there. Without replicas this is all of the rule, at half its price.
    """
    num_tokens, top_k = topk_ids_TK.shape
    num_experts, num_ranks = slots_ER.shape
    # An expert's holder is looked up when it is first met: -2 not yet, -1 for none, `num_ranks` for several.
    holder_E = np.full(num_experts, -2, np.int32)
    seen_in_E = np.full(num_experts, -1, np.int32)
    for t in range(num_tokens):
        for k in range(top_k):
            expert = topk_ids_TK[t, k]
            if expert < 0 or expert >= num_experts:
                continue
            holder = holder_E[expert]
            if holder == -2:
                holder = np.int32(-1)
                for r in range(num_ranks):
                    if slots_ER[expert, r] >= 0:
                        holder = np.int32(r) if holder == -1 else np.int32(num_ranks)
                holder_E[expert] = holder
            if holder == num_ranks:
                return t
        for k in range(top_k):
            expert = topk_ids_TK[t, k]
            if expert < 0 or expert >= num_experts:
                rank_TK[t, k] = -1
                continue
            holder = holder_E[expert]
            rank_TK[t, k] = holder
            if holder >= 0 and seen_in_E[expert] != t:
                seen_in_E[expert] = t
                rank_load_R[holder] += work_R[holder]
    return num_tokens
