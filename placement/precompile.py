"""Compile the planner, so that the first `--seconds` all go into planning: `python -m placement.precompile`.

Compiled code is kept in the user's cache, in a folder named after the sources (`placement.compiled`). Compiling takes
half a minute or more, which a planner would otherwise lose from its time.
"""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np

from placement.capacity.replica_worth import Worth
from placement.rule.evaluate import evaluate
from placement.search.optimizer import optimize
from placement.search.problem import PlanRequest
from placement.search.refresh import refresh
from placement.traces.trace import ActivationTrace


def main() -> None:
    """Run every compiled function once, on a made-up trace of eight experts."""
    start_s = time.perf_counter()
    rng = np.random.default_rng(0)
    ids = np.stack([rng.permutation(8)[:2] for _ in range(64)])[:, None]
    trace = ActivationTrace(ids, 8, domain=np.arange(64, dtype=np.int8) % 2, domains=("even", "odd"))
    for nodes, slots in ((1, 2), (1, 3), (2, 2), (2, 3)):
        request = PlanRequest(4, nodes, slots, effort=0.001)
        placement = optimize(trace, request).placement
        optimize(trace, replace(request, worth=Worth(step_tokens=(8,))), placement)
        evaluate(refresh(placement, trace).placement, trace)
    print(f"planner compiled in {time.perf_counter() - start_s:.0f} s")


if __name__ == "__main__":
    main()
