"""Search for the slots of one layer: which searches run, one after the other, for which kind of problem.

T tokens, E experts, R ranks, s slots of a rank, N nodes.

- Single replicas: only the swap search.
- Replicas on one node: several swap searches with the replicas that greedy balancing gives, then the replica search
  from the best of them, judged by the rule that dispatch uses.
- Replicas on several nodes: the replica search first decides which experts each node holds, then on which rank.
- Local replicas first: the plan without that preference, then the replica search with it.
- From where it stands: a cool search from the placement in use, which pays for every copy, beside one from scratch,
  whose ranks are named so that most stays. Whatever is better with its copies paid for is taken.
- Too many tokens, experts and ranks for the time: one swap search on some of the tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from placement.search.balance import closed_slots, greedy_balance
from placement.search.few_copies.relabel import relabel_rows
from placement.search.problem import LayerProblem
from placement.search.replicas.replica_search import proposal_seconds, search_replicas
from placement.search.scoring import Scored, score_slots
from placement.search.search_clock import SearchClock
from placement.search.swaps.repair import repaired_slots
from placement.search.swaps.swap_stages import SETTLE_ROUNDS, Stage, search_fixed_shares, search_swaps, settle_loads
from placement.xorshift import random_state

# Below so many proposals for each (slot, rank) a replica search does worse than swaps of replicas with fixed tokens.
LEAST_PROPOSALS = 6
SWAP_PROPOSALS = 20_000  # of single swaps from the placement in use
SWAP_TOKENS = 4096  # what the swap search looks at in a layer that is too large for more

# Each search draws from a random stream of its own, so that a change of one leaves what the others draw.
SWAPS, LARGE, ONE_NODE_SWAPS, ONE_NODE_REPLICAS, NODES, RANKS, SEVERAL_NODES_REPLICAS, LOCAL = 1, 2, 3, 4, 5, 6, 7, 9
IN_USE = 10


@dataclass(frozen=True)
class Refinement:
    """A replica search at the end: its share of a layer's time, and its heat, from and to.

    Heat is in the weighted visits of an average expert's tokens. What is refined is good already, so the heat starts
    far below that of a search from scratch (0.5 to 2), which would lose it.
    """

    share: float
    heat: tuple[float, float]


# One node: swaps get most of the time, because a proposal takes about a hundredth of the replica search's. There are
# several runs, because each ends elsewhere. The remaining 0.05 is for scoring.
SWAP_RUNS, SWAP_SHARE = 4, 0.6
AFTER_SWAPS = Refinement(0.35, (0.05, 0.01))
# Several nodes: a node costs several ranks, so which experts it holds is searched first, hot, from scratch.
NODE_RUNS, NODE_SHARE, NODE_HEAT = 3, 0.3, (0.5, 0.05)
# Then swaps inside nodes order the ranks. Between the hot run and the cooler one, the rule shares tokens out again.
RANK_SHARE = 0.1
RANK_STAGES = (Stage("ranks", (1.0, 0.05)), Stage("ranks", (0.2, 0.02)))
# The refinement starts from less search than on one node: more time, and twice the heat.
AFTER_NODES = Refinement(0.55, (0.1, 0.01))
# Local replicas first: a plan for few visits comes close; the replica search then adds which ranks are local.
WITHOUT_PREFERENCE_SHARE = 0.5
AFTER_PREFERENCE = Refinement(0.4, (0.1, 0.01))
# From where it stands, with replicas: hot enough that an expert may move on before its former replica is back.
IN_USE_RUNS, FROM_IN_USE = 3, Refinement(0.2, (1.0, 0.01))


def search_layer(
    problem: LayerProblem,
    starts: list[np.ndarray],
    balanced_Rs: np.ndarray,
    seconds: float,
    seed: int,
    clock: SearchClock,
) -> Scored:
    """The best slots found for a layer in about `seconds` of nominal time.

    `starts`, slots int32 [R, s], are among the candidates; `balanced_Rs` only where all else is above the limit.
    """
    search = _LayerSearch(problem, tuple(starts), balanced_Rs, seconds, seed, clock)
    if not (problem.ids >= 0).any():
        return search.given[-1]  # no token went through the layer; where it is in use, that costs the fewest moves
    given, near = search.given, search.from_in_use()
    if near and problem.has_replicas:
        search = replace(search, seconds=seconds * (1 - IN_USE_RUNS * FROM_IN_USE.share))
    best = min([*given, *near, *search.renamed(search.kind()())], key=search.guarded_key)
    # Whatever a guard is worth, none of the starts may be better on the tokens that were given.
    best = min([best, *given], key=search.plain_key)
    if search.plain_key(best)[0] > 0:
        best = min([best, search.balanced], key=search.plain_key)
    return best


@dataclass(frozen=True, eq=False)
class _LayerSearch:
    """The searches of one layer. Each returns what it found, the order of which decides between equals."""

    problem: LayerProblem
    starts: tuple[np.ndarray, ...]
    balanced_Rs: np.ndarray
    seconds: float
    seed: int
    clock: SearchClock

    @cached_property
    def given(self) -> list[Scored]:
        return [score_slots(self.problem, slots_Rs) for slots_Rs in self.starts]

    @cached_property
    def balanced(self) -> Scored:
        return score_slots(self.problem, self.balanced_Rs)

    @cached_property
    def limit(self) -> float:
        """The largest load, in caps. Where the caps are out of reach, that of the best start.

        Starts are even in all of the traffic together; with domains, what evens those out too is among them.
        """
        starts = self.given if self.problem.domains is None else [*self.given, self.balanced]
        return max(1.0, min(entry.score.above for entry in starts))

    def plain_key(self, entry: Scored) -> tuple[float, float]:
        return entry.score.plain_key(self.limit)

    def guarded_key(self, entry: Scored) -> tuple[float, float]:
        return entry.score.guarded_key(self.limit, self.problem.num_tokens)

    def kind(self) -> Callable[[], list[Scored]]:
        """The search for this kind of problem."""
        problem = self.problem
        if not problem.has_replicas:
            return self.single_replicas
        if problem.prefer_local_replicas:
            return self.local_replicas_first
        if self.seconds / proposal_seconds(problem) < LEAST_PROPOSALS * self.starts[0].size * problem.num_ranks:
            return self.some_tokens
        return self.one_node if problem.num_nodes == 1 else self.several_nodes

    def from_in_use(self) -> list[Scored]:
        """From the last start, which is next to the placement in use; nothing if there is none."""
        problem, start = self.problem, self.given[-1]
        if problem.home is None or len(self.given) < 2:
            return []
        moves = problem.num_experts * problem.num_ranks  # no bound: copies have their price
        random_1 = random_state(self.seed, IN_USE)
        repaired = score_slots(problem, repaired_slots(problem, start.slots, moves, SWAP_PROPOSALS, random_1))
        found = [repaired]
        if problem.has_replicas:
            found += [self._refined(start, FROM_IN_USE, IN_USE, run) for run in range(IN_USE_RUNS)]
        return found

    def renamed(self, found: list[Scored]) -> list[Scored]:
        """What was found from scratch, with ranks named so that most stays where it is."""
        problem = self.problem
        if problem.home is None:
            return found
        kinds = list(
            zip(problem.node_of_rank.tolist(), problem.open_slots.tolist(), problem.target.tolist(), strict=True)
        )
        return [score_slots(problem, relabel_rows(problem.home, each.slots, kinds)) for each in found]

    def single_replicas(self) -> list[Scored]:
        slots_Rs = search_swaps(self.problem, self.given[0], self.seconds, (self.seed, SWAPS), self.clock)
        return [score_slots(self.problem, slots_Rs)]

    def some_tokens(self) -> list[Scored]:
        stream = (self.seed, LARGE)
        return search_fixed_shares(self.problem, self.given[0], self.seconds, stream, self.clock, SWAP_TOKENS)

    def one_node(self) -> list[Scored]:
        found: list[Scored] = []
        for run in range(SWAP_RUNS):
            seconds, stream = SWAP_SHARE / SWAP_RUNS * self.seconds, (self.seed, ONE_NODE_SWAPS, run)
            found += search_fixed_shares(self.problem, self.given[0], seconds, stream, self.clock)
        best = min([*self.given, *found], key=self.guarded_key)
        return [*found, self._refined(best, AFTER_SWAPS, ONE_NODE_REPLICAS)]

    def several_nodes(self) -> list[Scored]:
        problem, found = self.problem, []
        by_rank = score_slots(problem, slots_from_nodes(problem, self._experts_of_nodes()))
        for run, stage in enumerate(RANK_STAGES):
            seconds, stream = RANK_SHARE / len(RANK_STAGES) * self.seconds, (self.seed, RANKS, run)
            slots_Rs = search_swaps(problem, by_rank, seconds, stream, self.clock, (stage,))
            by_rank = score_slots(problem, slots_Rs)
            found.append(by_rank)
        refined = self._refined(by_rank, AFTER_NODES, SEVERAL_NODES_REPLICAS)
        return [*found, *settle_loads(problem, refined, SETTLE_ROUNDS)]

    def local_replicas_first(self) -> list[Scored]:
        anywhere = replace(self.problem, prefer_local_replicas=False)
        seconds = WITHOUT_PREFERENCE_SHARE * self.seconds
        base = search_layer(anywhere, list(self.starts), self.balanced_Rs, seconds, self.seed, self.clock)
        start = score_slots(self.problem, base.slots)
        return [start, self._refined(start, AFTER_PREFERENCE, LOCAL)]

    def _refined(self, start: Scored, how: Refinement, *stream: int) -> Scored:
        seconds = how.share * self.seconds
        return search_replicas(self.problem, start, seconds, how.heat, (self.seed, *stream), self.clock)

    def _experts_of_nodes(self) -> np.ndarray:
        """Slots int32 [N, s] of nodes, the best of several searches from a greedy start."""
        nodes = node_problem(self.problem)
        start_Ns = greedy_balance(
            nodes.load, nodes.open_slots, nodes.node_of_rank, nodes.num_nodes, nodes.target / nodes.target.max(),
            nodes.min_replicas, nodes.max_filled,
        )  # fmt: skip
        start, seconds = score_slots(nodes, start_Ns), NODE_SHARE / NODE_RUNS * self.seconds
        found = [
            search_replicas(nodes, start, seconds, NODE_HEAT, (self.seed, NODES, run), self.clock)
            for run in range(NODE_RUNS)
        ]
        return min(found, key=lambda entry: entry.score.key).slots


def node_problem(problem: LayerProblem) -> LayerProblem:
    """The same layer with nodes in the place of ranks."""
    nodes = problem.num_nodes
    target_N = problem.target.reshape(nodes, -1).sum(1)
    # Ranks inside a node cannot be filled to the brim as well: half of what the cap leaves is theirs.
    allowed_N = (problem.allowed.reshape(nodes, -1).sum(1) + target_N) / 2
    domains = problem.domains
    if domains is not None:
        num_domains = len(domains.cap_D)
        target_ND = domains.target_RD.reshape(nodes, -1, num_domains).sum(1)
        allowed_ND = (domains.allowed_RD.reshape(nodes, -1, num_domains).sum(1) + target_ND) / 2
        domains = domains._replace(target_RD=target_ND, allowed_RD=allowed_ND)
    return LayerProblem(
        ids=problem.ids,
        load=problem.load,
        pair_weight=problem.pair_weight,
        open_slots=problem.open_slots.reshape(nodes, -1).sum(1),
        node_of_rank=np.arange(nodes, dtype=np.int32),
        num_nodes=1,
        node_weight=0.0,
        min_replicas=problem.min_replicas,
        max_filled=min(problem.max_filled, nodes * problem.num_experts),
        target=target_N,
        allowed=allowed_N,
        load_cap=problem.load_cap,
        speeds=None if problem.speeds is None else tuple(target_N.tolist()),
        domains=domains,
    )


def slots_from_nodes(problem: LayerProblem, experts_Ns: np.ndarray) -> np.ndarray:
    """Slots int32 [R, s] with the experts of each node dealt to its ranks, heaviest first to the lightest."""
    slots_Rs = closed_slots(problem.open_slots)
    per_node = problem.num_ranks // problem.num_nodes
    filled_R = np.zeros(problem.num_ranks, np.int64)
    load_R = np.zeros(problem.num_ranks)
    for node, experts in enumerate(experts_Ns):
        ranks = np.arange(node * per_node, (node + 1) * per_node)
        for expert in sorted(experts[experts >= 0].tolist(), key=lambda e: (-problem.load[e], e)):
            free = filled_R[ranks] < problem.open_slots[ranks]
            rank = ranks[int(np.argmin(np.where(free, load_R[ranks] / problem.target[ranks], np.inf)))]
            slots_Rs[rank, filled_R[rank]] = expert
            filled_R[rank] += 1
            load_R[rank] += problem.load[expert]
    return slots_Rs
