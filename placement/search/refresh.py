"""A placement in use that follows the traffic: few copies, and none that noise alone would suggest.

One half of the window's tokens proposes changes to each layer; the other half, which the search has not seen, judges
them by the rule that dispatch uses. A layer changes only where it gains beyond the noise of that comparison, beyond the
price of its copies, and beyond what single steps lose where they get less even. Such a layer is then searched again on
all tokens: twice as many show better where loads lie.

T tokens, K experts of one, E experts, R ranks, s slots of a rank, L layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np

from placement.placement import EMPTY, Placement, check_same_model
from placement.search.judgement import (
    BLOCK_TOKENS,
    NO_GAIN,
    Gain,
    Served,
    compare,
    over_allowed,
    serve,
    worst_in_steps,
)
from placement.search.problem import LayerProblem, domain_loads, load_guard
from placement.search.replica_budget import LOAD_WORTH
from placement.search.replicas.holders import CLOSED
from placement.search.swaps.repair import LAYER_PROPOSALS, repaired_slots
from placement.traces.trace import ActivationTrace
from placement.xorshift import random_state

# Proposals of the annealing, and judged tokens, for all layers of a refresh.
ALL_PROPOSALS, ALL_TOKENS = 350_000, 60_000
LEAST_TOKENS, MOST_TOKENS = 512, 8192  # of a layer, in each half of the window
FALSE_ALARMS = 0.05  # of refreshes in which chance alone changes a layer
COPY_PRICE = 0.01  # visits a token that each copy must save


@dataclass(frozen=True)
class RefreshLimits:
    """What a refresh must keep to, and what its copies are worth.

    Attributes:
        load_cap: largest allowed rank load over the mean (by speed); load below it is worth nothing.
        max_moves: copies of each layer; `max_copies` of all layers, those with most gain first, None: any number.
        min_replicas: replicas of every expert, on different nodes (ranks, if there is one node).
        node_weight: cost of a visited node, in visited ranks.
        load_worth: visits a token that a step saves when the worst rank's load falls by one even load.
        copy_price: visits a token, in its layer, that each copy must save.
        speeds: relative speed of each rank; None: all equal.
        expert_bytes: weights of one expert, for `Refreshed.copied_bytes`.
    """

    load_cap: float = 1.05
    max_moves: int = 20
    max_copies: int | None = None
    min_replicas: int = 1
    node_weight: float = 4.0
    load_worth: float = LOAD_WORTH
    copy_price: float = COPY_PRICE
    speeds: tuple[float, ...] | None = None
    expert_bytes: int = 0
    proposals: int = 500
    seed: int = 0


@dataclass(frozen=True)
class Figures:
    """Means over layers, on the tokens that judged."""

    fan_out: float
    node_fan_out: float
    balancedness: float


@dataclass(frozen=True, eq=False)
class Refreshed:
    """What a refresh proposes. Where nothing is worth its copies, `placement` is the one in use and `copies` is 0.

    `gain` is the share of a step's cost (visits, load above the cap, and what single steps lose by their load) that the
    change saves on tokens which the search did not see, `gain_error` one standard error of it. `before` and `after` are
    of the same tokens. All four are of what half of the tokens proposed; what all of them propose takes its place where
    it is cheaper on all of them. `layers` are those that change.
    """

    placement: Placement
    gain: float
    gain_error: float
    before: Figures
    after: Figures
    copies: int
    copied_bytes: int
    layers: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class _Change:
    """One layer's proposal; `gain` in visits a token."""

    layer: int
    slots_Rs: np.ndarray
    copies: int
    gain: Gain
    before: Served
    after: Served


