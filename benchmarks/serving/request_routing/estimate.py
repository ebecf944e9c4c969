"""What there is to win, from recorded routing alone: distinct experts a layer of steps that mix all domains, and of
steps of routers that share the domains out.

    python -m benchmarks.serving.request_routing.estimate

A step is as many random tokens as it has requests. With R routers each one computes steps of the same size, of its own
domains; of all ways to share domains out evenly the best one is shown.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.common import TINY_MODEL, print_table, save
from benchmarks.placement.olmoe import TRACE
from placement.traces.importers import load_trace

STEP_ROWS = (4, 8, 16, 32, 64)
DRAWS = 400


def distinct(ids_TLK: np.ndarray, rows: int, random: np.random.Generator) -> float:
    """Distinct experts a layer, the mean of DRAWS steps of `rows` random tokens."""
    num_layers = ids_TLK.shape[1]
    found = 0
    for _ in range(DRAWS):
        step_TLK = ids_TLK[random.choice(len(ids_TLK), rows, replace=False)]
        found += sum(len(np.unique(step_TLK[:, layer])) for layer in range(num_layers))
    return found / DRAWS / num_layers


def shares(names: tuple[str, ...], routers: int) -> Iterator[list[tuple[str, ...]]]:
    """All ways to give each router as many of `names`."""
    if not names:
        yield []
        return
    for others in itertools.combinations(names[1:], len(names) // routers - 1):
        group = (names[0], *others)
        rest = tuple(name for name in names if name not in group)
        yield from ([group, *more] for more in shares(rest, routers - 1) if routers > 1 or not rest)


def rows_of(path: Path) -> Iterator[list[object]]:
    """One row of the table for each size of a step."""
    trace, random = load_trace(path), np.random.default_rng(0)
    of_domain = {name: np.asarray(trace.of_domain(name).topk_ids) for name in trace.domains}
    fewest = min(map(len, of_domain.values()))
    of_domain = {name: ids[random.choice(len(ids), fewest, replace=False)] for name, ids in of_domain.items()}
    for rows in STEP_ROWS:
        mixed = distinct(np.concatenate(list(of_domain.values())), rows, random)
        line: list[object] = [rows, mixed]
        for routers in (2, 4):
            found = [
                np.mean([distinct(np.concatenate([of_domain[n] for n in group]), rows, random) for group in groups])
                for groups in shares(tuple(of_domain), routers)
            ]
            line += [float(min(found)), f"{100 * (1 - min(found) / mixed):.1f} %"]
        yield line


def main() -> None:
    """Print the tables and write bench-results/request_routing_estimate.json."""
    told = {}
    for name, path in (("tiny-moe", TINY_MODEL / "trace.npz"), ("OLMoE-1B-7B", TRACE)):
        told[name] = list(rows_of(path))
        header = ["rows a step", "one mix", "2 routers", "fewer", "4 routers", "fewer"]
        print_table(f"{name}: distinct experts a layer of a step", header, told[name])
    save("request_routing_estimate", {"rows": told})


if __name__ == "__main__":
    main()
