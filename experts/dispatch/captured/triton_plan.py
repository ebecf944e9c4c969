"""The Triton programs that plan a dispatch on the device. Importing this needs triton.

Legend: T tokens, K top-k, E logical experts, R ranks, N nodes. BLOCK_X is the next power of two of X. For `rank_TK` and
`row_TK` see `experts.dispatch.rows.base.DispatchPlan`.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from placement.rule import even_out

SLACK_SHARE = tl.constexpr(even_out.SLACK_SHARE)
SLACK_PAIRS = tl.constexpr(even_out.SLACK_PAIRS)


@triton.jit
def _argmin_among(candidates, values, index):
    """The lowest index among the candidates with the smallest value."""
    least = tl.min(tl.where(candidates, values, 0x7FFFFFFFFFFFFFFF))
    return tl.min(tl.where(candidates & (values == least), index, 0x7FFFFFFF))


@triton.jit
def choose_ranks(
    ids_TK, slots_ER, node_of_rank_R, work_R, load_R, rank_TK,
    T, E, R, NUM_NODES: tl.constexpr, K: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The rule of `placement.rule`. One program goes token by token: each choice weighs those before.

    `load_R` (int64, as `work_R`) is halved first, as in `plan_and_pack`, and added to.
    """
    k = tl.arange(0, BLOCK_K)
    r = tl.arange(0, BLOCK_R)
    node_R = tl.load(node_of_rank_R + r, mask=r < R, other=-1)
    work = tl.load(work_R + r, mask=r < R, other=0)
    before = tl.load(load_R + r, mask=r < R, other=0) >> 1
    rank_load = before
    num_choosing = 0
    for t in range(T):
        ids = tl.load(ids_TK + t * K + k, mask=k < K, other=-1)
        known = (ids >= 0) & (ids < E)
        at = tl.where(known, ids, 0)
        slots_KR = tl.load(slots_ER + at[:, None] * R + r[None, :], mask=known[:, None] & (r < R)[None, :], other=-1)
        holds_KR = (slots_KR >= 0).to(tl.int32)
        # An expert that occurs twice in a row counts once.
        repeats_KK = (ids[:, None] == ids[None, :]) & (k[None, :] < k[:, None])
        counts_K = (tl.max(repeats_KK.to(tl.int32), axis=1) == 0).to(tl.int32)
        left_K = tl.max(holds_KR, axis=1)
        num_choosing += tl.max(tl.sum(holds_KR, axis=1)) // 2
        chosen_K = tl.full((BLOCK_K,), -1, tl.int32)
        if NUM_NODES > 1:
            n = tl.arange(0, BLOCK_N)
            on_node_RN = (node_R[:, None] == n[None, :]).to(tl.int32)
            held_KN = tl.max(holds_KR[:, :, None] * on_node_RN[None, :, :], axis=1)
            visited_N = tl.zeros((BLOCK_N,), tl.int32)
        while tl.max(left_K) > 0:
            cover_R = tl.sum(holds_KR * (left_K * counts_K)[:, None], axis=0)
            if NUM_NODES > 1:
                cover_N = tl.sum(held_KN * (left_K * counts_K)[:, None], axis=0)
                key_N = tl.where(cover_N > 0, 2 * cover_N + visited_N, -1)
                least_N = tl.min(tl.where(on_node_RN > 0, rank_load[:, None], 0x7FFFFFFFFFFFFFFF), axis=0)
                node = _argmin_among(key_N == tl.max(key_N), least_N, n)
                visited_N = tl.where(n == node, 1, visited_N)
                cover_R = tl.where(node_R == node, cover_R, 0)
            cover = tl.max(cover_R)
            best = _argmin_among(cover_R == cover, rank_load, r)
            taken_K = left_K * tl.sum(tl.where((r == best)[None, :], holds_KR, 0), axis=1)
            chosen_K = tl.where(taken_K > 0, best, chosen_K)
            rank_load += tl.where(r == best, cover * work, 0)
            left_K -= taken_K
        tl.store(rank_TK + t * K + k, chosen_K, mask=k < K)
    if num_choosing > 0:
        tl.debug_barrier()  # other threads of this program wrote the choices
        batch = rank_load - before
        even = tl.sum(batch) // R
        slack = even // SLACK_SHARE
        for t in range(T):
            ids = tl.load(ids_TK + t * K + k, mask=k < K, other=-1)
            known = (ids >= 0) & (ids < E)
            at = tl.where(known, ids, 0)
            slots_KR = tl.load(
                slots_ER + at[:, None] * R + r[None, :], mask=known[:, None] & (r < R)[None, :], other=-1
            )
            holds_KR = (slots_KR >= 0).to(tl.int32)
            if tl.max(tl.sum(holds_KR, axis=1)) > 1:
                chosen_K = tl.load(rank_TK + t * K + k, mask=k < K, other=-1)
                for one in range(K):
                    rank = tl.max(tl.where(k == one, chosen_K, -1))
                    load = tl.max(tl.where(r == rank, batch, 0))
                    if (rank >= 0) & (load > even):
                        here_R = tl.sum((chosen_K[:, None] == r[None, :]).to(tl.int32), axis=0)
                        here = tl.max(tl.where(r == rank, here_R, 0))
                        holds_R = tl.sum(tl.where((k == one)[:, None], holds_KR, 0), axis=0) > 0
                        free_R = (here_R > 0) | (here <= 1)
                        near_R = (here_R > 0) | (node_R == tl.max(tl.where(r == rank, node_R, -1)))
                        cost_R = batch + work + tl.where(free_R, 0, slack)
                        allowed_R = (
                            holds_R & near_R & (free_R | (slack >= SLACK_PAIRS * tl.max(tl.where(r == rank, work, 0))))
                        )
                        best = _argmin_among(allowed_R, cost_R, r)
                        if tl.max(tl.where(r == best, cost_R, 0)) < load:
                            batch += tl.where(r == best, work, 0) - tl.where(r == rank, work, 0)
                            expert = tl.max(tl.where(k == one, ids, -1))
                            chosen_K = tl.where(ids == expert, best, chosen_K)
                tl.store(rank_TK + t * K + k, chosen_K, mask=k < K)
        rank_load = before + batch
    tl.store(load_R + r, rank_load, mask=r < R)


