"""Compile the planner, so that the seconds of a search all go into planning: `python -m placement.precompile`.

Compiled code is kept in the user's cache, in a folder named after the sources (`placement.compiled`). Compiling takes
half a minute or more, once for each version; what searches within a time compiles first and starts its clock after.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from placement.capacity.replica_worth import Worth
from placement.compiled import mark_compiled
from placement.rule.evaluate import evaluate
from placement.search.optimizer import optimize
from placement.search.problem import PlanRequest
from placement.search.refresh import refresh
from placement.traces.trace import ActivationTrace


def ensure_compiled(say: Callable[[str], None] = lambda line: None) -> float:
    """Compile the planner if this machine has not yet; the seconds that took, 0 if nothing was to be done."""
    mark = mark_compiled("placement")
    if mark.exists():
        return 0.0
    say("compiling the planner, once for this version: half a minute or more")
    start_s = time.perf_counter()
    compile_all()
    mark.touch()
    return time.perf_counter() - start_s


def compile_all() -> None:
    """Run every compiled function once, on a made-up trace of eight experts."""
    rng = np.random.default_rng(0)
    ids = np.stack([rng.permutation(8)[:2] for _ in range(64)])[:, None]
    trace = ActivationTrace(ids, 8, domain=np.arange(64, dtype=np.int8) % 2, domains=("even", "odd"))
    for nodes, slots in ((1, 2), (1, 3), (2, 2), (2, 3)):
        request = PlanRequest(4, nodes, slots, effort=0.001)
        placement = optimize(trace, request).placement
        optimize(trace, replace(request, worth=Worth(step_tokens=(8,))), placement)
        evaluate(refresh(placement, trace).placement, trace)


def main() -> None:
    """Compile, and say how long it took."""
    print(f"planner compiled in {ensure_compiled():.0f} s")


if __name__ == "__main__":
    main()