def refresh(placement: Placement, window: ActivationTrace, limits: RefreshLimits | None = None) -> Refreshed:
    """A placement that suits a window of recent tokens, few copies away from the one in use, or that one.

    Meant to run all the time, for 58 layers of 256 experts on 64 ranks too. Loads come from the window's counts if they
    are of the same tokens. Ranks that are empty in all layers stay empty. Needs neither torch nor ray; compiled code is
    loaded on the first call. Raises ValueError if the window is of another model.
    """
    limits = limits or RefreshLimits()
    check_same_model("the window", window, "the placement", placement)
    layers = _Layers(placement, window, limits)
    changes = [layers.change(layer) for layer in range(placement.num_layers)]
    # Every layer is tested, and of loads every rank.
    tests = placement.num_layers, placement.num_layers * placement.num_ranks
    visits_errors, load_errors = (NormalDist().inv_cdf(1 - FALSE_ALARMS / number) for number in tests)

    def is_worth(each: _Change) -> bool:
        return each.copies > 0 and each.gain.least(visits_errors, load_errors) > limits.copy_price * each.copies

    # Steps take longest to judge and can only speak against a change.
    priced = (layers.priced_by_steps(each) for each in changes if is_worth(each))
    worth = [layers.searched_again(each) for each in priced if is_worth(each)]
    worth.sort(key=lambda each: (-each.gain.saved / each.copies, each.layer))
    chosen: dict[int, _Change] = {}
    copies = 0
    for each in worth:
        if limits.max_copies is None or copies + each.copies <= limits.max_copies:
            chosen[each.layer] = each
            copies += each.copies
    map_LS = placement.physical_to_logical_map.copy()
    for layer, each in chosen.items():
        map_LS[layer] = np.where(each.slots_Rs >= 0, each.slots_Rs, EMPTY).ravel()
    cost = sum(
        float(each.before.visits_B.sum()) / each.before.num_tokens + limits.load_worth * (1 + each.before.over)
        for each in changes
    )
    cost = max(cost, 1e-12)
    return Refreshed(
        placement=replace(placement, physical_to_logical_map=map_LS, speeds=layers.speeds) if chosen else placement,
        gain=sum(each.gain.saved for each in chosen.values()) / cost,
        gain_error=math.sqrt(sum(each.gain.error**2 for each in chosen.values())) / cost,
        before=_figures([each.before for each in changes]),
        after=_figures([each.after if each.layer in chosen else each.before for each in changes]),
        copies=copies,
        copied_bytes=copies * limits.expert_bytes,
        layers=tuple(sorted(chosen)),
    )


def searched(placement: Placement, window: ActivationTrace, limits: RefreshLimits) -> Placement:
    """What the search alone makes of all tokens of a window: for callers that judge its layers on tokens of their own.

    Keeps to `load_cap`, `max_moves` and `min_replicas`. Raises ValueError if the window is of another model.
    """
    check_same_model("the window", window, "the placement", placement)
    layers = _Layers(placement, window, limits)
    map_LS = np.stack([layers.whole(layer).ravel() for layer in range(placement.num_layers)])
    return replace(placement, physical_to_logical_map=np.where(map_LS >= 0, map_LS, EMPTY), speeds=layers.speeds)


def _figures(served: list[Served]) -> Figures:
    rows = np.array([(each.fan_out, each.node_fan_out, each.balancedness) for each in served])
    return Figures(*rows.mean(0).tolist())