@triton.jit
def place_pairs(
    ids_TK, weights_TK, home_E, rank_TK, row_TK, messages, unserved,
    T, E, message_words, offsets_at, experts_at, weights_at,
    HAS_RANKS: tl.constexpr, K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Give every pair of a rank its place, and write that rank's counts, row offsets, experts and weights.

    One program a rank. Its message starts `rank * message_words` int32 words into `messages`; `offsets_at` and the
    others count words from there. Without HAS_RANKS every expert is on one rank, home_E (int32, -1: none), and
    `rank_TK` is written too. The first program writes unserved pairs and adds them to `unserved` (int32 [1]).
    """
    rank = tl.program_id(0)
    message = messages + rank.to(tl.int64) * message_words
    k = tl.arange(0, BLOCK_K)
    rows = tl.full((), 0, tl.int32)
    pairs = tl.full((), 0, tl.int32)
    for start in range(0, T, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        at_TK = t[:, None] * K + k[None, :]
        inside = (t < T)[:, None] & (k < K)[None, :]
        ids = tl.load(ids_TK + at_TK, mask=inside, other=-1)
        if HAS_RANKS:
            ranks = tl.load(rank_TK + at_TK, mask=inside, other=-1)
        else:
            ranks = tl.load(home_E + ids, mask=inside & (ids >= 0) & (ids < E), other=-1)
        mine = inside & (ranks == rank)
        mine_TK = mine.to(tl.int32)
        before_TK = tl.cumsum(mine_TK, axis=1) - mine_TK
        pairs_T = tl.sum(mine_TK, axis=1)
        visits_T = (pairs_T > 0).to(tl.int32)
        row_T = rows + tl.cumsum(visits_T, axis=0) - visits_T
        first_T = pairs + tl.cumsum(pairs_T, axis=0) - pairs_T
        pair_TK = first_T[:, None] + before_TK
        weights = tl.load(weights_TK + at_TK, mask=mine, other=0.0)
        tl.store(message + offsets_at + row_T, first_T, mask=visits_T > 0)
        tl.store(message + experts_at + pair_TK, ids, mask=mine)
        tl.store(message + weights_at + pair_TK, weights.to(tl.float32).to(tl.int32, bitcast=True), mask=mine)
        tl.store(row_TK + at_TK, tl.where(before_TK == 0, row_T[:, None], -1), mask=mine)
        if not HAS_RANKS:
            tl.store(rank_TK + at_TK, ranks, mask=mine)
        if rank == 0:
            nobody = inside & (ranks < 0)
            nowhere = tl.full((BLOCK_T, BLOCK_K), -1, tl.int32)
            tl.store(row_TK + at_TK, nowhere, mask=nobody)
            if not HAS_RANKS:
                tl.store(rank_TK + at_TK, nowhere, mask=nobody)
            missing = tl.sum(tl.sum((nobody & (ids >= 0)).to(tl.int32), axis=1), axis=0)
            tl.store(unserved, tl.load(unserved) + missing)
        rows += tl.sum(visits_T, axis=0)
        pairs += tl.sum(pairs_T, axis=0)
    tl.store(message + offsets_at + rows, pairs)
    tl.store(message, rows)
    tl.store(message + 1, pairs)
