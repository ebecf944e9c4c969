"""How long rounds take at given rates, for a person who asks before, and for simulations."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from placement.migration.rounds import Round


@dataclass(frozen=True)
class CopyRates:
    """Bytes a second in one direction: of a rank's link to others of its node, between nodes, from the checkpoint.

    `round_s` is what a round costs beside its copies: two epochs, and the slowest router's answer.
    """

    node_bytes_per_s: float
    between_nodes_bytes_per_s: float
    checkpoint_bytes_per_s: float
    round_s: float = 0.0

    def __post_init__(self) -> None:
        for name in ("node_bytes_per_s", "between_nodes_bytes_per_s", "checkpoint_bytes_per_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected above 0")
        if self.round_s < 0:
            raise ValueError(f"round_s is {self.round_s}, expected at least 0")

    def of(self, nearness: str) -> float:
        if nearness == "checkpoint":
            return self.checkpoint_bytes_per_s
        return self.node_bytes_per_s if nearness in ("rank", "node") else self.between_nodes_bytes_per_s


def expected_seconds(rounds: Iterable[Round], rates: CopyRates, nodes: Sequence[int] | None = None) -> float:
    """Seconds that rounds take one after the other, the copies of each in parallel.

    A round takes as long as its busiest link. Each rank has one link out and one in; with `nodes`, the node of each
    rank, the copies between nodes share their node's link in either direction instead.
    """
    return sum(_round_seconds(each, rates, nodes) for each in rounds)


def _round_seconds(each: Round, rates: CopyRates, nodes: Sequence[int] | None) -> float:
    busy_s: defaultdict[tuple[str, int], float] = defaultdict(float)
    for copy in each.copies:
        seconds = copy.size_bytes / rates.of(copy.nearness)
        if nodes is not None and copy.nearness in ("rack", "cluster"):
            busy_s["out of node", nodes[copy.source_rank]] += seconds
            busy_s["into node", nodes[copy.rank]] += seconds
            continue
        busy_s["into rank", copy.rank] += seconds
        if copy.source_rank >= 0:
            busy_s["out of rank", copy.source_rank] += seconds
    return max(busy_s.values(), default=0.0) + rates.round_s