class _Layers:
    """The layers of a placement, with the two halves of a window: one to search on, one to judge by."""

    def __init__(self, placement: Placement, window: ActivationTrace, limits: RefreshLimits) -> None:
        self._placement, self._limits = placement, limits
        self.speeds = placement.speeds if limits.speeds is None else limits.speeds
        num_layers, num_ranks = placement.num_layers, placement.num_ranks
        first_N, second_N = _halves(window.num_tokens, num_layers)
        self._search_LTK = _by_layer(window, first_N)
        self._judge_LTK = _by_layer(window, second_N)
        several = window.domain is not None and len(window.domains) > 1 and len(first_N)
        domain_T = window.domain if several else None
        self._search_domain_T = None if domain_T is None else domain_T[first_N]
        self._all_domain_T = None if domain_T is None else domain_T[np.concatenate([first_N, second_N])]
        self._counted = counted = window.counts is not None and (not window.has_sets or window.frequency_true())
        self._load_LE = window.load() if counted else _loads(window, first_N)
        self._judge_load_LE = self._load_LE if counted else _loads(window, second_N)
        self._map_LRs = placement.physical_to_logical_map.reshape(num_layers, num_ranks, -1)
        self._speed_R = (self._map_LRs >= 0).any((0, 2)) * np.asarray(self.speeds or (1.0,) * num_ranks, float)
        self._pairs = float((window.counts if counted else self._judge_load_LE)[0].sum())  # type: ignore[index]
        has_replicas = bool((placement.logical_replica_count > 1).any())
        self._guard = load_guard(limits.load_cap, int(max(self._pairs, 1)), 1, num_ranks, has_replicas)
        self._annealing = min(LAYER_PROPOSALS, ALL_PROPOSALS // num_layers)
        self._random_1 = random_state(limits.seed)

    def _problem(self, layer: int, ids_TK: np.ndarray, load_E: np.ndarray, cap: float) -> LayerProblem:
        placement, limits = self._placement, self._limits
        sets_E = np.bincount(ids_TK[ids_TK >= 0], minlength=placement.num_experts).astype(float)
        target_R = np.maximum(load_E.sum() * self._speed_R / self._speed_R.sum(), 1e-9)
        return LayerProblem(
            ids=ids_TK,
            load=load_E,
            pair_weight=np.where(sets_E > 0, load_E / np.maximum(sets_E, 1), 1.0),
            open_slots=np.full(placement.num_ranks, placement.slots_per_rank),
            node_of_rank=placement.node_of_rank_R,
            num_nodes=placement.num_nodes,
            node_weight=limits.node_weight,
            min_replicas=limits.min_replicas,
            max_filled=placement.num_slots,
            target=target_R,
            allowed=target_R * cap,
            load_cap=limits.load_cap,
            speeds=self.speeds,
        )

    def change(self, layer: int) -> _Change:
        """What the search proposes for a layer, judged."""
        limits = self._limits
        given_Rs = self._given_Rs(layer)
        slots_Rs = self._repaired(layer, self._search_LTK[layer], self._load_LE[layer], self._search_domain_T)
        judge = self._problem(layer, self._judge_LTK[layer], self._judge_load_LE[layer], limits.load_cap)
        before = serve(judge, given_Rs)
        copies = _copies(given_Rs, slots_Rs, self._placement.num_experts)
        if not copies:
            return _Change(layer, given_Rs, 0, NO_GAIN, before, before)
        after = serve(judge, slots_Rs)
        excess, pairs = before.over, self._pairs
        if excess > 0 and not self._counted:
            # Neither half was planned for: loads of both tell more.
            whole = self._problem(layer, self._search_LTK[layer], self._load_LE[layer], limits.load_cap)
            excess = over_allowed(
                before.load_R + serve(whole, given_Rs).load_R,
                judge.target + whole.target,
                judge.allowed + whole.allowed,
            )
            pairs *= 2
        pairs_of_rank = pairs / max(int((self._speed_R > 0).sum()), 1)
        gain = compare(before, after, excess, pairs_of_rank, limits.load_worth)
        return _Change(layer, slots_Rs, copies, gain, before, after)

    def priced_by_steps(self, change: _Change) -> _Change:
        """The same change, with what single steps lose by it."""
        layer, limits = change.layer, self._limits
        judge = self._problem(layer, self._judge_LTK[layer], self._judge_load_LE[layer], limits.load_cap)
        lost = worst_in_steps(judge, change.slots_Rs) - worst_in_steps(judge, self._given_Rs(layer))
        return replace(change, gain=change.gain._replace(steps=min(-limits.load_worth * lost, 0.0)))

    def searched_again(self, change: _Change) -> _Change:
        """The same change, or what the search makes of all tokens, if that costs less on them."""
        layer, limits = change.layer, self._limits
        slots_Rs = self.whole(layer)
        copies = _copies(self._given_Rs(layer), slots_Rs, self._placement.num_experts)
        judge = self._problem(layer, *self._whole_window(layer), limits.load_cap)
        if not copies or self._cost(judge, slots_Rs, copies) >= self._cost(judge, change.slots_Rs, change.copies):
            return change
        return replace(change, slots_Rs=slots_Rs, copies=copies)

    def whole(self, layer: int) -> np.ndarray:
        """int32 [R, s]: what the search makes of all tokens."""
        return self._repaired(layer, *self._whole_window(layer), self._all_domain_T)

    def _whole_window(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """(int32 [T, K], float64 [E]): experts of all tokens, and their loads."""
        load_E = self._load_LE[layer]
        if not self._counted:
            load_E = load_E + self._judge_load_LE[layer]
        return np.concatenate([self._search_LTK[layer], self._judge_LTK[layer]]), load_E

    def _repaired(self, layer: int, ids_TK: np.ndarray, load_E: np.ndarray, domain_T: np.ndarray | None) -> np.ndarray:
        """Slots int32 [R, s] near those in use that cost less on some tokens; each of their domains has a cap."""
        limits = self._limits
        problem = self._problem(layer, ids_TK, load_E, limits.load_cap - self._guard)
        if domain_T is not None:
            problem = replace(problem, domains=domain_loads(problem, domain_T))
        given_Rs = self._given_Rs(layer)
        return repaired_slots(problem, given_Rs, limits.max_moves, limits.proposals, self._random_1, self._annealing)

    def _cost(self, problem: LayerProblem, slots_Rs: np.ndarray, copies: int) -> float:
        """Visits a token."""
        served = serve(problem, slots_Rs)
        load = served.over + worst_in_steps(problem, slots_Rs)
        visits = float(served.visits_B.sum()) / served.num_tokens
        return visits + self._limits.load_worth * load + self._limits.copy_price * copies

    def _given_Rs(self, layer: int) -> np.ndarray:
        """int32 [R, s]: the slots in use, `CLOSED` on ranks that are empty in all layers."""
        return np.where(self._speed_R[:, None] > 0, self._map_LRs[layer], CLOSED).astype(np.int32)


def _halves(num_tokens: int, num_layers: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens to search on and to judge by: blocks of the window by turns, thinned out evenly to what time allows."""
    block_T = np.arange(num_tokens) // BLOCK_TOKENS
    most = int(np.clip(ALL_TOKENS // num_layers, LEAST_TOKENS, MOST_TOKENS))
    halves = []
    for half in (0, 1):
        token_N = np.flatnonzero(block_T % 2 == half)
        every = -(-len(token_N) // most) if len(token_N) else 1
        halves.append(token_N[(block_T[token_N] // 2) % every == 0])
    return halves[0], halves[1]


def _by_layer(window: ActivationTrace, token_N: np.ndarray) -> np.ndarray:
    """int32 [L, N, K]."""
    return np.ascontiguousarray(window.topk_ids[token_N].transpose(1, 0, 2), dtype=np.int32)


def _loads(window: ActivationTrace, token_N: np.ndarray) -> np.ndarray:
    """float64 [L, E]: pairs of some tokens."""
    ids_NLK = window.topk_ids[token_N].astype(np.int64)
    key = ids_NLK + np.arange(window.num_layers)[:, None] * window.num_experts
    size = window.num_layers * window.num_experts
    return np.bincount(key[ids_NLK >= 0], minlength=size).reshape(window.num_layers, -1).astype(float)


def _copies(old_Rs: np.ndarray, new_Rs: np.ndarray, num_experts: int) -> int:
    """Experts that ranks hold in the new slots and not in the old."""
    on = np.zeros((2, len(old_Rs), num_experts), bool)
    for which, slots_Rs in enumerate((old_Rs, new_Rs)):
        rank_N, slot_N = np.nonzero(slots_Rs >= 0)
        on[which, rank_N, slots_Rs[rank_N, slot_N]] = True
    return int((on[1] & ~on[0]).sum())


__all__ = ["Figures", "RefreshLimits", "Refreshed", "refresh", "searched"]
